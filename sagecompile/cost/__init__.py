"""Predict how much faster a format is than SDPA, from what was measured on the same device.

In: a site, a format, a provider, a device name. Out: a Prediction with its basis, or None where nothing was measured:
a win is never guessed. The measurements are the files in `profiles/`, one a device, with versions and date; what they
do not cover, local.py measures on the machine itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Protocol

from sagecompile.site import AttentionSite

from . import store
from .profile import Profile, crossing_of

logger = logging.getLogger("sagecompile")

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
def profiles() -> dict[str, Profile]:
    """By device name: those shipped, and in their place what `sagecompile calibrate` measured on this machine."""
    found = {}
    for file in sorted((resources.files(__package__) / "profiles").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".json"):
            profile = Profile.read(json.loads(file.read_text()))
            found[profile.device] = profile
    for own in sorted(own_profiles().glob("*.json")):
        try:
            profile = Profile.read(json.loads(own.read_text()), str(own))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is no profile (%s): sagecompile calibrate writes a new one", own, error)
            continue
        found[profile.device] = profile
    return found


def own_profiles() -> Path:
    """Where `sagecompile calibrate` puts what it measured."""
    return store.folder().parent / "profiles"


def predict(site: AttentionSite, format: str, provider: str, device: str, wanted: float) -> Prediction | None:
    """The speed-up that the device's profile says, or None where it says nothing; `wanted`: what it takes to be used.

    Sizes that are numbers get the times at them. A length that is a symbol is compared once, with the crossing: the
    shortest from which on the kernel wins by `wanted`; and not at all where it wins at none. Symbolic numbers of heads
    are compared once, with the fewest measured.
    """
    profile = profiles().get(device)
    family, alternative = (site.dtype, site.head_dim, site.is_causal), f"{format} {provider}"
    fewest = profile.fewest_heads(family, alternative) if profile and isinstance(site.head_dim, int) else None
    if profile is None or fewest is None:
        return None
    heads = site.batch * site.heads
    if heads < fewest:
        return None
    heads = heads if isinstance(heads, int) else fewest
    when = f"{device}, {profile.date}"
    if isinstance(site.q_len, int) and isinstance(site.kv_len, int):
        times = profile.times(family, alternative, heads, site.q_len) if site.q_len == site.kv_len else None
        if times is None:
            return None
        return Prediction(times[0] / times[1], f"{_shown(times[1])} against {_shown(times[0])}, {when}")
    curves = profile.speedups(family, alternative, heads)
    if not curves:
        return None
    crossings = [crossing_of(curve, wanted) for curve in curves]
    if None in crossings:
        return Prediction(min(curve[-1][1] for curve in curves), f"at the most tokens measured, {when}")
    crossing = max(length for length in crossings if length is not None)
    if site.q_len >= crossing and site.kv_len >= crossing:
        return Prediction(wanted, f"from {crossing} tokens on, {when}")
    shorter = [speedup for curve in curves for length, speedup in curve if length < crossing]
    return Prediction(min(shorter), f"below {crossing} tokens, {when}") if shorter else None


def _shown(us: float) -> str:
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.3g} ms"
