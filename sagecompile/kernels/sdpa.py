"""Torch's own attention where a kernel must give exactly that: the heads that INT8 cannot hold.

In: q (B, H, Nq, D), k and v (B, Hkv, Nk, D), and which keys a query sees. Out: what SDPA returns for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, is_causal: bool, causal_offset: int = 0
) -> torch.Tensor:
    """SDPA; where causal, query i sees the keys j <= i + causal_offset, by a mask if that is not SDPA's own i."""
    mask = None
    if is_causal and causal_offset > 0:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(causal_offset)
    grouped = q.shape[1] != k.shape[1]
    is_causal = is_causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
