"""Quantized attention on x86 CPUs with AVX-512 VNNI: INT8 QK^T, PV in bfloat16 (float32 where the CPU has none).

In: a call, and an output to fill. Out: nothing; `out` is written. The kernel, its layouts and its
arithmetic are explained at the top of attention.cpp; it is built on first use. Seconds later the ops call it without
Python (ops.cpp), but for heads that 8 bits cannot hold.
"""

from __future__ import annotations

import struct

import torch

from sagecompile.formats import PROVIDERS
from sagecompile.kernels.call import Call
from sagecompile.kernels.check import check
from sagecompile.kernels.sdpa import sdpa
from sagecompile.site import AttentionSite

from .build import OPS_LIBRARY, function, why_not

__all__ = ["FORMATS", "MAX_HEAD_DIM", "attention", "refusal", "why_not"]

FORMATS, MAX_HEAD_DIM = PROVIDERS["cpu"].formats, PROVIDERS["cpu"].max_head_dim

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refusal(site: AttentionSite, format: str, cuda_graphs: bool) -> str | None:
    """Why this CPU cannot run it, whatever the site; None if it can."""
    return why_not()


def attention(call: Call, out: torch.Tensor, *, format: str) -> None:
    """The call's result into out, (B, Hq, Nq, D) with any strides; 1 <= D <= 256."""
    check(call, out, format, FORMATS, MAX_HEAD_DIM)
    q, k, v = call.q, call.k, call.v
    if not q.is_cpu:
        raise ValueError(f"q {q.device}: need the CPU")
    OPS_LIBRARY.now()
    ahead = k.shape[2] if call.ahead is None else min(call.ahead, k.shape[2])
    sizes = (*q.shape, *k.shape[1:3], ahead, _DTYPES[q.dtype], torch.get_num_threads())
    strides = (*q.stride(), *k.stride(), *v.stride(), *out.stride())
    exact_rows = torch.zeros(q.shape[:2], dtype=torch.int64)
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    numbers, name = struct.pack(f"{len(sizes) + len(strides)}q", *sizes, *strides), call.site.encode()
    if function()(*pointers, numbers, call.scale, exact_rows.data_ptr(), name, len(name)) != 0:
        raise MemoryError(f"no memory for K {tuple(k.shape)} in 8 bits and V in 16 or 32")
    if exact_rows.min() < 0:
        _exact_heads(q, k, v, out, exact_rows, call.scale, call.ahead)


library = torch.library.Library("sagecompile", "FRAGMENT")
library.define(
    "exact_heads_in_python(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor exact_rows, float scale, int? ahead) "
    "-> ()"
)


@torch.library.impl(library, "exact_heads_in_python", "CPU")
def _exact_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    exact_rows: torch.Tensor,
    scale: float,
    ahead: int | None,
) -> None:
    """SDPA's own result for the heads that INT8 cannot hold, too steep, or with a NaN or Inf.

    exact_rows, int64: (B, Hq), below 0 for those heads.
    """
    b, h = (exact_rows < 0).nonzero(as_tuple=True)
    kv_h = h // (q.shape[1] // k.shape[1])
    chosen = Call(q[b, h][None], k[b, kv_h][None], v[b, kv_h][None], scale, ahead)
    with torch.autocast("cpu", enabled=False):
        out[b, h] = sdpa(chosen)[0]
