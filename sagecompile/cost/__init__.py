"""Predict how much faster a format is than SDPA, from what was measured on the same device.

In: a site, a format, a provider, a device name. Out: a Prediction with its basis, or None where nothing was measured:
a win is never guessed. The measurements are the files in `profiles/`, one a device, with versions and date.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from sagecompile.site import AttentionSite

SCHEMA = 1


@dataclass(frozen=True)
class Prediction:
    """How many times faster than SDPA a site is expected to run, quantization included."""

    speedup: float
    basis: str
    """Where the number comes from: device, date, the nearest measured shape."""


@cache
def profiles() -> dict[str, dict[str, Any]]:
    """Every shipped profile, by device name. A profile says schema, device, versions, date and rows."""
    found = {}
    for file in sorted((resources.files(__package__) / "profiles").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".json"):
            profile = json.loads(file.read_text())
            assert profile["schema"] == SCHEMA, f"{file.name}: schema {profile['schema']}, this version reads {SCHEMA}"
            found[profile["device"]] = profile
    return found


def predict(site: AttentionSite, format: str, provider: str, device: str) -> Prediction | None:
    """The measured speed-up at the longest measured length that the site reaches, or None.

    One row of a profile is measured for one format, provider, dtype, head dim and causality, with at least
    `min_batch_heads` batch x heads and equal lengths. A symbolic length is compared, which makes it a guard.
    """
    profile = profiles().get(device)
    if profile is None:
        return None
    for row in profile["rows"]:
        measured = (row["format"], row["provider"], row["head_dim"], row["is_causal"])
        if measured != (format, provider, site.head_dim, site.is_causal) or site.dtype not in row["dtypes"]:
            continue
        if site.batch * site.heads < row["min_batch_heads"]:
            continue
        for length, speedup in sorted(row["speedup_at_length"], reverse=True):
            if site.q_len >= length and site.kv_len >= length:
                return Prediction(speedup, f"{device}, {profile['date']}, {length} tokens")
    return None
