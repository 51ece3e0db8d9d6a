"""Draw time and ratio against length.

In: rows of `sagecompile bench attention`. Out: a PNG with a row of panels for each dtype, head dim and causality: the
time of every contestant on the left, its speed against the best one that does not quantize on the right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .session import require

Curve = list[tuple[int, float]]


def curves(rows: list[dict[str, Any]], figure: str) -> dict[str, dict[str, Curve]]:
    """By panel row and contestant: (length, row[figure]), by length."""
    found: dict[str, dict[str, Curve]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        panel = f"{row['dtype']}, head_dim {row['head_dim']}, {'causal' if row['is_causal'] else 'not causal'}"
        found.setdefault(panel, {}).setdefault(row["what"], []).append((row["length"], row[figure]))
    return found


def draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Write `path`; dashed is what does not quantize. Raises SageCompileError without matplotlib."""
    colors = require("matplotlib", "--plot").colormaps["tab20"]
    names = list(dict.fromkeys(row["what"] for row in rows))
    plain = {row["what"] for row in rows if not row["quantized"]}
    times, ratios = (curves(rows, figure) for figure in ("us", "ratio_to_best"))
    sheet = require("matplotlib.figure", "--plot").Figure(figsize=(13, 4 * len(times) + 1), layout="constrained")
    sheet.suptitle(f"attention on {device}; dashed: not quantized")
    for (left, right), panel in zip(sheet.subplots(len(times), 2, squeeze=False), times, strict=True):
        for axes, by_name in ((left, times[panel]), (right, ratios[panel])):
            for name, curve in by_name.items():
                style = {"color": colors(names.index(name) % 20), "linestyle": "--" if name in plain else "-"}
                axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=name, **style)
            lengths = sorted({length for curve in by_name.values() for length, _ in curve})
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, map(str, lengths))
            axes.set_xlabel("length, tokens")
            axes.grid(alpha=0.3)
            axes.set_title(panel)
        left.set_yscale("log")
        left.set_ylabel("time, us")
        right.set_ylabel("speed against the best that does not quantize")
        right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    sheet.savefig(path)
