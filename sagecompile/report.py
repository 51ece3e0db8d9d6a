"""What was done to a model: every attention call found, with its decision.

In: sites and decisions, one Entry each, and what was measured of them. Out: a Report that prints as a table and gives
JSON; `recording()` collects the reports of everything compiled inside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .decide import Decision, Use
from .site import AttentionSite


@dataclass
class Measured:
    """How a used site did when its graph ran; of several calls the largest of each figure."""

    error: float = 0.0
    """Of the output, relative L2, against attention in float64 on the same q, k and v."""
    exact_rows: float = 0.0
    """The share of the output's rows that INT8 would get too wrong, so that they were computed exactly."""
    calls: int = 0

    def add(self, error: float, exact_rows: float) -> None:
        """One more call."""
        self.error, self.exact_rows = max(self.error, error), max(self.exact_rows, exact_rows)
        self.calls += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; null for an error that is not finite, and for both figures if the site was not run."""
        error = self.error if self.calls and math.isfinite(self.error) else None
        return {"error": error, "exact_rows": self.exact_rows if self.calls else None, "calls": self.calls}


@dataclass(frozen=True)
class Entry:
    """One site and what was decided."""

    site: AttentionSite
    decision: Decision
    measured: Measured | None = field(default=None, compare=False)
    """Of a used site, where that was asked for; filled in as its graph runs."""

    def to_dict(self) -> dict[str, Any]:
        decision: dict[str, Any] = {"used": isinstance(self.decision, Use), "reason": self.decision.reason}
        if isinstance(self.decision, Use):
            prediction = self.decision.prediction
            decision |= {"format": self.decision.format, "provider": self.decision.provider}
            decision["predicted_speedup"] = prediction.speedup if prediction else None
            decision["predicted"] = [_predicted(use) for use in (self.decision, *self.decision.others)]
            decision["fused"] = self.decision.fused or None
        measured = self.measured.to_dict() if self.measured else None
        return {"site": self.site.to_dict(), "decision": decision, "measured": measured}


@dataclass(frozen=True)
class Report:
    """The sites of one compiled graph, or of several."""

    entries: tuple[Entry, ...] = ()
    graphs: int = 1

    @property
    def used(self) -> tuple[Entry, ...]:
        """The sites that were rewritten."""
        return tuple(entry for entry in self.entries if isinstance(entry.decision, Use))

    @property
    def kept(self) -> tuple[Entry, ...]:
        """The sites left as they were."""
        return tuple(entry for entry in self.entries if not isinstance(entry.decision, Use))

    def __add__(self, other: Report) -> Report:
        return Report(self.entries + other.entries, self.graphs + other.graphs)

    def summary(self) -> str:
        """One line: `24 of 26 attention sites rewritten; kept: head_dim 256 (2)`."""
        if not self.entries:
            return "no attention sites found"
        text = f"{len(self.used)} of {len(self.entries)} attention sites rewritten"
        causes = Counter(entry.decision.cause for entry in self.kept if not isinstance(entry.decision, Use))
        if causes:
            text += "; kept: " + ", ".join(f"{cause} ({count})" for cause, count in causes.most_common())
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "graphs": self.graphs,
            "used": len(self.used),
            "kept": len(self.kept),
            "entries": [entry.to_dict() for entry in self.entries],
        }

    def __str__(self) -> str:
        """A table, one line a site; equal lines of consecutive layers are not folded, so that none is hidden."""
        header = ("site", "call", "shape", "dtype", "mask", "error", "exact rows", "decision")
        rows = [header, *(_row(entry) for entry in self.entries)]
        if not any(entry.measured for entry in self.entries):
            rows = [(*row[:5], row[-1]) for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
        ]
        plural = "graph" if self.graphs == 1 else "graphs"
        table = lines if self.entries else []
        return "\n".join([*table, f"{self.summary()} ({self.graphs} {plural})"])


def _predicted(use: Use) -> dict[str, Any]:
    """What is expected of an alternative; microseconds where sizes are numbers."""
    found = use.prediction
    sdpa_us, us = found.us if found and found.us else (None, None)
    expected = {"speedup": found.speedup, "basis": found.basis} if found else {}
    return {"format": use.format, "provider": use.provider, "us": us, "sdpa_us": sdpa_us} | expected


def _row(entry: Entry) -> tuple[str, ...]:
    site, decision = entry.site, entry.decision
    if isinstance(decision, Use):
        text = f"use {decision.format} by {decision.provider}: {decision.reason}"
    else:
        text = f"keep: {decision.reason}"
    return (
        site.name,
        f"{site.spelling} {site.source}",
        site.shape,
        site.dtype,
        str(site.mask),
        *_figures(entry.measured),
        text,
    )


def _figures(measured: Measured | None) -> tuple[str, str]:
    """The error and the share of exact rows as the table has them."""
    if measured is None:
        return "", ""
    if not measured.calls:
        return "not run", ""
    share = measured.exact_rows
    return f"{measured.error:#.2g}", "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


_recorders: ContextVar[tuple[list[Report], ...]] = ContextVar("sagecompile_recorders", default=())


@contextmanager
def recording() -> Iterator[list[Report]]:
    """Collect the reports of every graph that is compiled inside the `with`, in order."""
    reports: list[Report] = []
    token = _recorders.set((*_recorders.get(), reports))
    try:
        yield reports
    finally:
        _recorders.reset(token)


def record(report: Report) -> None:
    """Hand a finished report to whoever is recording."""
    for reports in _recorders.get():
        reports.append(report)
