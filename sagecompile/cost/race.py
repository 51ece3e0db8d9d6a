"""Run the alternatives to SDPA in turn with it, on random inputs of a site's shape, as they are in the graph.

In: a site, who can run it, and the ops. Out: what each takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from sagecompile.formats import PROVIDERS, fuses
from sagecompile.mask import CAUSAL
from sagecompile.site import AttentionSite, Prologue

from . import Alternative
from .profile import Time
from .prologues import SDPA
from .timer import interleaved_times

BUDGET_S = 0.05
"""Of the runs that are timed."""


class Ops(Protocol):
    """What is put into graphs: sagecompile.ops."""

    attention: Any
    qk_norm_rope_attention: Any

    def settle(self) -> None:
        """Wait until calls are what they will be from then on."""


def race(
    site: AttentionSite,
    alternatives: Sequence[Alternative],
    ops: Ops,
    budget_s: float = BUDGET_S,
    launches: Collection[str] | None = None,
) -> dict[str, Time]:
    """What each takes, run in turn: SDPA as `sdpa`, the alternatives as `format provider`.

    Where one of them does the prologues of q and k, the others get what these make: written again by a copy, which
    moves the bytes that Inductor's kernels for them must. That is the least they take; `beyond_a_copy_us` is the rest.
    `launches`: whose are timed, by default all.
    """
    fusing = fusing_of(site, alternatives)
    q, calls = _contestants(site, alternatives, fusing, ops)
    kept = _memory_at_hand(q) if site.device_type == "cpu" else None
    here = torch.cuda.device(site.device) if site.device_type == "cuda" else nullcontext()
    uncaptured = {" ".join(alternative) for alternative in alternatives if not PROVIDERS[alternative[1]].cuda_graphs}
    if launches is None or site.device_type == "cpu":
        ops.settle()
    with here, torch.autocast(site.device_type, enabled=False):
        times = interleaved_times(calls, site.device_type, budget_s, uncaptured, launches)
        if site.device_type == "cuda":
            torch.cuda.empty_cache()  # what the captured graphs had for themselves goes back
    del kept
    return times


def fusing_of(site: AttentionSite, alternatives: Iterable[Alternative]) -> list[Alternative]:
    """Which of them do the site's prologues."""
    return [which for which in alternatives if site.prologues and fuses(which, site.head_dim)]


def _contestants(
    site: AttentionSite, alternatives: Sequence[Alternative], fusing: Sequence[Alternative], ops: Ops
) -> tuple[torch.Tensor, dict[str, Callable[[], object]]]:
    """q, and the calls by name; `fusing`: who does the prologues."""
    generator = torch.Generator(site.device).manual_seed(0)  # its own: the user's random numbers stay as they are
    dtype = getattr(torch, site.dtype)
    scale = site.scale if site.scale is not None else site.head_dim**-0.5
    group = site.heads // site.kv_heads

    def tensor(heads: int, length: int) -> torch.Tensor:
        """The same numbers for all heads: making others would take longer than the race."""
        one = torch.randn((1, length, 1, site.head_dim), generator=generator, device=site.device).to(dtype)
        return one.repeat(site.batch, 1, heads, 1).transpose(1, 2)

    q = tensor(site.heads, site.q_len)
    k, v = tensor(site.kv_heads, site.kv_len), tensor(site.kv_heads, site.kv_len)
    # In float32 SDPA has no fast CUDA kernel for groups: models that repeat K and V themselves get one.
    repeats = group if site.device_type == "cuda" and site.dtype == "float32" else 1
    repeated = [x.repeat_interleave(repeats, 1) for x in (k, v)] if repeats > 1 else None
    q_prologue, k_prologue = site.prologues if site.prologues and fusing else (Prologue(), Prologue())
    fused = _fused_arguments(site, q_prologue, k_prologue, generator) if fusing else {}

    mask = None  # what SDPA takes for a causal one that is not its own
    if site.mask.ahead:
        mask = torch.ones(site.q_len, site.kv_len, dtype=torch.bool, device=site.device).tril(site.mask.ahead)

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        return q if q_prologue == Prologue() else q.clone(), k if k_prologue == Prologue() else k.clone()

    def sdpa() -> torch.Tensor:
        (their_q, their_k), their_v = made(), v
        if repeated:
            their_k, their_v = repeated
        how = {"attn_mask": mask, "is_causal": site.mask == CAUSAL, "scale": scale, "enable_gqa": group > repeats}
        return F.scaled_dot_product_attention(their_q, their_k, their_v, **how)

    def ours(format: str, provider: str) -> torch.Tensor:
        how = {"scale": scale, "ahead": site.mask.ahead, "tokens_first": True}
        how |= {"format": format, "provider": provider}
        if (format, provider) in fusing:
            return ops.qk_norm_rope_attention(q, k, v, **fused, **how)  # type: ignore[no-any-return]
        return ops.attention(*made(), v, **how)  # type: ignore[no-any-return]

    calls: dict[str, Callable[[], object]] = {SDPA: sdpa}
    calls |= {" ".join(alternative): partial(ours, *alternative) for alternative in alternatives}
    return q, calls


def _memory_at_hand(like: torch.Tensor) -> torch.Tensor:
    """Something to hold on to while results like this are made again and again on a CPU.

    It lies above a hole in the heap that they fit into. Without one, whether the C library gives their memory back to
    the system each time, to get new pages for it, depends on what the process did before; that takes up to as long as
    attention itself.
    """
    torch.empty_like(like)  # once freed, others of this size come from the heap
    hole = [torch.empty_like(like) for _ in range(4)]
    above = torch.empty_like(like)
    del hole
    return above


def _fused_arguments(
    site: AttentionSite, q_prologue: Prologue, k_prologue: Prologue, generator: torch.Generator
) -> dict[str, Any]:
    """Of qk_norm_rope_attention, on random numbers."""

    def random(dtype: str | None, *size: int) -> torch.Tensor | None:
        if dtype is None:
            return None
        return torch.rand(size, generator=generator, device=site.device).to(getattr(torch, dtype))

    length = site.q_len if q_prologue.table else site.kv_len
    tables = [random(q_prologue.table or k_prologue.table, 1, length, site.head_dim) for _ in range(2)]
    found: dict[str, Any] = dict(zip(("cos", "sin"), tables, strict=True))
    for name, prologue in (("q", q_prologue), ("k", k_prologue)):
        found[f"{name}_weight"] = random(prologue.weight, site.head_dim)
        found |= {f"{name}_eps": 1e-6 if prologue.norm else None, f"{name}_rope": prologue.rope}
    return found
