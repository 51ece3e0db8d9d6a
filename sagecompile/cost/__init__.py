"""Predict how much faster a format is than SDPA, from what was measured on the same device.

In: a site, a format, a provider, a device. Out: a Prediction with its basis, or None where nothing was measured:
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
from typing import Protocol

from sagecompile import files
from sagecompile.formats import fuses
from sagecompile.site import AttentionSite, Device
from sagecompile.sources import source_hash

from .profile import Family, Profile, Time, counted_us, crossing_of, speedup
from .prologues import Making

logger = logging.getLogger("sagecompile")

Alternative = tuple[str, str]
"""To SDPA: (format, provider)."""


@dataclass(frozen=True)
class Prediction:
    """How many times faster than SDPA a site is expected to run, quantization included."""

    speedup: float
    basis: str
    """Where the number comes from: device, date, the nearest measured shape."""
    at_least: int = 0
    """Tokens of queries and of keys that it takes, where their number is a symbol."""
    sure: bool = True
    """False: so near to what it takes to be used, or from so unlike a machine, that a measurement is worth its time."""
    measured: bool = False
    """Whether this very shape was."""
    us: tuple[float, float] | None = None
    """Of SDPA and of this, where lengths are numbers."""
    calibrated: tuple[Time, Time] | None = None
    """Where `sagecompile calibrate` of this very machine says so: what SDPA takes and what this would."""


class Measures(Protocol):
    """local.Local, which needs torch."""

    def recall(self, site: AttentionSite) -> Mapping[Alternative, Prediction]: ...

    def loss(self, site: AttentionSite) -> str | None: ...

    def why_not(self, site: AttentionSite, alternatives: int) -> str | None: ...

    def measure(
        self, site: AttentionSite, predicted: Mapping[Alternative, Prediction | None]
    ) -> Mapping[Alternative, Prediction] | str: ...


@cache
def profiles() -> dict[str, Profile]:
    """By device name: those shipped, and in their place what `sagecompile calibrate` measured on this machine.

    What it measured with another torch or version of our kernels says nothing any more, which is logged.
    """
    found = {}
    for file in sorted((resources.files(__package__) / "profiles").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".json"):
            profile = Profile.read(json.loads(file.read_text()))
            found[profile.device] = profile
    for own in files.of_kind("profiles"):
        text = files.read(own)
        if text is None:
            continue
        try:
            stored = json.loads(text)
            profile = Profile.read(stored, str(own))
            other = [name for name, version in versions().items() if stored[name] != version]
        except (ValueError, KeyError, TypeError) as error:
            files.set_aside(own, f"no profile ({error}), sagecompile calibrate writes a new one")
            continue
        if other:
            logger.warning("%s is of another %s: sagecompile calibrate measures again", own, " and ".join(other))
        else:
            found[profile.device] = profile
    return found


def versions() -> dict[str, str]:
    """That the times of a profile are of."""
    import torch  # late: `decide` works without

    return {"torch": torch.__version__, "sources": source_hash()}


def beyond_a_copy_us(site: AttentionSite, heads: int, device_name: str) -> float:
    """Microseconds that Inductor takes longer than a copy to make q and k of so many heads; 0 where nobody measured."""
    profile, making = profiles().get(device_name), Making.of(site)
    return profile.prologues.beyond_a_copy(making, heads, site.q_len) if profile and making else 0.0


NEAR = 1.25
"""A speed-up that is wrong by this factor may be the wrong side of what it takes."""
NEAR_WHEN_SHORT, SHORT_US = 1.5, {"cpu": 10_000.0, "cuda": 200.0}
"""The same of calls that take so long at most: a GPU runs them as a few waves of blocks, and how full the last one is,
is not seen in between what was measured; a CPU shares them out among its threads. They are measured in no time."""


def predict(
    site: AttentionSite, format: str, provider: str, device: Device, wanted: float, cuda_graphs: bool = False
) -> Prediction | None:
    """The speed-up that the device's profile says, or None where it says nothing; `wanted`: what it takes to be used.

    Outside of CUDA graphs a shipped profile says what wins on its host and on a faster one, and is not sure where these
    differ; of a machine whose launches are slower than those of others of its kind it says nothing. A CPU's profile
    holds for as many threads alone: with others it is not sure, and no crossing is known. Neither is it sure of
    prologues that were not measured, of which only the launches count. Sizes that are numbers get the times at them.
    Where the batch is a symbol the least of any batch counts, as far as was measured. Lengths that are symbols get the
    speed-up at the most tokens, and the crossing, the shortest from which on the kernel wins by `wanted`. No symbol is
    compared here.
    """
    profile, alternative = profiles().get(device.name), f"{format} {provider}"
    if profile is None or not isinstance(site.head_dim, int):
        return None
    if device.slow_launches and not (cuda_graphs or profile.is_own):
        return None
    family = next((one for one in families_of(site) if profile.heads(one, alternative)), None)
    counts = _counts(site, profile.heads(family, alternative)) if family else []
    if family is None or not counts:
        return None
    making = Making.of(site) if fuses((format, provider), site.head_dim) else None
    known = making is None or profile.knows(making, alternative)
    alike = profile.threads in (None, device.threads)
    when = f"{device.name}{'' if alike else f' with {profile.threads} threads'}, {profile.date}"
    if isinstance(site.q_len, int) and isinstance(site.kv_len, int):
        if site.q_len != site.kv_len:
            return None
        at_all = [profile.times(family, alternative, heads, site.q_len, making) for heads in counts]
        found = [times for times in at_all if times is not None]
        if len(found) < len(counts):
            return None
        times = min(found, key=lambda times: speedup(times, cuda_graphs, profile.fastest_host))
        us = counted_us(times, cuda_graphs, profile.fastest_host)
        faster = us[0] / us[1]
        made = " with what makes q and k" if making and known else ""
        of_any = f", the least of {counts[0]} to {counts[-1]} heads in all" if len(counts) > 1 else ""
        basis = f"{against(us)}{made}{of_any}, {when}"
        is_short = max(time.device for time in times) <= SHORT_US.get(device.type, 0.0)
        near = NEAR_WHEN_SHORT if is_short else NEAR
        sure = alike and known and (faster >= wanted * near or speedup(times, cuda_graphs) <= wanted / near)
        return Prediction(faster, basis, sure=sure, us=us, calibrated=times if alike and profile.is_own else None)
    if not alike:
        return None
    curves = [curve for heads in counts for curve in profile.speedups(family, alternative, heads, cuda_graphs, making)]
    if not curves:
        return None
    at_most_tokens = min(curve[-1][1] for curve in curves)
    crossings = [crossing for curve in curves if (crossing := crossing_of(curve, wanted)) is not None]
    if len(crossings) < len(curves):
        return Prediction(at_most_tokens, f"at the most tokens measured, {when}", sure=known)
    return Prediction(at_most_tokens, f"from {max(crossings)} tokens on, {when}", max(crossings), sure=known)


def _counts(site: AttentionSite, measured: Sequence[int]) -> list[int]:
    """Numbers of heads in all that the site may have, rising: its own, or where that is a symbol what was `measured` of
    as many as one sequence has or more; none if nothing was.
    """
    if isinstance(site.batch, int) and isinstance(site.heads, int):
        least, more = site.batch * site.heads, []
    else:
        least = site.heads if isinstance(site.heads, int) else measured[0]
        more = [heads for heads in measured if heads > least]
    return [least, *more] if least >= measured[0] else []


def families_of(site: AttentionSite) -> list[Family]:
    """Whose times may be those of the site, the best first. On a GPU the two dtypes of 16 bits take as long."""
    if not site.mask.is_plain:
        return []
    alike = [site.dtype, *(["bfloat16"] if (site.device_type, site.dtype) == ("cuda", "float16") else [])]
    return [Family(dtype, site.head_dim, site.mask.is_causal) for dtype in alike]


def against(us: tuple[float, float]) -> str:
    """Of SDPA and another: `72 us against 5.18 ms`."""
    return f"{shown(us[1])} against {shown(us[0])}"


def shown(us: float) -> str:
    """`72 us`, `5.18 ms`."""
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.3g} ms"
