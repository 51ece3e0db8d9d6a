"""Cut one head's rows of Q into the tiles that attention.cu's blocks take in turn, see Work there.

In: how many rows, heads and warpgroups, how many blocks run at once. Out: a Cut. Tiles of all warpgroups' rows are the
most efficient, but the last round of them is rarely full: smaller ones at the end fill it better.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple


class Cut(NamedTuple):
    """How one head's rows of Q become tiles: `whole` ones of all consumers' rows, then smaller ones."""

    tiles: int
    whole: int
    tail_rows: int


FEW_ROUNDS = 32
# A tile of 1, 2 or 3 warpgroups' rows takes about so much of the time of a whole one, as measured on one H200: fewer
# warpgroups have the tensor cores and the special-function units for themselves.
_COSTS = {2: (0.96, 1.0), 3: (0.63, 0.79, 1.0)}


def even(q_len: int, consumers: int) -> Cut:
    """Whole tiles, of which the last one may have fewer rows."""
    rows = 64 * consumers
    return Cut(-(-q_len // rows), q_len // rows, rows)


@lru_cache(4096)
def cut_rows(q_len: int, heads: int, consumers: int, processors: int) -> Cut:
    """The cut with which the last block is done first, by simulating how tiles go round over the blocks.

    Of more than FEW_ROUNDS rounds the last one is not worth the simulation.
    """
    rows = 64 * consumers
    if heads * -(-q_len // rows) > FEW_ROUNDS * processors:
        return even(q_len, consumers)
    costs = _COSTS[consumers]
    best, best_time = even(q_len, consumers), math.inf
    most = q_len // rows
    for whole in range(most, max(-1, most - 6), -1):
        rest = q_len - whole * rows
        for units in range(consumers, 0, -1) if rest else (consumers,):
            tails = -(-rest // (64 * units))
            left = -(-rest // 64)  # warpgroups' rows in all tails of a head
            tail_costs = [costs[min(units, left - i * units) - 1] for i in range(tails)]
            times = _finish(heads * whole, tail_costs, heads, processors)
            if times < best_time - 1e-9:
                best, best_time = Cut(whole + tails, whole, 64 * units), times
    return best


def _finish(whole: int, tail_costs: list[float], heads: int, processors: int) -> float:
    """When the last of `processors` blocks is done: tile i goes to block i % processors, whole ones (cost 1) first."""
    busy = [float(whole // processors + (i < whole % processors)) for i in range(processors)]
    for i in range(heads * len(tail_costs)):
        busy[(whole + i) % processors] += tail_costs[i % len(tail_costs)]
    return max(busy)
