"""What stands between a projection and attention, for kernels that do it as they read Q or K: RMSNorm, then RoPE.

In: a tensor (B, H, N, D) as the projection leaves it. Out: what attention multiplies. The computation is in float32,
without the rounding to 16 bits that the same lines outside a kernel make between their steps.
RoPE: Su et al., RoFormer, arXiv:2104.09864; RMSNorm: Zhang and Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sagecompile import site

ROPES = ("none", "half", "interleaved")
"""Which channel turns with channel i: none; i + D/2 (Transformers' Llama); the other of (2i, 2i + 1) (diffusers)."""


@dataclass(frozen=True)
class Prologue:
    """Of Q or of K: x / sqrt(mean(x^2) + eps) * weight over each head, then x * cos + turned(x) * sin."""

    eps: float | None = None
    """None: no norm."""
    weight: torch.Tensor | None = None
    """(D,), any floating dtype; None: ones."""
    rope: str = "none"
    """One of `ROPES`."""
    cos: torch.Tensor | None = None
    """(1 or B, N, D), any floating dtype, of the tokens of the tensor; with `rope` only. So is `sin`."""
    sin: torch.Tensor | None = None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, H, N, D) to the same in float32: the specification."""
        x = x.float()
        if self.eps is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            x = x if self.weight is None else x * self.weight.float()
        if self.rope == "none":
            return x
        assert self.cos is not None and self.sin is not None
        return x * self.cos.float().unsqueeze(1) + turned(x, self.rope) * self.sin.float().unsqueeze(1)


def table_strides(x: torch.Tensor) -> tuple[int, int]:
    """Of cos or sin, between sequences and between tokens; 0 where there is one."""
    batch, token = (stride if length > 1 else 0 for length, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
    return batch, token


def example(
    kind: site.Prologue, tokens: int, head_dim: int, generator: torch.Generator, where: torch.device
) -> Prologue:
    """A prologue of this kind on random numbers of the CPU's `generator`."""

    def on_device(x: torch.Tensor, dtype: str | None) -> torch.Tensor | None:
        return None if dtype is None else x.to(where, getattr(torch, dtype))

    weight = on_device(0.5 + torch.rand(head_dim, generator=generator), kind.weight)
    turns = 6.3 * torch.rand((1, tokens, head_dim), generator=generator)
    cos, sin = on_device(turns.cos(), kind.table), on_device(turns.sin(), kind.table)
    return Prologue(1e-6 if kind.norm else None, weight, kind.rope, cos, sin)


def turned(x: torch.Tensor, rope: str) -> torch.Tensor:
    """Each channel's partner, negated in the first of the two."""
    if rope == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), -1).flatten(-2)
