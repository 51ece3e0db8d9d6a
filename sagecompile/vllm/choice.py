"""Whether one request's part of a batch is worth one of our kernels: `decide`, asked with lengths known on the host.

In: a layer's site, how many queries and keys the request has in this step. Out: Use or Keep. Nothing is measured in a
step: `auto` goes by the device's profile alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache

from sagecompile.decide import Decision, Keep, decide
from sagecompile.formats import PROVIDERS
from sagecompile.kernels import available
from sagecompile.settings import Settings, from_environment
from sagecompile.site import AttentionSite

LEAST_QUERIES = 64
"""Of a request, for a launch of its own; also more than any request that decodes has, with drafts."""

LAUNCHES_FLOPS = 5e11
"""Of a layer's matrix products for one request: the fastest GPU that was measured takes 0.6 ms for them, in which the
host launches attention and more."""

OVER_SDPA = {"cuda": 1.1, "cpu": 1.0}
"""How much faster vLLM's own attention is than SDPA, with which profiles compare: at most, FlashAttention-3 here."""

Choose = Callable[[int, int], Decision]
"""(q_len, kv_len) to what runs them."""


@cache
def settings() -> Settings:
    """The environment's, read once a process."""
    return from_environment()


def can_run(site: AttentionSite, format: str, provider: str) -> str | None:
    """Kernels are never in a CUDA graph here."""
    return available.refusal(site, format, provider, cuda_graphs=False)


def chooser(site: AttentionSite, ours: Settings) -> Choose:
    """For requests of a layer; the site's own lengths do not count."""

    wanted = replace(ours, min_speedup=ours.min_speedup * OVER_SDPA[site.device_type])

    @lru_cache(maxsize=1 << 14)
    def choose(q_len: int, kv_len: int) -> Decision:
        if q_len < LEAST_QUERIES:
            return Keep(f"{q_len} queries: needs at least {LEAST_QUERIES}")
        length = square(q_len, kv_len)

        def able(site: AttentionSite, format: str, provider: str) -> str | None:
            if kv_len != q_len and site.mask.is_causal and not PROVIDERS[provider].causal_offset:
                return f"{kv_len - q_len} cached tokens: {provider} has no causal offset"
            return can_run(site, format, provider)

        asked = replace(site, q_len=length, kv_len=length)
        return decide(asked, available.device(site.device), wanted, able, cuda_graphs=hides_launches(site, q_len))

    return choose


def hides_launches(site: AttentionSite, q_len: int) -> bool:
    """Whether the device is busy with the layer for so long that launches cost nothing, as in a CUDA graph.

    About 24 * hidden^2 operations a token: projections, and an MLP four times as wide as the heads together.
    """
    return site.device_type == "cuda" and 24.0 * q_len * (site.heads * site.head_dim) ** 2 >= LAUNCHES_FLOPS


def square(q_len: int, kv_len: int) -> int:
    """The length of the whole prompt that a chunk of one is like: with as much work for each token that is quantized.

    Profiles know whole prompts only. n queries on n keys are n^2 / 2 products for 3n tokens of q, k and v, that is
    n / 6 each; the last q_len of kv_len tokens are q_len * (kv_len - q_len / 2) for q_len + 2 * kv_len.
    """
    if q_len == kv_len:
        return q_len
    return 3 * q_len * (2 * kv_len - q_len) // (q_len + 2 * kv_len)
