"""Quantization in plain torch: the specification that every kernel follows.

In: q, k or v (batch, heads, tokens, head_dim) in any float dtype. Out: the quantized values held in float32 (so that
products of INT8 values are exact: at most 127 * 127 * 256 < 2^24), and their float32 scales; value = quantized * scale.
Scheme: SageAttention, arXiv:2410.02367 (smoothed K, symmetric INT8); SageAttention2, arXiv:2411.10958 (FP8 V).
"""

from __future__ import annotations

import torch

INT8_MAX = 127.0
FP8_MAX = 448.0
"""Of float8_e4m3fn."""
K_BLOCK = 128
"""Tokens of K that share one scale."""
TINY = 1e-30
"""The least scale: an all-zero row divides by this."""

STEEPEST = 2.0**-6
"""The largest unit of an integer score, in powers of two of P, that INT8 is used for.

Rounding Q and K moves a score by up to some hundred units, so that above this (scores of more than about 200) weights
would be off by factors. A head with such scores is computed exactly, as one with a NaN or Inf is.
"""


def smooth_k(k: torch.Tensor) -> torch.Tensor:
    """K minus its mean over the tokens, float32: softmax does not see a vector that is added to every key."""
    k = k.float()
    return k - k.mean(-2, keepdim=True)


def int8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale a token: (B, H, N, D) -> (B, H, N, D), (B, H, N, 1)."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_min(TINY)
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX), scale


def int8_per_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale for each K_BLOCK tokens: (B, H, N, D) -> (B, H, N, D), (B, H, N, 1)."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True)
    blocks = [block.amax(-2, keepdim=True).expand_as(block) for block in amax.split(K_BLOCK, -2)]
    scale = (torch.cat(blocks, -2) / INT8_MAX).clamp_min(TINY)
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX), scale


def fp8(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float8_e4m3fn, held in float32."""
    return x.to(torch.float8_e4m3fn).float()


def fp8_per_channel(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 with one scale a channel: (B, H, N, D) -> (B, H, N, D), (B, H, 1, D)."""
    v = v.float()
    scale = (v.abs().amax(-2, keepdim=True) / FP8_MAX).clamp_min(TINY)
    return fp8((v / scale).clamp(-FP8_MAX, FP8_MAX)), scale
