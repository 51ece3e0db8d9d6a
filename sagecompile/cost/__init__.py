"""Predict how much faster a format is than SDPA, from what was measured on the same device.

In: a site, a format, a provider, a device name. Out: a Prediction with its basis, or None where nothing was measured:
a win is never guessed. The measurements are the files in `profiles/`, one a device, with versions and date; what they
do not cover, local.py measures on the machine itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Protocol

from sagecompile.site import AttentionSite

SCHEMA = 1

Alternative = tuple[str, str]
"""To SDPA: (format, provider)."""


@dataclass(frozen=True)
class Prediction:
    """How many times faster than SDPA a site is expected to run, quantization included."""

    speedup: float
    basis: str
    """Where the number comes from: device, date, the nearest measured shape."""


class Measures(Protocol):
    """local.Local, which needs torch."""

    def recall(self, site: AttentionSite) -> Mapping[Alternative, Prediction]: ...

    def measure(
        self, site: AttentionSite, alternatives: Sequence[Alternative]
    ) -> Mapping[Alternative, Prediction] | str: ...


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


def predict(site: AttentionSite, format: str, provider: str, device: str, wanted: float) -> Prediction | None:
    """The speed-up that was measured for such a site, or None; `wanted` is the one that it would take to be used.

    A row of a profile was measured for one format, provider, dtype, head dim and causality, with at least
    `min_batch_heads` batch x heads, at several equal lengths. From the shortest length on from which it won by
    `wanted` at every measured one, it is used: that length is the only one compared, so that a symbolic length gets
    one guard, and none where the kernel wins at no length. Lengths that are numbers get the speed-up of the longest
    measured one that they reach.
    """
    profile = profiles().get(device)
    for row in profile["rows"] if profile else ():
        measured = (row["format"], row["provider"], row["head_dim"], row["is_causal"])
        if measured != (format, provider, site.head_dim, site.is_causal) or site.dtype not in row["dtypes"]:
            continue
        speedups = sorted(row["speedup_at_length"])
        losses = [index for index, (_, speedup) in enumerate(speedups) if speedup < wanted]
        crossing = losses[-1] + 1 if losses else 0
        when = f"{device}, {profile['date']}"  # type: ignore[index]
        if crossing == len(speedups):
            return Prediction(max(speedup for _, speedup in speedups), f"at best, at any length, {when}")
        length, speedup = speedups[crossing]
        if site.batch * site.heads < row["min_batch_heads"]:
            return None
        if site.q_len >= length and site.kv_len >= length:
            if not (isinstance(site.q_len, int) and isinstance(site.kv_len, int)):
                return Prediction(speedup, f"from {length} tokens on, {when}")
            reached = [entry for entry in speedups if entry[0] <= min(site.q_len, site.kv_len)]
            return Prediction(reached[-1][1], f"at {reached[-1][0]} tokens, {when}")
        if crossing == 0:
            return None
        return Prediction(speedups[crossing - 1][1], f"below {length} tokens, {when}")
    return None
