"""A device's profile: how long SDPA and its alternatives took on a grid of shapes, and what that says in between.

In: points, each the device's times at one dtype, head dim, causality, number of heads and length; what prologues add to
them (prologues.py); what a launch costs the host. Out: times at any shape that the grid encloses, and the length from
which on an alternative wins.
Between points times are powers of the length and of the heads, straight lines in logarithms; lengths that are multiples
of ROUND have lines of their own, because many kernels are faster there, and so have, on CPUs, those with much beyond
one: SDPA takes 154 us for 64 tokens, 205 for 63. Beyond the longest length and the most heads the last ratio holds, as
all processors are at work by then; below the shortest and the fewest nothing is said. Where some heads were measured up
to a length and others were not, those are asked: long calls have work enough for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cached_property
from itertools import chain
from statistics import fmean, geometric_mean, median_low
from typing import Any, NamedTuple

from .prologues import SDPA, Making, PrologueCosts
from .store import positive

SCHEMA = 8
SHIPPED = "shipped"
ROUND, LITTLE, MUCH = 16, 2, 13
"""Tokens; and beyond a multiple of them how many are measured for little and for much."""

Curve = list[tuple[int, float]]
"""(length, speed-up over SDPA), by rising length."""


class Family(NamedTuple):
    """What is never interpolated between."""

    dtype: str
    head_dim: int
    is_causal: bool


def _all_positive(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {name: positive(number) for name, number in dict(numbers).items()}


class Time(NamedTuple):
    """Of one call, in microseconds."""

    device: float
    launch: float = 0.0
    """What the host is busy with it; 0 where host and device are one."""

    @classmethod
    def read(cls, stored: Iterable[Any]) -> Time:
        """From JSON; ValueError or TypeError where it is none."""
        device, launch = stored
        return cls(positive(device), positive(launch) if launch else 0.0)

    def us(self, cuda_graphs: bool, host: float = 1.0) -> float:
        """What it adds to a model that is captured in CUDA graphs, or is not; `host`: times what a launch takes."""
        return self.device if cuda_graphs else max(self.device, host * self.launch)


@dataclass(frozen=True)
class Point:
    """Self-attention of `heads` heads in all, of all sequences, with `length` queries and keys each."""

    family: Family
    heads: int
    length: int
    us: Mapping[str, float]
    """Microseconds of the device, for `sdpa` and for each `format provider`."""


@dataclass(frozen=True)
class Line:
    """One alternative against SDPA at some number of heads, by rising lengths."""

    lengths: tuple[int, ...]
    sdpa: tuple[float, ...]
    """Logarithms of microseconds, as `other` is."""
    other: tuple[float, ...]

    def at(self, length: float) -> tuple[float, float] | None:
        """Logarithms of the times of SDPA and the alternative; None below the shortest length."""
        if length < self.lengths[0]:
            return None
        if length >= self.lengths[-1]:
            more = 2 * math.log(length / self.lengths[-1])  # the work grows with the square
            return self.sdpa[-1] + more, self.other[-1] + more
        after = next(i for i, known in enumerate(self.lengths) if known > length)
        weight = math.log(length / self.lengths[after - 1]) / math.log(self.lengths[after] / self.lengths[after - 1])
        return tuple(  # type: ignore[return-value]
            (1 - weight) * times[after - 1] + weight * times[after] for times in (self.sdpa, self.other)
        )


@dataclass(frozen=True)
class Profile:
    """What was measured of one device."""

    device: str
    date: str
    points: tuple[Point, ...]
    launch_us: Mapping[str, float] = field(default_factory=dict)
    """Of a quiet host at any shape, by the same names, `launched` where prologues are fused; none on a CPU."""
    prologues: PrologueCosts = field(default_factory=PrologueCosts)
    threads: int | None = None
    """Of a CPU."""
    source: str = SHIPPED
    """Or the file of `sagecompile calibrate`."""

    @property
    def is_own(self) -> bool:
        """Whether it was measured on this very machine."""
        return self.source != SHIPPED

    @cached_property
    def families(self) -> frozenset[Family]:
        """Of which it has anything."""
        return frozenset(point.family for point in self.points)

    @property
    def fastest_host(self) -> float:
        """Of those that it is used on: times what a launch takes by it."""
        return 1.0 if self.is_own else FASTER_HOST

    @classmethod
    def read(cls, stored: Mapping[str, Any], source: str = SHIPPED) -> Profile:
        """From JSON; ValueError, KeyError or TypeError where it is none of this schema."""
        if stored["schema"] != SCHEMA:
            raise ValueError(f"schema {stored['schema']}: this version reads {SCHEMA}")
        if not isinstance(stored["device"], str):
            raise TypeError(f"device {stored['device']}: not a name")
        Date.fromisoformat(stored["date"])
        points = tuple(
            Point(Family(**{name: group[name] for name in Family._fields}), int(heads), int(length), _all_positive(us))
            for group in stored["points"]
            for heads, length, us in group["heads_length_us"]
        )
        if not points or any(SDPA not in point.us for point in points):
            raise ValueError("no times, or some without SDPA's")
        return cls(
            stored["device"], stored["date"], points, _all_positive(stored["launch_us"]), PrologueCosts.read(stored),
            stored["threads"], source,
        )  # fmt: skip

    @cached_property
    def _lines(self) -> dict[tuple[Family, str, int], dict[int, Line]]:
        """For each family, alternative and kind of length, the lines by their heads, fewest first."""
        found: dict[tuple[Family, str, int], dict[int, list[Point]]] = {}
        for point in sorted(self.points, key=lambda point: (point.heads, point.length)):
            for name in point.us.keys() - {SDPA}:
                key = point.family, name, _kind(point.length)
                found.setdefault(key, {}).setdefault(point.heads, []).append(point)
        return {key: {heads: _line(on, key[1]) for heads, on in lines.items()} for key, lines in found.items()}

    def _of(self, family: Family, alternative: str, kind: int) -> dict[int, Line]:
        """The lines of a kind of lengths; where only others were measured, those."""
        kinds = ((family, alternative, known) for known in (kind, LITTLE, 0))
        return next((self._lines[key] for key in kinds if key in self._lines), {})

    def heads(self, family: Family, alternative: str) -> list[int]:
        """In all, of which something is known, rising."""
        return sorted(self._of(family, alternative, 0))

    def times(
        self, family: Family, alternative: str, heads: int, length: float, making: Making | None = None
    ) -> tuple[Time, Time] | None:
        """Of SDPA and of the alternative, or None outside of what was measured.

        `making`: what the alternative fuses, and Inductor does in front of SDPA. What that takes is counted if it is
        known of both, else only the launches are.
        """
        beyond = length % ROUND
        kinds = (LITTLE, MUCH) if beyond else (0, 0)
        little, much = (self._device_us(self._of(family, alternative, kind), heads, length) for kind in kinds)
        if little is None or much is None:
            return None
        weight = min(1.0, max(0.0, (beyond - LITTLE) / (MUCH - LITTLE)))
        found = [a ** (1 - weight) * b**weight for a, b in zip(little, much, strict=True)]
        counted = making if making is not None and self.knows(making, alternative) else None

        def time(name: str, device_us: float) -> Time:
            added = self.prologues.added(counted, name, heads, length) if counted else 0.0
            return Time(device_us + added, self.launch(name, fused=making is not None))

        return time(SDPA, found[0]), time(alternative, found[1])

    def launch(self, name: str, fused: bool) -> float:
        """Microseconds, also of one that only leaves prologues to others; 0 where nobody measured."""
        return self.launch_us.get(launched(name, fused), self.launch_us.get(name, 0.0))

    def knows(self, making: Making, alternative: str) -> bool:
        """Whether what these prologues add was measured, in front of SDPA and in the alternative."""
        return self.prologues.know(making, SDPA, alternative)

    @staticmethod
    def _device_us(lines: Mapping[int, Line], heads: int, length: float) -> tuple[float, float] | None:
        reach = min(length, max((line.lengths[-1] for line in lines.values()), default=0))
        below, above = _around(heads, [known for known, line in lines.items() if line.lengths[-1] >= reach])
        low = lines[below].at(length) if below is not None else None
        if low is None or below is None:
            return None
        high = lines[above].at(length) if above is not None else None
        if high is None or above is None:
            more = math.log(heads / below)  # the work grows with the heads
            return math.exp(low[0] + more), math.exp(low[1] + more)
        weight = math.log(heads / below) / math.log(above / below)
        return tuple(  # type: ignore[return-value]
            math.exp((1 - weight) * a + weight * b) for a, b in zip(low, high, strict=True)
        )

    def speedups(
        self, family: Family, alternative: str, heads: int, cuda_graphs: bool, making: Making | None = None
    ) -> list[Curve]:
        """Over SDPA at the measured lengths: a curve of each kind that is known."""
        curves = []
        for kind in (0, LITTLE, MUCH):
            lines = self._lines.get((family, alternative, kind), {})
            lengths = sorted({length for line in lines.values() for length in line.lengths})
            found = [(length, self.times(family, alternative, heads, length, making)) for length in lengths]
            curves.append(
                [(length, speedup(times, cuda_graphs, self.fastest_host)) for length, times in found if times]
            )
        return [curve for curve in curves if curve]


def averaged(races: Sequence[Mapping[str, Time]]) -> dict[str, Time]:
    """Geometric means by name, over races at different times, `without_stalls`.

    On a CPU others come and go, for seconds at a time, and what slows one call slows those in turn with it: the mean
    keeps them comparable, where the fastest of each would be those of different moments.
    """
    found, usual = {}, without_stalls(races)
    for name in dict.fromkeys(chain(*usual)):
        device, launch = zip(*(times[name] for times in usual if name in times), strict=True)
        found[name] = Time(geometric_mean(device), fmean(launch))
    return found


STALLED = 3.0


def without_stalls(races: Sequence[Mapping[str, Time]]) -> list[Mapping[str, Time]]:
    """But for those in which some call took STALLED times as long as it usually does, and another did not; all, if none
    would be left.

    On a CPU whose threads wait for each other a call of 100 us now and then takes 10 ms, as long as a race lasts.
    """
    usual = {
        name: median_low(times[name].device for times in races if name in times)
        for name in dict.fromkeys(chain(*races))
    }
    slow = [[time.device / usual[name] for name, time in times.items()] for times in races]
    kept = [times for times, ratios in zip(races, slow, strict=True) if max(ratios) < STALLED * min(ratios)]
    return kept or list(races)


def _kind(length: float) -> int:
    """Of a length: 0 a multiple of ROUND; LITTLE or MUCH beyond one."""
    beyond = length % ROUND
    return int(beyond) if beyond in (0, MUCH) else LITTLE


def launched(name: str, fused: bool) -> str:
    """What a launch is kept under."""
    return f"{name}, fused" if fused else name


def launches_us(measured: Iterable[tuple[bool, Mapping[str, Time]]]) -> dict[str, float]:
    """Microseconds of a quiet host, as `launched` names them, of races and whether they were fused ones.

    No shape changes what a launch takes.
    """
    found: dict[str, list[float]] = {}
    for fused, times in measured:
        for name, (_, launch) in times.items():
            if launch > 0:
                found.setdefault(launched(name, fused), []).append(launch)
    return {name: of_quiet_hosts(us) for name, us in sorted(found.items())}


def of_quiet_hosts(launches: Sequence[float]) -> float:
    """Of what the same launch took in many races: a host is at times half as fast as at others.

    The tenth part of the races that had the fastest one tell what it can do, and are as fast a minute later.
    """
    return sorted(launches)[len(launches) // 10]


def _around(heads: int, known: Iterable[int]) -> tuple[int | None, int | None]:
    """The most heads of at most as many, and the fewest of more."""
    below = max((other for other in known if other <= heads), default=None)
    return below, min((other for other in known if other > heads), default=None)


FASTER_HOST = 2 / 3
"""Times what a launch took: on a host that nobody timed, or at a moment when it has less to do."""


def speedup(times: tuple[Time, Time], cuda_graphs: bool, fastest_host: float = 1.0) -> float:
    """Of the second over the first, on the host that was measured or on the fastest, whichever is lower.

    So that a device that takes longer is not chosen for its launches alone, which another host would do as fast.
    """
    sdpa, other = counted_us(times, cuda_graphs, fastest_host)
    return sdpa / other


def counted_us(times: tuple[Time, Time], cuda_graphs: bool, fastest_host: float = 1.0) -> tuple[float, float]:
    """What each of the two takes on the host that a speed-up is of."""
    sdpa, other = times
    on_hosts = ((sdpa.us(cuda_graphs, host), other.us(cuda_graphs, host)) for host in (1.0, fastest_host))
    return min(on_hosts, key=lambda us: us[0] / us[1])


def crossing_of(curve: Curve, wanted: float) -> int | None:
    """The length from which on the speed-up is `wanted` at all lengths of a curve; None if it is not at the longest."""
    losses = [i for i, (_, speedup) in enumerate(curve) if speedup < wanted]
    if losses[-1:] == [len(curve) - 1]:
        return None
    if not losses:
        return curve[0][0]
    (low, losing), (high, winning) = curve[losses[-1]], curve[losses[-1] + 1]
    weight = math.log(wanted / losing) / math.log(winning / losing)
    return math.ceil(low * math.exp(weight * math.log(high / low)))


def _line(points: Sequence[Point], alternative: str) -> Line:
    return Line(
        tuple(point.length for point in points),
        tuple(math.log(point.us[SDPA]) for point in points),
        tuple(math.log(point.us[alternative]) for point in points),
    )


def to_json(
    machine: Mapping[str, Any], points: Iterable[Point], launch_us: Mapping[str, float], prologues: PrologueCosts
) -> dict[str, Any]:
    """What `Profile.read` reads; `machine`: device, threads, date, versions."""
    groups: dict[Family, list[Any]] = {}
    for point in points:
        row = [point.heads, point.length, {name: float(f"{us:.4g}") for name, us in point.us.items()}]
        groups.setdefault(point.family, []).append(row)
    return (
        {"schema": SCHEMA}
        | dict(machine)
        | {
            "launch_us": {name: float(f"{us:.3g}") for name, us in launch_us.items()},
            **prologues.to_json(),
            "points": [family._asdict() | {"heads_length_us": rows} for family, rows in groups.items()],
        }
    )
