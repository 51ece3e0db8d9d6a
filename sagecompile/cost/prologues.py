"""What prologues add to the time of attention: a device's profile says it in copies of the tensors that they make.

In: measured times of copies by their bytes, and for each kind of prologue how many copies it takes: in front of SDPA by
Inductor's own kernel, or in a kernel that does it as it reads q and k and takes longer for it. Out: microseconds at any
size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from sagecompile.site import AttentionSite

NONE = "none"
"""The kind of a tensor that attention takes as it is."""


class Making(NamedTuple):
    """What makes q and k (B, H, N, D) of a site."""

    q: str
    """Kind of q's prologue; `NONE` where nothing makes it."""
    k: str
    head_dim: int
    itemsize: int
    kv_share: float
    """KV heads for each head."""

    @classmethod
    def of(cls, site: AttentionSite) -> Making | None:
        """None without prologues. Numbers of heads that are symbols are taken for equal."""
        if site.prologues is None:
            return None
        q, k = (made.kind for made in site.prologues)
        fixed = isinstance(site.heads, int) and isinstance(site.kv_heads, int)
        share = site.kv_heads / site.heads if fixed else 1.0
        return cls(q, k, site.head_dim, 4 if site.dtype == "float32" else 2, share)


@dataclass(frozen=True)
class PrologueCosts:
    """Of one device; empty where nobody measured."""

    copy_us: tuple[tuple[int, float], ...] = ()
    """(bytes, microseconds) of a copy of a tensor of so many bytes, by rising bytes."""
    copies: Mapping[tuple[str, int], Mapping[str, float]] = field(default_factory=dict)
    """By (kind, head_dim): for `sdpa` and for each `format provider` that fuses it, how many copies it takes."""

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> PrologueCosts:
        """From a profile's JSON."""
        copies = {(row["kind"], row["head_dim"]): dict(row["copies"]) for row in stored["prologues"]}
        return cls(tuple((size, us) for size, us in stored["copy_us"]), copies)

    def to_json(self) -> dict[str, Any]:
        """What `read` reads."""
        rows = [
            {"kind": kind, "head_dim": head_dim, "copies": {name: round(times, 2) for name, times in by_name.items()}}
            for (kind, head_dim), by_name in self.copies.items()
        ]
        return {"copy_us": [[size, float(f"{us:.3g}")] for size, us in self.copy_us], "prologues": rows}

    def know(self, making: Making, name: str) -> bool:
        """Whether all that a site is made by was measured for `sdpa` or a `format provider`."""
        return bool(self.copy_us) and all(
            name in self.copies.get((kind, making.head_dim), {}) for kind in (making.q, making.k) if kind != NONE
        )

    def added_us(self, making: Making, name: str, heads: int, length: float) -> float:
        """To `name`'s time for `heads` heads of `length` tokens; only of what these `know`."""
        size = heads * length * making.head_dim * making.itemsize
        return sum(
            self.copies[kind, making.head_dim][name] * self.copy(size * share)
            for kind, share in ((making.q, 1.0), (making.k, making.kv_share))
            if kind != NONE
        )

    def copy(self, size: float) -> float:
        """Microseconds of a copy of `size` bytes: straight lines in logarithms, proportional beyond the largest."""
        (smallest, at_least), (largest, most) = self.copy_us[0], self.copy_us[-1]
        if size <= smallest:
            return at_least
        if size >= largest:
            return most * size / largest
        (low, low_us), (high, high_us) = next(pair for pair in pairwise(self.copy_us) if size < pair[1][0])
        weight = math.log(size / low) / math.log(high / low)
        return math.exp((1 - weight) * math.log(low_us) + weight * math.log(high_us))
