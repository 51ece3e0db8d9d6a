"""The one timer: medians of interleaved runs, so that a drift of the machine hits every alternative alike.

In: calls by name and the device they run on. Out: the median time of each in microseconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UPS = 3


def interleaved_median_us(
    calls: Mapping[str, Callable[[], object]],
    device_type: str,
    budget_s: float = 1.0,
    least_runs: int = 5,
    warm_ups: int = WARM_UPS,
) -> dict[str, float]:
    """Run the calls in turn until the budget is spent, `least_runs` times at the least; launch overhead counts.

    Every other round goes backwards, so that no call always runs in the caches and clocks that the same one left.
    """
    for call in calls.values():
        for _ in range(warm_ups):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget_s
    order = list(calls)
    while time.perf_counter() < end or len(times[order[0]]) < least_runs:
        for name in order:
            times[name].append(_one_run_us(calls[name], device_type))
        order.reverse()
    return {name: statistics.median(found) for name, found in times.items()}


def _one_run_us(call: Callable[[], object], device_type: str) -> float:
    if device_type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) * 1e3
