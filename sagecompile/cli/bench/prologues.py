"""Time what Inductor makes of a QK-norm and RoPE, against a copy of q and k, which moves the same bytes.

In: a kind of prologue and the sizes of q and k. Out: how many times as long it takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._inductor.utils import fresh_cache

from sagecompile.cost.timer import interleaved_times
from sagecompile.site import Prologue

from .block import Block, angles
from .compiled import compiled_apart

COMPILED = 2
"""How often Inductor compiles it. The faster counts: now and then its choice among its own kernels is a bad one."""


def copies_by_inductor(device: torch.device, prologue: Prologue, heads: int, tokens: int, head_dim: int) -> float:
    """In bfloat16; at least 1. On a GPU of the kernels alone, without launches."""
    dtype = torch.bfloat16
    q, k = (torch.randn((1, tokens, heads, head_dim), device=device, dtype=dtype) for _ in range(2))
    make = Block(head_dim, prologue.rope, is_causal=False, norm=prologue.norm).to(device, dtype).prologues
    inputs = {"q": q, "k": k} | angles(tokens, head_dim, prologue.rope, dtype, device)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: (q.clone(), k.clone())}
    for i in range(COMPILED):
        calls[str(i)] = compiled_apart(make, inputs, {})
        with fresh_cache():
            calls[str(i)]()
    copy, *compiled = (time.device for time in interleaved_times(calls, device.type, 0.05, launches=()).values())
    return max(1.0, min(compiled) / copy)


def copy_us(device: torch.device, size: int) -> float:
    """Of so many bytes."""
    call = torch.zeros(size, dtype=torch.uint8, device=device).clone
    return interleaved_times({"copy": call}, device.type, 0.01, launches=())["copy"].device
