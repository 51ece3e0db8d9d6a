"""What this very machine says of a shape that no profile covers: measured while compiling, once, and then remembered.

In: a site, and who could run it. Out: a Prediction for each from a race against SDPA on random inputs of the site's
shape, or the reason why there was none. It takes tenths of a second and a bounded amount of memory.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from sagecompile.site import AttentionSite

from . import Alternative, Prediction, store
from .profile import SDPA, Time, speedup
from .timer import interleaved_times

FLOPS = {"cpu": 2e9, "cuda": 2e12}
"""Of one call, about: milliseconds. A larger site is measured on fewer sequences and heads."""
LEAST_HEADS = {"cpu": 8, "cuda": 128}
"""That it is never measured on fewer than, where it has as many, so that all processors have work."""
LONGEST = 8
"""How many times `FLOPS` a call of the least heads may have; beyond it nothing is measured."""
MEMORY = 1 << 29
"""Bytes of q, k, v and the outputs."""
BUDGET_S = 0.05

Attention = Callable[..., Any]
"""What is put into graphs: torch.ops.sagecompile.attention."""


@dataclass(frozen=True)
class Local:
    """One device of this machine, and how graphs run on it."""

    machine: Mapping[str, Any]
    """What a measurement holds for: device, driver, versions, threads."""
    attention: Attention
    cuda_graphs: bool
    """Whether what is compiled is captured in a CUDA graph, where launches cost nothing."""

    def recall(self, site: AttentionSite) -> dict[Alternative, Prediction]:
        """What was measured of such a site before, here or in another process."""
        found = store.recall(self.key(site)) if _has_fixed_sizes(site) else None
        if found is None:
            return {}
        basis = f"measured here at {found['shape']}, {found['date']}"
        raced = {name: (Time(*sdpa), Time(*ours)) for name, (sdpa, ours) in found["times"].items()}
        return {_split(name): Prediction(speedup(times, self.cuda_graphs), basis) for name, times in raced.items()}

    def measure(self, site: AttentionSite, alternatives: Sequence[Alternative]) -> dict[Alternative, Prediction] | str:
        """Race the alternatives against SDPA now, or say why not."""
        if not _has_fixed_sizes(site):
            return "sizes that change are not measured while compiling"
        if site.device_type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "not measured while a CUDA graph is captured"
        smaller = _shrink(site, len(alternatives))
        if smaller.flops > LONGEST * FLOPS[site.device_type]:
            return f"{site.q_len} x {site.kv_len} tokens take too long to measure while compiling"
        if _bytes(smaller, len(alternatives)) > MEMORY:
            return f"{_bytes(smaller, len(alternatives)) >> 20} MiB are too many to measure while compiling"
        try:
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                times = race(smaller, alternatives, self.attention)
        except Exception as failure:  # whatever a kernel or the device raises, the model must still compile
            return f"measuring failed: {type(failure).__name__}: {failure}"
        raced = {name: (times[SDPA], time) for name, time in times.items() if name != SDPA}
        before = store.recall(self.key(site)) or {"times": {}}
        found = {"shape": smaller.shape, "date": _today(), "times": before["times"] | raced}
        store.remember(self.key(site), found)
        return self.recall(site)

    def key(self, site: AttentionSite) -> dict[str, Any]:
        """What a measurement of such a site is kept under."""
        names = "batch heads kv_heads q_len kv_len head_dim dtype is_causal".split()
        return dict(self.machine) | {name: getattr(site, name) for name in names}


def race(
    site: AttentionSite, alternatives: Sequence[Alternative], attention: Attention, budget_s: float = BUDGET_S
) -> dict[str, Time]:
    """Medians of SDPA and of each alternative, in turn, as `sdpa` and `format provider`."""
    generator = torch.Generator(site.device).manual_seed(0)  # its own: the user's random numbers stay as they are
    dtype = getattr(torch, site.dtype)
    scale = site.scale if site.scale is not None else site.head_dim**-0.5

    def tensor(heads: int, length: int) -> torch.Tensor:
        size = (site.batch, length, heads, site.head_dim)
        return torch.randn(size, generator=generator, device=site.device).to(dtype).transpose(1, 2)

    q = tensor(site.heads, site.q_len)
    k, v = tensor(site.kv_heads, site.kv_len), tensor(site.kv_heads, site.kv_len)
    grouped = site.heads != site.kv_heads

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=site.is_causal, scale=scale, enable_gqa=grouped)

    def ours(format: str, provider: str) -> torch.Tensor:
        how = {"scale": scale, "is_causal": site.is_causal, "tokens_first": True}
        return attention(q, k, v, format=format, provider=provider, **how)  # type: ignore[no-any-return]

    calls: dict[str, Callable[[], object]] = {SDPA: sdpa}
    calls |= {" ".join(alternative): partial(ours, *alternative) for alternative in alternatives}
    with torch.autocast(site.device_type, enabled=False):
        return interleaved_times(calls, site.device_type, budget_s)


def _split(name: str) -> Alternative:
    format, provider = name.split(" ")
    return format, provider


def _has_fixed_sizes(site: AttentionSite) -> bool:
    sizes = (site.batch, site.heads, site.kv_heads, site.q_len, site.kv_len, site.head_dim)
    return all(isinstance(size, int) for size in sizes)


def _bytes(site: AttentionSite, alternatives: int) -> int:
    size = 4 if site.dtype == "float32" else 2
    queries, keys = site.heads * site.q_len, site.kv_heads * site.kv_len
    return int(site.batch * site.head_dim * size * ((2 + alternatives) * queries + 2 * keys))


def _shrink(site: AttentionSite, alternatives: int) -> AttentionSite:
    """With as many KV heads and sequences as FLOPS and MEMORY allow, LEAST_HEADS at the least; groups stay whole."""
    group = site.heads // site.kv_heads
    all_groups = site.batch * site.kv_heads
    least = -(-LEAST_HEADS[site.device_type] // group)
    share = min(FLOPS[site.device_type] / site.flops, MEMORY / _bytes(site, alternatives))
    groups = min(all_groups, max(least, int(all_groups * share)))
    kv_heads = min(groups, site.kv_heads)
    return replace(site, batch=max(1, groups // kv_heads), kv_heads=kv_heads, heads=kv_heads * group)


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
