"""What this very machine says of a shape that no profile covers: measured while compiling, once, and then remembered.

In: a site, and who could run it. Out: a Prediction for each from a race against SDPA on random inputs of the site's
shape, or the reason why there was none. It takes tenths of a second, at most a few, and a bounded amount of memory.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sagecompile.formats import fusing_devices
from sagecompile.site import AttentionSite, Prologue

from . import Alternative, Prediction, against, beyond_a_copy_us, families_of, host, profiles, store
from .profile import FASTER_HOST, Profile, Time, averaged, counted_us, without_stalls
from .prologues import SDPA
from .race import BUDGET_S, Ops, fusing_of, race
from .timer import MOST_WAITED, waited_s

logger = logging.getLogger("sagecompile")

FLOPS = {"cpu": 2e9, "cuda": 2e12}
"""Of one call, about: milliseconds. A larger site is measured on fewer sequences and heads."""
LEAST_HEADS = {"cpu": 8, "cuda": 128}
"""That it is never measured on fewer than, where it has as many, so that all processors have work."""
ENOUGH_QUERIES = 4096
"""For each thread of a CPU, in all heads; then fewer of them will do."""
LONGEST = {"cpu": 16, "cuda": 8}
"""How many times `FLOPS` a call of the least heads may have; beyond it nothing is measured."""
MEMORY = {"cpu": 1 << 29, "cuda": 1 << 30}
"""Bytes of q, k, v, the outputs and what prologues make."""
TRIES, PAUSE_S = 3, 0.2
"""How often at the most, and after how long, it is tried on a CPU."""
ALIKE, APART = 1.1, 1.5
"""What two measurements of a speed-up on a CPU may differ by to be believed, and beyond which none is."""
CLOSE = 0.9, 1.2
"""A speed-up in between is worth all tries."""


class Raced(NamedTuple):
    """An alternative and SDPA, side by side."""

    sdpa: Time
    ours: Time
    heads: int
    """In all, as many as were raced."""
    shape: str
    date: str
    fastest_host: float | None
    """Times what launches take by a shipped profile, as far as it was seen by then."""


@dataclass(frozen=True)
class Local:
    """One device of this machine, and how graphs run on it."""

    machine: Mapping[str, Any]
    """What a measurement holds for: device, driver, versions, threads."""
    ops: Ops
    cuda_graphs: bool
    """Whether what is compiled is captured in a CUDA graph, where launches cost nothing."""
    may_measure: bool = True
    """Else it only recalls."""
    failures: dict[str, str] = field(default_factory=dict)
    """Of this process: what could not be measured is not tried again."""

    def recall(self, site: AttentionSite) -> dict[Alternative, Prediction]:
        """What was measured of such a site before, here or in another process.

        Launches count as the device's profile has them, which are those of a quiet host, else as they were raced. What
        wins must win on the fastest host that this one may be, too.
        """
        found = store.recall(self.key(site), _read) if _has_fixed_sizes(site) else None
        profile, fusing = self._profile, fusing_of(site, found or ())
        is_shipped = profile is not None and not profile.is_own
        launches_count = site.device_type == "cuda" and not self.cuda_graphs
        predictions = {}
        for alternative, (before, after, heads, shape, date, seen) in (found or {}).items():
            quiet_us = self._quiet_us(alternative, bool(fusing))
            timed = (before.launch or not is_shipped) if quiet_us else after.launch
            if launches_count and not timed:
                continue  # it was raced for a CUDA graph, or by another profile: once more, with launches
            fastest_host = profile.fastest_host if profile else FASTER_HOST
            if quiet_us:
                before, after = before._replace(launch=quiet_us[0]), after._replace(launch=quiet_us[1])
                fastest_host = seen if seen and is_shipped else fastest_host
            if alternative in fusing:
                more = beyond_a_copy_us(site, heads, str(self.machine["device"]))
                before = before._replace(device=before.device + more)
            us = counted_us((before, after), self.cuda_graphs, fastest_host)
            basis = f"{against(us)}, measured here at {shape}, {date}"
            predictions[alternative] = Prediction(us[0] / us[1], basis, measured=True, us=us)
        return predictions

    @property
    def _profile(self) -> Profile | None:
        return profiles().get(str(self.machine["device"]))

    def _quiet_us(self, alternative: Alternative, fused: bool) -> tuple[float, float] | None:
        """What the device's profile says of launches, of SDPA's and this one's; None where it does not know both, or is
        of hosts with faster ones.
        """
        profile = self._profile
        if profile is None or (self.machine.get("slow_launches") and not profile.is_own):
            return None
        sdpa, other = profile.launch(SDPA, fused), profile.launch(" ".join(alternative), fused)
        return (sdpa, other) if sdpa and other else None

    def _fastest_host(self, site: AttentionSite, sdpa: Time, alternatives: Sequence[Alternative]) -> float | None:
        """After a race that timed a launch of SDPA's that the profile has: of self-attention of a family that it knows,
        with both prologues or none.
        """
        profile, fused = self._profile, bool(fusing_of(site, alternatives))
        if profile is None or self._launches(site, alternatives) != (SDPA,) or not sdpa.launch:
            return None
        is_alike = (
            site.q_len == site.kv_len and site.heads == site.kv_heads and profile.families & set(families_of(site))
        )
        if not is_alike or (fused and Prologue() in (site.prologues or ())):
            return None
        return host.fastest(self.machine, profile.date, sdpa.launch / profile.launch(SDPA, fused))

    def why_not(self, site: AttentionSite, alternatives: int) -> str | None:
        """Why so many alternatives would not be measured at such a site now, or None."""
        if not self.may_measure:
            return "sage.measure is false"
        if not _has_fixed_sizes(site):
            return "sizes that change are not measured while compiling, numbers are"
        if site.device_type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "not measured while a CUDA graph is captured"
        smaller = _shrink(site, alternatives)
        if smaller.flops > LONGEST[site.device_type] * FLOPS[site.device_type]:
            return f"{site.q_len} x {site.kv_len} tokens take too long to measure while compiling"
        if _bytes(smaller, alternatives) > MEMORY[site.device_type]:
            return f"{_bytes(smaller, alternatives) >> 20} MiB are too many to measure while compiling"
        return self.failures.get(_name(self.key(site)))

    def measure(
        self, site: AttentionSite, predicted: Mapping[Alternative, Prediction | None]
    ) -> dict[Alternative, Prediction] | str:
        """Race the alternatives against SDPA now, or say why not; `predicted`: what a profile says of each, if it does.

        Where a CPU is busy nothing is kept, nor is it tried again in this process. What a profile of the same machine
        says counts as much as a race.
        """
        why_not = self.why_not(site, len(predicted))
        if why_not is not None:
            return why_not
        smaller = _shrink(site, len(predicted))
        try:
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                times = self._races(smaller, tuple(predicted), _calibrated(smaller, site, predicted))
        except Exception as failure:  # whatever a kernel or the device raises, the model must still compile
            times = f"measuring failed: {type(failure).__name__}: {failure}"
        if isinstance(times, str):
            self.failures[_name(self.key(site))] = times
            return times
        fastest_host = self._fastest_host(smaller, times[SDPA], tuple(predicted))
        where = smaller.batch * smaller.heads, smaller.shape, _today(), fastest_host
        raced = {alternative: Raced(times[SDPA], times[" ".join(alternative)], *where) for alternative in predicted}
        known = (store.recall(self.key(site), _read) or {}) | raced
        store.remember(self.key(site), {"times": {" ".join(which): times for which, times in known.items()}})
        found = self.recall(site)
        for (format, provider), prediction in found.items():
            said = f"{prediction.speedup:.2f}x for {format} by {provider} ({prediction.basis})"
            logger.info("%s %s on %s: %s", site.shape, site.dtype, self.machine["device"], said)
        return found

    def _races(
        self, site: AttentionSite, alternatives: Sequence[Alternative], calibrated: Mapping[str, Time]
    ) -> Mapping[str, Time] | str:
        """What races say; on a CPU two of them at least, or one and `calibrated`; else that it is busy.

        Not those in which threads waited for a CPU. Others at work, on the same machine beyond what this one sees too,
        make some calls suffer more than others: the first two that are ALIKE are believed, unless they are CLOSE to
        what may be asked for, else all without stalls, if they are not further than APART.
        """
        launches = self._launches(site, alternatives)
        if site.device_type != "cpu":
            return race(site, alternatives, self.ops, launches=launches)
        opinions, waits = [calibrated] if calibrated else [], []
        for left in reversed(range(TRIES)):
            start, before = time.perf_counter(), waited_s()
            times = race(site, alternatives, self.ops, launches=launches)
            waits.append((waited_s() - before) / max(BUDGET_S, time.perf_counter() - start))
            if waits[-1] < MOST_WAITED:
                alike = next((other for other in opinions if _apart(times, other) < ALIKE), None)
                if alike is not None and not _is_close(both := averaged([times, alike])):
                    return both
                opinions.append(times)
            if left and (waits[-1] >= MOST_WAITED or len(opinions) > 1):
                time.sleep(PAUSE_S)
        if len(opinions) < 2:
            return f"the CPU is busy: threads waited for it {max(waits):.0%} of the time"
        usual = without_stalls(opinions)
        opinions = usual if len(usual) > 1 else opinions
        most = max(_apart(one, other) for one in opinions for other in opinions)
        return averaged(opinions) if most < APART else f"the CPU is busy: two measurements are {most:.1f} times apart"

    def _launches(self, site: AttentionSite, alternatives: Sequence[Alternative]) -> Collection[str] | None:
        """Whose are timed in a race: all (None), unless the profile has them; SDPA's, to see the host, if it is of
        another machine.
        """
        fused = bool(fusing_of(site, alternatives))
        if not all(self._quiet_us(alternative, fused) for alternative in alternatives):
            return None
        return () if self.cuda_graphs or (self._profile and self._profile.is_own) else (SDPA,)

    def key(self, site: AttentionSite) -> dict[str, Any]:
        """What a measurement of such a site is kept under."""
        names = "batch heads kv_heads q_len kv_len head_dim dtype".split()
        found = dict(self.machine) | {name: getattr(site, name) for name in names} | {"mask": str(site.mask)}
        if site.prologues and site.device_type in fusing_devices(may_win=True):
            found["prologues"] = [made._asdict() for made in site.prologues]
        return found | ({"threads": torch.get_num_threads()} if site.device_type == "cpu" else {})

    def key_of_loss(self, site: AttentionSite) -> dict[str, Any]:
        """What is kept under it is of the site of this name alone; of any sizes, where these are symbols."""
        plain = {name: value for name, value in self.key(site).items() if not isinstance(value, torch.SymInt)}
        if isinstance(site.mask.ahead, torch.SymInt):
            del plain["mask"]
        return plain | {"lost": site.name, "source": site.source}

    def loss(self, site: AttentionSite) -> str | None:
        """Why this very site did not win when it ran, in this or another process; None where nobody saw that."""
        found = store.recall(self.key_of_loss(site), _read_loss)
        if found is None:
            return None
        share, date = found
        return f"exact rows {share:.0%}: at this site INT8 holds too few rows to win (seen {date})"


def remember_loss(key: Mapping[str, Any], share: float) -> None:
    """That a site of this `key_of_loss` computed so large a share of its rows exactly that it was not faster."""
    store.remember(key, {"exact_rows": share, "date": _today()})


def _read_loss(found: Mapping[str, Any]) -> tuple[float, str]:
    return store.positive(found["exact_rows"]), str(found["date"])


def _apart(one: Mapping[str, Time], other: Mapping[str, Time]) -> float:
    """By which factor two opinions of what is faster than SDPA differ at most, however fast the machine was."""
    ratios = [times.device / other[name].device for name, times in one.items()]
    return max(ratios) / min(ratios)


def _is_close(times: Mapping[str, Time]) -> bool:
    low, high = CLOSE
    return any(low < times[SDPA].device / time.device < high for name, time in times.items() if name != SDPA)


def _calibrated(
    raced: AttentionSite, site: AttentionSite, predicted: Mapping[Alternative, Prediction | None]
) -> dict[str, Time]:
    """What a CPU takes for each by its own profile; nothing if that is not of what is raced: whole, without groups."""
    if site.device_type != "cpu" or raced != site or site.heads != site.kv_heads:
        return {}
    found = {}
    for alternative, prediction in predicted.items():
        if prediction is None or prediction.calibrated is None:
            return {}
        found[SDPA], found[" ".join(alternative)] = prediction.calibrated
    return found


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _read(found: Mapping[str, Any]) -> dict[Alternative, Raced]:
    """What is stored of a site."""
    times = {}
    for name, (sdpa, ours, heads, shape, date, seen) in dict(found["times"]).items():
        format, provider = name.split(" ")
        where = int(heads), str(shape), str(date), None if seen is None else store.positive(seen)
        times[format, provider] = Raced(Time.read(sdpa), Time.read(ours), *where)
    return times


def _has_fixed_sizes(site: AttentionSite) -> bool:
    sizes = (site.batch, site.heads, site.kv_heads, site.q_len, site.kv_len, site.head_dim, site.mask.ahead)
    return all(size is None or isinstance(size, int) for size in sizes)


def _bytes(site: AttentionSite, alternatives: int) -> int:
    size = 4 if site.dtype == "float32" else 2
    queries, keys = site.heads * site.q_len, site.kv_heads * site.kv_len
    made = bool(site.prologues)
    mask = (1 + size) * site.q_len * site.kv_len if site.mask.ahead else 0  # SDPA may make numbers of it
    return int(site.batch * site.head_dim * size * ((2 + alternatives + made) * queries + (2 + made) * keys)) + mask


def _shrink(site: AttentionSite, alternatives: int) -> AttentionSite:
    """With as many KV heads and sequences as FLOPS and MEMORY allow; groups stay whole.

    LEAST_HEADS at the least, on a CPU as few of them as have ENOUGH_QUERIES.
    """
    group = site.heads // site.kv_heads
    all_groups = site.batch * site.kv_heads
    least_heads = LEAST_HEADS[site.device_type]
    if site.device_type == "cpu":
        least_heads = min(least_heads, -(-ENOUGH_QUERIES * torch.get_num_threads() // site.q_len))
    least = -(-least_heads // group)
    share = min(FLOPS[site.device_type] / site.flops, MEMORY[site.device_type] / _bytes(site, alternatives))
    groups = min(all_groups, max(least, int(all_groups * share)))
    kv_heads = min(groups, site.kv_heads)
    return replace(site, batch=max(1, groups // kv_heads), kv_heads=kv_heads, heads=kv_heads * group)


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
