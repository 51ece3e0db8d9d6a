"""How fast this machine's host launches kernels, against the one that a shipped profile was measured on.

In: what races saw a launch of SDPA take. Out: what launches take, times what they take by the profile, on the fastest
host that this one may be: a race sees a host as it is at that moment, and it is often slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import store
from .profile import of_quiet_hosts

ENOUGH, MOST = 10, 100
"""Races that tell how fast it can be, and as many as are remembered."""
MARGIN = 0.9
"""Times what was seen in fewer: from one minute to another even a quiet host differs by as much."""


def fastest(machine: Mapping[str, Any], date: str, seen: float) -> float:
    """One more race `seen`: its launch of SDPA took so many times what it takes by the profile of that date."""
    key = {"host of": dict(machine), "profile": date}
    before = store.recall(key, lambda found: [store.positive(times) for times in found["times_profile"]])
    races = [*(before or []), seen][-MOST:]
    store.remember(key, {"times_profile": races})
    return min(1.0, of_quiet_hosts(races) * (MARGIN if len(races) < ENOUGH else 1.0))
