"""What was done to a model: every attention call found, with its decision.

In: sites and decisions, one Entry each. Out: a Report that prints as a table and gives JSON; `recording()` collects the
reports of everything compiled inside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .decide import Decision, Use
from .site import AttentionSite


@dataclass(frozen=True)
class Entry:
    """One site and what was decided."""

    site: AttentionSite
    decision: Decision

    def to_dict(self) -> dict[str, Any]:
        decision: dict[str, Any] = {"used": isinstance(self.decision, Use), "reason": self.decision.reason}
        if isinstance(self.decision, Use):
            prediction = self.decision.prediction
            decision |= {"format": self.decision.format, "provider": self.decision.provider}
            decision["predicted_speedup"] = prediction.speedup if prediction else None
            decision["predicted"] = [_predicted(use) for use in (self.decision, *self.decision.others)]
            decision["fused"] = self.decision.fused or None
        return {"site": self.site.to_dict(), "decision": decision}


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
        header = ("site", "call", "shape", "dtype", "causal", "decision")
        rows = [header, *(_row(entry) for entry in self.entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
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
        "yes" if site.is_causal else "no",
        text,
    )


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
