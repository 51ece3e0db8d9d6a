"""Quantized attention on x86 CPUs with AVX-512 VNNI: INT8 QK^T, PV in bfloat16 (float32 where the CPU has none).

In: q, k, v with any strides, and an output to fill. Out: nothing; `out` is written. The kernel, its layouts and its
arithmetic are explained at the top of attention.cpp; it is built on first use. Seconds later the ops call it without
Python (ops.cpp), but for heads that 8 bits cannot hold.
"""

from __future__ import annotations

import ctypes
import struct

import torch

from sagecompile.formats import PROVIDERS
from sagecompile.kernels.check import check
from sagecompile.kernels.sdpa import sdpa

from .build import OPS_LIBRARY, function, why_not

__all__ = ["FORMATS", "MAX_HEAD_DIM", "attention", "exact_rows", "why_not"]

FORMATS = PROVIDERS["cpu"].formats
MAX_HEAD_DIM = 256

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_rows_of_exact_heads = 0


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    is_causal: bool,
    format: str,
    causal_offset: int = 0,
) -> None:
    """softmax(scale * q k^T) v into out, with key j visible to query i iff j <= i + causal_offset where causal.

    q, out: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D) with Hq a multiple of Hkv; 1 <= D <= 256; one dtype; any strides.
    """
    check(q, k, v, out, format, FORMATS, MAX_HEAD_DIM, causal_offset)
    if not q.is_cpu:
        raise ValueError(f"q {q.device}: need the CPU")
    OPS_LIBRARY.now()
    ahead = min(causal_offset, k.shape[2]) if is_causal else k.shape[2]
    sizes = (*q.shape, *k.shape[1:3], ahead, _DTYPES[q.dtype], torch.get_num_threads())
    strides = (*q.stride(), *k.stride(), *v.stride(), *out.stride())
    flags = ctypes.create_string_buffer(q.shape[0] * q.shape[1])
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    if function()(*pointers, struct.pack(f"{len(sizes) + len(strides)}q", *sizes, *strides), scale, flags) != 0:
        raise MemoryError(f"no memory for K {tuple(k.shape)} in 8 bits and V in 16 or 32")
    if any(flags.raw):
        heads = torch.frombuffer(flags, dtype=torch.uint8).view(q.shape[:2])
        _exact_heads(q, k, v, out, heads, scale, is_causal, causal_offset)


library = torch.library.Library("sagecompile", "FRAGMENT")
library.define(
    "exact_heads_in_python(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor flags, float scale, bool is_causal, "
    "int causal_offset) -> ()"
)


@torch.library.impl(library, "exact_heads_in_python", "CPU")
def _exact_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    flags: torch.Tensor,
    scale: float,
    is_causal: bool,
    causal_offset: int,
) -> None:
    """SDPA's own result for the heads that INT8 cannot hold, too steep, or with a NaN or Inf: flags (B, Hq) not 0."""
    global _rows_of_exact_heads
    b, h = flags.nonzero(as_tuple=True)
    _rows_of_exact_heads += len(h) * q.shape[2]
    kv_h = h // (q.shape[1] // k.shape[1])
    chosen = (x[None] for x in (q[b, h], k[b, kv_h], v[b, kv_h]))
    with torch.autocast("cpu", enabled=False):
        out[b, h] = sdpa(*chosen, scale=scale, is_causal=is_causal, causal_offset=causal_offset)[0]


def exact_rows() -> int:
    """How many rows of results were computed exactly since this was last asked.

    Some of a head that is exact as a whole count twice, where the kernel had begun with it.
    """
    global _rows_of_exact_heads
    rows, _rows_of_exact_heads = _rows_of_exact_heads + int(function().exact_rows()), 0
    return rows
