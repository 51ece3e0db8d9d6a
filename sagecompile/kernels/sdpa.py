"""Torch's own attention where a kernel must give exactly that: the heads that INT8 cannot hold.

In: a call without prologues. Out: what SDPA returns for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .call import Call


def sdpa(call: Call) -> torch.Tensor:
    """SDPA, by a mask where its `is_causal` does not say which keys queries see."""
    q, k, v = call.q, call.k, call.v
    mask = None
    if not call.is_affine:
        mask = call.joined_mask()
        if mask is not None and mask.dtype not in (torch.bool, q.dtype):  # SDPA would also take float32, but not all of it
            mask = mask.to(q.dtype) if q.dtype == torch.float64 else mask.float()
    elif call.ahead:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(call.ahead)
    is_causal, grouped = mask is None and call.ahead == 0, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=call.scale, enable_gqa=grouped)
