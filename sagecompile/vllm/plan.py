"""How one batch is split: which requests go to our kernels, one launch each, and which stay with vLLM.

In: the lengths of each request, which vLLM has on the host. Out: a Plan, or None where all stay. A launch of its own
for each request, so that smoothing is its own and no output depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sagecompile.decide import Use

from .choice import LEAST_QUERIES, Choose


@dataclass(frozen=True)
class Part:
    """One request for one of our kernels: tokens [start, start + q_len) of the batch, its row of the block table."""

    row: int
    start: int
    q_len: int
    kv_len: int
    use: Use


@dataclass(frozen=True)
class Rest:
    """What stays with vLLM in a batch that is split."""

    rows: Any
    """The requests, as an index tensor on the device."""
    tokens: Any
    """Their tokens in the packed tensors, likewise."""
    metadata: Any
    """vLLM's own, of these requests alone."""


@dataclass(frozen=True)
class Plan:
    """Of one batch, for the layers of one attention group."""

    parts: tuple[Part, ...]
    rest: Rest | None
    """None: the whole batch is ours."""
    layers: frozenset[str]
    """Those that our kernels do; the others go by vLLM's metadata of the whole batch."""
    is_causal: bool


def parts_of(starts: Sequence[int], kv_lens: Sequence[int], prefills: Sequence[bool], choose: Choose) -> list[Part]:
    """The requests for our kernels; `starts` has one more than there are requests, the number of tokens."""
    found = []
    for row, ((start, end), kv_len, prefill) in enumerate(zip(pairwise(starts), kv_lens, prefills, strict=True)):
        if prefill and end - start >= LEAST_QUERIES:
            decision = choose(end - start, kv_len)
            if isinstance(decision, Use):
                found.append(Part(row, start, end - start, kv_len, decision))
    return found
