"""The check in front of every kernel of our own: what a launcher may be given.

In: a call, its output, and what the provider runs. Out: nothing, or ValueError with what was given and what is needed.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from .call import Call

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(
    call: Call, out: torch.Tensor, format: str, formats: Collection[str], max_head_dim: int, masks: bool = False
) -> None:
    """q, out: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D) with Hq a multiple of Hkv; one dtype, one device; nothing empty.

    masks: whether the provider takes what of a mask is not `ahead`.
    """
    q, k, v = call.q, call.k, call.v
    if format not in formats:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(formats)}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or out.shape != q.shape:
        named = zip(("q", "k", "v", "out"), (q, k, v, out), strict=True)
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named)
        raise ValueError(f"{shapes}: q and out must be (B, Hq, Nq, D), k and v (B, Hkv, Nk, D)")
    given = f"q {tuple(q.shape)} and k {tuple(k.shape)}"
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{given}: B and D must be equal and Hq a multiple of Hkv")
    if min(q.shape) < 1 or k.shape[2] < 1 or q.shape[3] > max_head_dim:
        raise ValueError(f"{given}: every size must be at least 1, and D at most {max_head_dim}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype == out.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}, out {out.dtype}: need one of {DTYPES} for all four")
    if call.ahead is not None and call.ahead < 0:
        raise ValueError(f"ahead {call.ahead}: must be at least 0")
    if not q.device == k.device == v.device == out.device:
        raise ValueError(f"q {q.device}, k {k.device}, v {v.device}, out {out.device}: need one device")
