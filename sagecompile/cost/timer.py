"""The one timer: interleaved runs, so that a drift of the machine hits every alternative alike.

In: calls by name and the device they run on. Out: for each what it takes the device, and what its launch takes the
host, in microseconds. On a GPU the first is timed as replays of a CUDA graph, where launches cost
nothing; the second matters outside of graphs, and only where it is the longer of the two: a host that launches faster
than the device works is never waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .profile import Time

WARM_UPS = 3
REPLAY_US, MOST_CALLS = 1000.0, 64
"""A graph holds as many calls in a row as take about this long, at most that many: its launch is shared by them."""
MOST_WAITED = 0.25
"""Seconds in one of `waited_s` on a CPU that is not busy: others at work show as a half or more, none as a tenth."""
LEAST_LAUNCHES, MOST_LAUNCHES, LAUNCHES_S = 8, 15, 0.02
"""How often a launch is timed, and about for how long."""


def interleaved_times(
    calls: Mapping[str, Callable[[], object]],
    device_type: str,
    budget_s: float,
    uncaptured: Collection[str] = (),
    launches: Collection[str] | None = None,
) -> dict[str, Time]:
    """Of every call, at least three runs; on the current device, if that is a GPU.

    `uncaptured`: what is never captured in a CUDA graph; its launch counts fully. `launches`: whose are timed, by
    default all; those of others are 0. On a CPU the lower quartile stands for the median: what else runs there only
    slows.
    """
    if device_type != "cuda":
        runs = _interleaved_us(calls, device_type, budget_s, least_runs=3, warm_ups=1)
        return {name: Time(sorted(us)[len(us) // 4]) for name, us in runs.items()}
    hosts = _launches_us(calls, calls if launches is None else launches)
    found = {name: Replays(call, 1, None) if name in uncaptured else replayed(call) for name, call in calls.items()}
    replays = {name: replayed.run for name, replayed in found.items()}
    times = interleaved_median_us(replays, device_type, budget_s, least_runs=3, warm_ups=1)
    return {name: Time(us / found[name].calls, hosts[name]) for name, us in times.items()}


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
    runs = _interleaved_us(calls, device_type, budget_s, least_runs, warm_ups)
    return {name: statistics.median(us) for name, us in runs.items()}


def _interleaved_us(
    calls: Mapping[str, Callable[[], object]], device_type: str, budget_s: float, least_runs: int, warm_ups: int
) -> dict[str, list[float]]:
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
    return times


def waited_s() -> float:
    """Seconds that the threads of this process, all added up, were ready to run while others had the CPU.

    From Linux's scheduler statistics, the second number of a thread's `schedstat`; 0 where there are none.
    """
    found = 0
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError, IndexError):  # it may have ended since
            found += int((thread / "schedstat").read_text().split()[1])
    return found / 1e9


class Replays(NamedTuple):
    """A CUDA graph with some calls in a row."""

    run: Callable[[], object]
    calls: int
    result: Any
    """What the last of them returned, which a run writes again."""


def replayed(call: Callable[[], Any], device_type: str = "cuda") -> Replays:
    """The call in a CUDA graph, as often as REPLAY_US asks for. It must have run before.

    Raises what the call raises, RuntimeError for what no graph can hold.
    """
    once = _capture(call, 1)
    us = interleaved_median_us({"one": once.run}, device_type, budget_s=0.0, least_runs=3, warm_ups=1)["one"]
    calls = max(1, min(MOST_CALLS, int(REPLAY_US / us)))
    return once if calls == 1 else _capture(call, calls)


_failed: list[torch.cuda.CUDAGraph] = []
"""Torch's allocator keeps asking a graph whose capture failed: it must stay alive."""


def _capture(call: Callable[[], Any], calls: int) -> Replays:
    """Unlike in torch.cuda.graph, other threads may allocate meanwhile, and no memory goes back to the driver."""
    stream, graph = _side_stream(torch.cuda.current_device()), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(calls):
                result = call()
        finally:
            try:
                graph.capture_end()
            except Exception:
                _failed.append(graph)
                raise
    torch.cuda.current_stream().wait_stream(stream)
    return Replays(graph.replay, calls, result)


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Captures are on a stream of their own: torch hands out the same few to everybody."""
    return torch.cuda.Stream(device, priority=-1)


def _launches_us(calls: Mapping[str, Callable[[], object]], timed: Collection[str]) -> dict[str, float]:
    """Of the host alone, each into an empty queue, in turn; the fastest, as what else it does only slows.

    All run twice before, which may compile and plan, and must have happened before a capture. None follows itself,
    if there are two: in its own caches it would be faster.
    """
    for call in calls.values():
        for _ in range(2):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.perf_counter() + LAUNCHES_S * len(calls), 0
    first, *others = calls
    while timed and (rounds < LEAST_LAUNCHES or (rounds < MOST_LAUNCHES and time.perf_counter() < end)):
        for name in (first, *others):
            torch.cuda.synchronize()
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e6)
        others.reverse()
        rounds += 1
    torch.cuda.synchronize()
    return {name: min(us) if name in timed else 0.0 for name, us in times.items()}


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
