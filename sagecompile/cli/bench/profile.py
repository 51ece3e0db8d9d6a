"""What `policy=auto` reads for a device, made of the rows of a benchmark.

In: rows of `sagecompile bench attention`. Out: the speed-up over SDPA at each length, for each format, provider, head
dim and causality, as `sagecompile.cost` takes it.
"""

from __future__ import annotations

import json
from typing import Any

from sagecompile.cost import SCHEMA
from sagecompile.formats import FORMATS


def profile(machine: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of the machine, and one row a format, provider, head dim, causality, dtype and number of heads."""
    groups: dict[tuple[Any, ...], list[list[float]]] = {}
    for row in rows:
        format, _, provider = row["what"].partition(" ")
        if format in FORMATS:
            key = (format, provider, row["head_dim"], row["is_causal"], row["dtype"], row["heads"])
            groups.setdefault(key, []).append([row["length"], round(row["ratio_to_sdpa"], 3)])
    return (
        {"schema": SCHEMA}
        | machine
        | {
            "rows": [
                {
                    "format": format,
                    "provider": provider,
                    "head_dim": head_dim,
                    "is_causal": is_causal,
                    "dtypes": [dtype],
                    "min_batch_heads": heads,
                    "speedup_at_length": found,
                }
                for (format, provider, head_dim, is_causal, dtype, heads), found in groups.items()
            ]
        }
    )


def render_profile(found: dict[str, Any]) -> str:
    """JSON with one row a line, so that a new measurement can be read as a diff."""
    head = json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in found["rows"])
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
