"""The shapes of the attention and block benchmarks, and the inputs of one.

In: --lengths, --head-dims, --heads, --tokens, --dtypes. Out: a Shape for each combination, causal and not; q, k and v.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from sagecompile.mask import ALL, CAUSAL
from sagecompile.site import AttentionSite

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

HEADER = f"{'dtype':8} {'head_dim':>8} {'causal':>6} {'length':>6} {'batch':>5}"
GPU_HIDDEN, GPU_TOKENS, CPU_HEADS = 2048, 16384, 8
"""Where --heads and --tokens do not say: heads * head_dim and batch * length on a GPU; on a CPU one sequence."""


@dataclass(frozen=True)
class Shape:
    """Of self-attention with as many queries as keys."""

    dtype: str
    head_dim: int
    is_causal: bool
    length: int
    batch: int
    heads: int

    @property
    def flops(self) -> float:
        """As AttentionSite's."""
        return self.site(torch.device("cpu")).flops

    def __str__(self) -> str:
        causal = "yes" if self.is_causal else "no"
        return f"{self.dtype:8} {self.head_dim:8} {causal:>6} {self.length:6} {self.batch:5}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def site(self, device: torch.device) -> AttentionSite:
        """As formats and providers are asked about it."""
        sizes = (self.batch, self.heads, self.heads, self.length, self.length, self.head_dim, self.head_dim)
        return AttentionSite("bench", "", "sdpa", *sizes, self.dtype, str(device), CAUSAL if self.is_causal else ALL)


def shapes(arguments: argparse.Namespace, device: torch.device) -> Iterator[Shape]:
    """Every combination, lengths fastest."""
    on_gpu = device.type == "cuda"
    for dtype, head_dim, is_causal, length in product(
        arguments.dtypes, arguments.head_dims, (False, True), arguments.lengths
    ):
        heads = arguments.heads or (max(1, GPU_HIDDEN // head_dim) if on_gpu else CPU_HEADS)
        tokens = arguments.tokens or (GPU_TOKENS if on_gpu else length)
        yield Shape(dtype, head_dim, is_causal, length, max(1, tokens // length), heads)


def inputs(shape: Shape, device: torch.device, tokens_first: bool = False) -> QKV:
    """q, k, v: N(0,1), k with a bias of 3 on every channel; (B, H, N, D), or (B, N, H, D) if `tokens_first`."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    size, bias_size = (shape.batch, shape.heads, shape.length, shape.head_dim), (1, shape.heads, 1, shape.head_dim)
    q, k, v = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(3))
    k += 3 * torch.randn(bias_size, generator=generator, device=device).to(dtype)
    if tokens_first:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return q, k, v
