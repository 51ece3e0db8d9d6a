"""Time the part of a transformer block that attention sits in: QK-norm, RoPE, the transposes, attention.

In: shapes; q, k, v as the projections leave them, (B, N, H, D). Out: for each shape, inductor against sage_inductor.
Here is what a kernel called alone does not show: strided inputs, and what Inductor makes of the code around it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .compiled import compile_each, rows
from .measure import measure, or_left_out, relative_error
from .session import captures_graphs, device_of, results
from .shapes import HEADER, Shape, inputs, shapes

ROPE_BASE = 10000.0


class Block(nn.Module):
    """q, k, v: (B, N, H, D) to (B, N, H * D), what the output projection takes."""

    def __init__(self, head_dim: int, rope: str, is_causal: bool, norm: bool = True) -> None:
        super().__init__()
        self.q_norm, self.k_norm = (nn.RMSNorm(head_dim) if norm else nn.Identity() for _ in range(2))
        self.rope, self.is_causal = rope, is_causal

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        q, k = self.prologues(q, k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=self.is_causal)
        return out.transpose(1, 2).flatten(2)

    def prologues(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k (B, N, H, D) to what attention takes, (B, H, N, D)."""
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope == "half":
            return tuple(rotate_halves(x.transpose(1, 2), cos, sin) for x in (q, k))  # type: ignore[return-value]
        return tuple(rotate_pairs(x, cos, sin).transpose(1, 2) for x in (q, k))  # type: ignore[return-value]


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As Transformers' Llama does: x (B, H, N, D), cos and sin (1, N, D) in x's dtype; channel i turns with i + D/2."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    middle = x.shape[-1] // 2
    turned = torch.cat((-x[..., middle:], x[..., :middle]), dim=-1)
    return x * cos + turned * sin


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As diffusers' Flux does: x (B, N, H, D), cos and sin (N, D) in float32; channel 2i turns with 2i + 1."""
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def angles(length: int, head_dim: int, rope: str, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """cos and sin as the model of that `rope` keeps them, see `rotate_halves` and `rotate_pairs`."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    turns = torch.outer(torch.arange(length, device=device).float(), frequencies)  # (N, D / 2)
    if rope == "half":
        turns = torch.cat((turns, turns), dim=-1)[None]
        return {"cos": turns.cos().to(dtype), "sin": turns.sin().to(dtype)}
    turns = turns.repeat_interleave(2, dim=-1)
    return {"cos": turns.cos(), "sin": turns.sin()}


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments)
    graph = captures_graphs(arguments, device)
    with results(arguments, device) as found, torch.no_grad():
        print(f"{HEADER}  {'what':24} {'us':>10} {'ratio':>6} {'error':>7} timed  decisions")
        for shape in shapes(arguments, device):
            with or_left_out(str(shape)):
                for row in time_block(shape, arguments.rope, device, graph, arguments.reference, arguments.seconds):
                    found["rows"].append(row)
                    print(_render(shape, row), flush=True)
    return 0


def time_block(
    shape: Shape, rope: str, device: torch.device, graph: bool, reference: bool, budget_s: float
) -> Iterator[dict[str, Any]]:
    """One row a backend and its options; the error is against the same block in float32, eager."""
    q, k, v = inputs(shape, device, tokens_first=True)

    def arguments(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        cast = {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))}
        return cast | angles(shape.length, shape.head_dim, rope, dtype, device)

    torch.manual_seed(0)
    block = Block(shape.head_dim, rope, shape.is_causal).to(device)
    for weight in block.parameters():
        nn.init.normal_(weight, 1.0, 0.1)
    exact = block(**arguments(torch.float32))
    ways = compile_each(block.to(q.dtype), arguments(q.dtype), reference, graph=graph)
    calls = {name: way.call for name, way in ways.items()}
    measured = measure(calls, device, graph, lambda out: relative_error(out, exact), budget_s=budget_s)
    for row in rows(ways, measured):
        yield shape.to_dict() | {"rope": rope} | row


def _render(shape: Shape, row: dict[str, Any]) -> str:
    figures = f"{row['us']:10.1f} {row['ratio_to_inductor']:6.2f} {row['error']:7.4f}"
    return f"{shape}  {row['what']:24} {figures} {row['timed']}  {row['decisions']}"
