"""Time calls against each other, each beside the error of what it returned; one that fails is said and left out.

In: calls by name and how an error is measured. Out: a Measurement for each that ran, medians of interleaved runs.
With `graph` a call is captured in a CUDA graph, and the result of a replay is what is checked: a kernel that launches
on another stream than the current one is not in the graph, and the replay shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sagecompile import ops
from sagecompile.cost.timer import interleaved_median_us, replayed

Call = Callable[[], Any]
"""What is timed; returns a tensor where its error is measured."""
Error = Callable[[torch.Tensor], float]


@dataclass(frozen=True)
class Measurement:
    """Of one call."""

    us: float
    error: float | None
    timed: str
    """`graph`: replays without launches; `eager`: with them."""


@dataclass(frozen=True)
class _Run:
    run: Call
    calls: int
    """How many calls one run stands for."""
    error: float | None
    timed: str


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    graph: bool,
    error: Error | None = None,
    eager_only: Collection[str] = (),
    budget_s: float = 1.0,
) -> dict[str, Measurement]:
    """Every call that runs; `eager_only` names those that must not be captured. The timing takes about `budget_s`."""
    runs: dict[str, _Run] = {}
    for name, call in calls.items():
        with or_left_out(name):
            found = _error_of(call, error, device)
            runs[name] = _Run(call, 1, found, "eager")
        if graph and name in runs and name not in eager_only:
            with or_left_out(name, "timed eagerly, it cannot be captured in a CUDA graph"):
                runs[name] = _captured(call, error, found, device.type)
    if not runs:
        return {}
    ops.settle()
    times = interleaved_median_us({name: run.run for name, run in runs.items()}, device.type, budget_s)
    return {name: Measurement(times[name] / run.calls, run.error, run.timed) for name, run in runs.items()}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64."""
    wide = expected.double()
    return float((actual.double() - wide).norm() / wide.norm())


@contextmanager
def or_left_out(name: str, what: str = "left out") -> Iterator[None]:
    """Whatever one contestant raises is said in one line, and the others run."""
    try:
        yield
    except Exception as failure:
        say(name, f"{what}: {in_one_line(failure)}")


def say(name: str, text: str) -> None:
    """One line about a contestant, between the rows of the table."""
    print(f"  {name}: {text}", flush=True)


def in_one_line(failure: Exception, most: int = 200) -> str:
    """`Type: text`, cut where it gets long."""
    text = " ".join(str(failure).split()) or "no message"
    return f"{type(failure).__name__}: {text if len(text) <= most else text[:most] + ' ...'}"


def _error_of(call: Call, error: Error | None, device: torch.device) -> float | None:
    """Of a first call, once it is through."""
    result = call()
    found = error(result) if error else None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found


def _captured(call: Call, error: Error | None, expected: float | None, device_type: str) -> _Run:
    """The call in a CUDA graph. ValueError if a replay does not write what the call returns: NaN is put there first."""
    run, calls, result = replayed(call, device_type)
    if error is None or expected is None:
        return _Run(run, calls, None, "graph")
    result.fill_(float("nan"))
    run()
    found = error(result)
    if not found <= 2 * expected + 1e-3:  # also where it is NaN
        raise ValueError(f"a replay has error {found:.3g}, a call {expected:.3g}")
    return _Run(run, calls, found, "graph")
