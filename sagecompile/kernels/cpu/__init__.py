"""Quantized attention on x86 CPUs with AVX-512 VNNI: INT8 QK^T, PV in bfloat16 (float32 where the CPU has none).

In: a call, and an output to fill. Out: nothing; `out` is written. The kernel, its layouts and its
arithmetic are explained at the top of attention.cpp; it is built on first use. Seconds later the ops call it without
Python (ops.cpp), but for heads that 8 bits cannot hold.
"""

from __future__ import annotations

import math
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

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}


def refusal(site: AttentionSite, format: str, cuda_graphs: bool) -> str | None:
    """Why this CPU cannot run it, whatever the site; None if it can."""
    return why_not()


def attention(call: Call, out: torch.Tensor, *, format: str) -> None:
    """The call's result into out, (B, Hq, Nq, D) with any strides; 1 <= D <= 256."""
    check(call, out, format, FORMATS, MAX_HEAD_DIM, masks=True)
    q, k, v = call.q, call.k, call.v
    if not q.is_cpu:
        raise ValueError(f"q {q.device}: need the CPU")
    OPS_LIBRARY.now()
    ahead = k.shape[2] if call.ahead is None else min(call.ahead, k.shape[2])
    behind = q.shape[2] if call.behind is None else min(call.behind, q.shape[2])
    low, high = (None if x is None else x.expand(q.shape[0], q.shape[2]) for x in (call.low, call.high))
    mask = None if call.mask is None else call.mask.expand(*q.shape[:3], k.shape[2])
    sizes = [*q.shape, *k.shape[1:3], _DTYPES[q.dtype], torch.get_num_threads(), ahead, behind]
    sizes.append(0 if mask is None else _DTYPES[mask.dtype])
    for x in (q, k, v, out):
        sizes += x.stride()
    for bound in (low, high):
        sizes += (0, 0) if bound is None else bound.stride()
    sizes += (0, 0, 0, 0) if mask is None else mask.stride()
    pointers = (0 if x is None else x.data_ptr() for x in (q, k, v, out, low, high, mask))
    exact_rows = torch.zeros(q.shape[:2], dtype=torch.int64)
    tensors, numbers, name = struct.pack("7P", *pointers), struct.pack(f"{len(sizes)}q", *sizes), call.site.encode()
    if function()(tensors, numbers, call.scale, exact_rows.data_ptr(), name, len(name)) != 0:
        raise MemoryError(f"no memory for K {tuple(k.shape)} in 8 bits and V in 16 or 32")
    if exact_rows.min() < 0:
        _exact_heads(q, k, v, out, exact_rows, call.scale, call.ahead, call.behind, call.low, call.high, call.mask)


library = torch.library.Library("sagecompile", "FRAGMENT")
library.define(
    "exact_heads_in_python(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor exact_rows, float scale, int? ahead, "
    "int? behind, Tensor? low, Tensor? high, Tensor? mask) -> ()"
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
    behind: int | None,
    low: torch.Tensor | None,
    high: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """SDPA's own result for the heads that INT8 cannot hold, too steep, or with a NaN or Inf.

    exact_rows, int64: (B, Hq), below 0 for those heads.
    """
    b, h = (exact_rows < 0).nonzero(as_tuple=True)
    kv_h = h // (q.shape[1] // k.shape[1])
    whole = Call(q, k, v, scale, ahead, None, None, "", behind, low, high, mask)
    with torch.autocast("cpu", enabled=False):
        if whole.is_affine:
            out[b, h] = sdpa(Call(q[b, h][None], k[b, kv_h][None], v[b, kv_h][None], scale, ahead))[0]
            return
        joined = whole.joined_mask()
        assert joined is not None
        joined = joined.expand(*q.shape[:3], k.shape[2])
        for i, head, kv_head in zip(b.tolist(), h.tolist(), kv_h.tolist(), strict=True):  # a mask at a time
            group = slice(kv_head * q.shape[1] // k.shape[1], (kv_head + 1) * q.shape[1] // k.shape[1])
            one = (q[i, head], k[i, kv_head], v[i, kv_head])
            out[i, head] = _exact_head(*one, scale, joined[i, group], head - group.start)


HIDDEN = -9000.0
"""At most this, added to a score, hides its key: as in masks.h, which says why."""


def _exact_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, masks: torch.Tensor, head: int
) -> torch.Tensor:
    """SDPA's result for one head, (N, D), of the group with these masks (G, Nq, Nk).

    Keys that none of its queries sees influence nothing but rows that are hidden by numbers alone.
    """
    sees = masks if masks.dtype == torch.bool else ~(masks <= HIDDEN)
    unseen = ~sees.any(1).any(0)[:, None]
    mask = masks[head]
    out = sdpa(Call(*_alone(q, k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)), scale, mask=mask))[0, 0]
    if mask.dtype != torch.bool:
        literal = ~sees[head].any(-1) & (mask > -math.inf).any(-1)
        if literal.any():
            out[literal] = sdpa(Call(*_alone(q[literal], k, v), scale, mask=mask[literal]))[0, 0]
    return out


def _alone(*x: torch.Tensor) -> list[torch.Tensor]:
    return [one[None, None] for one in x]
