"""What prologues add to the time of attention, as a device's profile has it.

In: for each kind of prologue, of q and k alike, microseconds at some sizes: of Inductor's own kernels in front of SDPA,
and what a kernel takes longer that does it as it reads q and k. Out: the same at any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from sagecompile.site import AttentionSite

from .store import positive

NONE = "none"
"""The kind of a tensor that attention takes as it is."""
SDPA, COPY = "sdpa", "copy"
"""In front of SDPA: what Inductor takes, and what a copy would, the least that it can."""

Sizes = tuple[tuple[int, float], ...]
"""(heads of all sequences times tokens, microseconds), by rising sizes."""


class Making(NamedTuple):
    """What makes q and k (B, H, N, D) of a site."""

    q: str
    """Kind of q's prologue; `NONE` where nothing makes it."""
    k: str
    head_dim: int
    kv_share: float
    """KV heads for each head."""
    is_wide: bool
    """Of 32 bits, which are never measured."""

    @classmethod
    def of(cls, site: AttentionSite) -> Making | None:
        """None without prologues. Numbers of heads that are symbols are taken for equal."""
        if site.prologues is None:
            return None
        q, k = (made.kind for made in site.prologues)
        fixed = isinstance(site.heads, int) and isinstance(site.kv_heads, int)
        share = site.kv_heads / site.heads if fixed else 1.0
        return cls(q, k, site.head_dim, share, site.dtype == "float32")


@dataclass(frozen=True)
class PrologueCosts:
    """Of one device; empty where nobody measured."""

    added_us: Mapping[tuple[str, int], Mapping[str, Sizes]] = field(default_factory=dict)
    """By (kind, head_dim): for `SDPA`, `COPY` and each `format provider` that fuses it, of q and k together."""

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> PrologueCosts:
        """From a profile's JSON; ValueError, KeyError or TypeError where it is none."""

        def sizes(known: Iterable[Any]) -> Sizes:
            found = tuple((int(positive(size)), positive(us)) for size, us in known)
            if not found:
                raise ValueError("no sizes")
            return found

        return cls(
            {
                (row["kind"], row["head_dim"]): {name: sizes(known) for name, known in dict(row["size_us"]).items()}
                for row in stored["prologues"]
            }
        )

    def to_json(self) -> dict[str, Any]:
        """What `read` reads."""
        return {
            "prologues": [
                {"kind": kind, "head_dim": head_dim, "size_us": {name: _rounded(us) for name, us in by_name.items()}}
                for (kind, head_dim), by_name in self.added_us.items()
            ]
        }

    def know(self, making: Making, *names: str) -> bool:
        """Whether all that a site is made by was measured for each of these names."""
        kinds = [kind for kind in (making.q, making.k) if kind != NONE]
        return not making.is_wide and all(
            name in self.added_us.get((kind, making.head_dim), {}) for kind in kinds for name in names
        )

    def added(self, making: Making, name: str, heads: int, length: float) -> float:
        """Microseconds for `heads` heads of `length` tokens; only of what these `know`."""
        return sum(
            _at(self.added_us[kind, making.head_dim][name], heads * length * share) / 2
            for kind, share in ((making.q, 1.0), (making.k, making.kv_share))
            if kind != NONE
        )

    def beyond_a_copy(self, making: Making, heads: int, length: float) -> float:
        """How many microseconds longer than a copy of q and k Inductor takes; 0, the least, where that is not known."""
        if not self.know(making, SDPA, COPY):
            return 0.0
        sdpa, copy = (self.added(making, name, heads, length) for name in (SDPA, COPY))
        return max(0.0, sdpa - copy)


def _at(sizes: Sizes, size: float) -> float:
    """Straight lines in logarithms; beyond the largest proportional, below the smallest as there: the launches."""
    (smallest, least), (largest, most) = sizes[0], sizes[-1]
    if size <= smallest:
        return least
    if size >= largest:
        return most * size / largest
    (low, low_us), (high, high_us) = next(pair for pair in pairwise(sizes) if size < pair[1][0])
    weight = math.log(size / low) / math.log(high / low)
    return math.exp((1 - weight) * math.log(low_us) + weight * math.log(high_us))


def _rounded(sizes: Sizes) -> list[list[float]]:
    return [[size, float(f"{us:.3g}")] for size, us in sizes]
