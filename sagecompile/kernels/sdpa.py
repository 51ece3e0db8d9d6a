"""Torch's own attention where a kernel must give exactly that: the heads that INT8 cannot hold.

In: a call without prologues. Out: what SDPA returns for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .call import Call


def sdpa(call: Call) -> torch.Tensor:
    """SDPA, by a mask where queries see more than its `is_causal` lets them."""
    q, k, v = call.q, call.k, call.v
    mask = None
    if call.ahead:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(call.ahead)
    is_causal, grouped = call.ahead == 0, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=call.scale, enable_gqa=grouped)
