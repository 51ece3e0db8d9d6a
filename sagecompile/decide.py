"""Decide, for one attention call, whether a quantized kernel replaces it.

In: an AttentionSite, the settings, what is known about the device. Out: Use(...) or Keep(reason). First what is legal
(a list of limits, each with its reason), then what is faster (a prediction). No torch op runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from .cost import NEAR, Alternative, Measures, Prediction, predict, shown
from .formats import FORMATS, PROVIDERS, Format, Provider, beats, fuses
from .settings import Settings
from .site import AttentionSite, Device


@dataclass(frozen=True)
class Use:
    """Replace the call: `format` run by `provider`."""

    format: str
    provider: str
    prediction: Prediction | None = None
    """What `auto` went by; None under `always`, which asks for no measurement."""
    fused: str = ""
    """What the kernel does besides attention: `QK-norm and RoPE`."""
    others: tuple[Use, ...] = field(default=(), compare=False)
    """That were predicted or measured, too."""

    @property
    def alternative(self) -> Alternative:
        return self.format, self.provider

    @property
    def reason(self) -> str:
        why = "policy=always"
        if self.prediction is not None:
            why = f"{self.prediction.speedup:.2f}x predicted ({self.prediction.basis})"
        why = f"{why}; {self.fused} fused" if self.fused else why
        return "; ".join([why, *(other._aside() for other in self.others)])

    def _aside(self) -> str:
        """As another's reason names it: `qk_int8_pv_fp16 by hopper 1.10x (72 us)`."""
        assert self.prediction is not None
        us = f" ({shown(self.prediction.us[1])})" if self.prediction.us else ""
        return f"{self.format} by {self.provider} {self.prediction.speedup:.2f}x{us}"


@dataclass(frozen=True)
class Keep:
    """Leave the call as it is. The reason reads `cause value: what is needed`."""

    reason: str

    @property
    def cause(self) -> str:
        """The reason's first part, up to a colon outside of parentheses, short enough to count by: `head_dim 256`."""
        open_ones = 0
        for i, letter in enumerate(self.reason):
            open_ones += (letter == "(") - (letter == ")")
            if letter == ":" and open_ones == 0:
                return self.reason[:i]
        return self.reason


Decision = Use | Keep

NOISE = 1.02
"""What two measurements of the same shape on the same machine may differ by: a measured speed-up that misses what is
asked for by less does not miss it, unless the kernel fuses prologues, whose share is in part the profile's."""

CanRun = Callable[[AttentionSite, str, str], str | None]
"""(site, format, provider) to None if that provider can run it, else the reason why not."""


def legal(site: AttentionSite, device: Device, formats: Sequence[str]) -> tuple[list[Use], list[str]]:
    """What could replace the call, in the order of the formats and of the table; and why nothing else could.

    Facts alone: neither what is faster, nor whether a kernel can be built here. Without a candidate there is a reason.
    """
    for refusal in _site_limits(site):
        return [], [refusal]
    candidates: list[Use] = []
    limits: list[str] = []
    for name in formats:
        if limit := _format_limit(site, FORMATS[name], device):
            limits.append(limit)
            continue
        for provider in PROVIDERS.values():
            if name not in provider.formats or not _is_for(provider, device):
                continue
            if limit := _provider_limit(site, provider):
                limits.append(limit)
            else:
                fused = site.prologue if site.prologues and fuses((name, provider.name), site.head_dim) else ""
                candidates.append(Use(name, provider.name, fused=fused))
    if not candidates and not limits:
        limits = [f"device {device.type}: no provider runs on it"]
    return candidates, list(dict.fromkeys(limits))


def decide(
    site: AttentionSite,
    device: Device,
    settings: Settings,
    can_run: CanRun,
    local: Measures | None = None,
    cuda_graphs: bool = False,
) -> Decision:
    """Use or Keep for one site. Where lengths are symbols, what is used needs `long_enough` ones: lengths.py asks.

    `auto` goes by what was measured on this machine (`local`), then by the device's profile where that is sure, then by
    a measurement now; what did not win when it ran is kept. `cuda_graphs`: whether launches cost nothing.
    """
    if settings.policy == "never":
        return Keep("policy=never: set sage.policy to auto or always")
    if settings.policy == "auto" and not isinstance(site.head_dim, int):
        wanted = f"head_dim {site.head_dim}: needs a number, as after torch._dynamo.mark_static(q, 3)"
        return Keep(next(_site_limits(site), wanted))
    candidates, refusals = legal(site, device, settings.formats)
    refused: dict[Alternative, str | None] = {}

    def runs(use: Use) -> bool:
        """Asked once a decision: the answer may depend on how much memory there is now."""
        if use.alternative not in refused:
            refused[use.alternative] = can_run(site, use.format, use.provider)
        return refused[use.alternative] is None

    never_wins: list[Use] = []
    if settings.policy == "always" or not candidates:
        chosen: Decision | None = next(filter(runs, candidates), None)
    elif local and (lost := local.loss(site)) is not None:
        return Keep(lost)
    else:
        never_wins = [use for use in candidates if not PROVIDERS[use.provider].may_win]
        known = local.recall(site) if local else {}

        def predicted(use: Use) -> Use:
            wanted = (site, use.format, use.provider, device, settings.min_speedup, cuda_graphs)
            return replace(use, prediction=known.get(use.alternative) or predict(*wanted))

        may_win = [predicted(use) for use in candidates if use not in never_wins]
        chosen = _fastest(may_win, site, device, settings, runs, local)
    if isinstance(chosen, Use):
        return chosen
    refusals += [reason for reason in refused.values() if reason is not None]
    refusals += [chosen.reason] if chosen else []
    if not refusals:
        slow = " and ".join(f"{use.format} by {use.provider}" for use in never_wins)
        refusals = [f"device {device.type}: only {slow}, which never wins: sage.policy=always uses it"]
    return Keep("; ".join(dict.fromkeys(refusals)))


def _is_for(provider: Provider, device: Device) -> bool:
    """Whether this provider is made for such a device; one that is not is no candidate, so no reason names it."""
    return device.type in provider.devices and provider.compute_capability in (None, device.compute_capability)


def _fastest(
    candidates: list[Use],
    site: AttentionSite,
    device: Device,
    settings: Settings,
    runs: Callable[[Use], bool],
    local: Measures | None,
) -> Use | Keep | None:
    """Of those that run the one with the largest speed-up of at least `min_speedup` (see NOISE), the first of
    equal ones.

    Of what another candidate beats only a prediction is looked at. With `local`, what is not sure is measured first.
    """
    left, measured, why_not = list(candidates), set[Alternative](), ""
    while left:
        contenders = [
            use
            for use in left
            if use.prediction or not any(beats(other.alternative, use.alternative) for other in left)
        ]
        unsure = _unsure([use for use in contenders if use.alternative not in measured])
        if local and unsure and not why_not:
            why_not = local.why_not(site, len(unsure)) or ""
            broken = [use for use in unsure if not why_not and not runs(use)]
            if not why_not and not broken:
                measured |= {use.alternative for use in unsure}
                found = local.measure(site, {use.alternative: use.prediction for use in unsure})
                why_not, found = (found, {}) if isinstance(found, str) else ("", found)
                left = [replace(use, prediction=found.get(use.alternative, use.prediction)) for use in left]
            left = [use for use in left if use not in broken]
            continue
        wins = [use for use in contenders if _wins(use, settings)]
        if not wins:
            return _too_slow(contenders, device, settings, why_not)
        best = max(wins, key=_speedup)
        if runs(best):
            return replace(best, others=tuple(use for use in left if use.prediction and use is not best))
        left.remove(best)
    return None


def _speedup(use: Use) -> float:
    return use.prediction.speedup if use.prediction else 0.0


def _wins(use: Use, settings: Settings) -> bool:
    """A measured loss wins nothing, however little of it there is."""
    wanted = settings.min_speedup
    if use.prediction and use.prediction.measured and not use.fused:
        wanted = max(wanted / NOISE, min(wanted, 1.0))
    return _speedup(use) >= wanted


def _unsure(contenders: list[Use]) -> list[Use]:
    """Those that a measurement may decide between; none if no prediction is missing or unsure.

    The unsure ones that may be as fast as the fastest sure one, and the sure ones that may be as fast as they: only
    what ran side by side can be told apart by a little.
    """
    sure = [use for use in contenders if use.prediction and use.prediction.sure]
    unsure = [
        use
        for use in contenders
        if use not in sure and (use.prediction is None or _speedup(use) * NEAR >= max(map(_speedup, sure), default=0.0))
    ]
    if not unsure:
        return []
    best = max(map(_speedup, unsure)) or max(map(_speedup, sure), default=0.0)
    return unsure + [
        use for use in sure if use.prediction and not use.prediction.measured and _speedup(use) * NEAR >= best
    ]


def _too_slow(contenders: list[Use], device: Device, settings: Settings, why_not_measured: str) -> Keep:
    """Of each what was predicted, or why nothing was."""
    slow = [
        f"predicted below {settings.min_speedup:.2f}x: {use.prediction.speedup:.2f}x for {use.format} by "
        f"{use.provider} ({use.prediction.basis})"
        for use in contenders
        if use.prediction
    ]
    unmeasured = ", ".join(f"{use.format} by {use.provider}" for use in contenders if use.prediction is None)
    if unmeasured:
        why = f" ({why_not_measured})" if why_not_measured else ""
        slow.append(f"not measured at this shape on {device.name}{why}, run `sagecompile calibrate`: {unmeasured}")
    return Keep("; ".join(slow))


def _site_limits(site: AttentionSite) -> Iterator[str]:
    """What no format can do, whatever the device."""
    if site.obstacle:
        yield site.obstacle
    if site.needs_grad:
        yield "needs a gradient: run under torch.inference_mode() or torch.no_grad()"
    if site.dropout_p != 0.0:
        yield f"dropout_p {site.dropout_p:g}: needs 0 (model.eval())"
    if site.value_dim != site.head_dim:
        yield f"value head_dim {site.value_dim}: needs q's and k's, {site.head_dim}"
    for what, size in (("batch", site.batch), ("heads", site.heads), ("q_len", site.q_len), ("kv_len", site.kv_len)):
        if isinstance(size, int) and size == 0:
            yield f"{what} 0: nothing to compute"


def _provider_limit(site: AttentionSite, row: Provider) -> str | None:
    """What this provider cannot do."""
    if site.head_dim > row.max_head_dim:
        return f"head_dim {site.head_dim}: needs at most {row.max_head_dim}"
    if site.mask.is_affine and not site.mask.is_plain and not row.causal_offset:
        return f"mask {site.mask}: {row.name} needs none or causal"
    if not (site.mask.is_affine or row.masks):
        behind = " or causal behind a context" if row.causal_offset else ""
        return f"mask {site.mask}: {row.name} needs none, or one that the graph shows to be causal{behind}"
    return None


def _format_limit(site: AttentionSite, row: Format, device: Device) -> str | None:
    """What this format cannot do."""
    if site.dtype not in row.dtypes:
        return f"dtype {site.dtype}: needs {', '.join(row.dtypes)}"
    capability = device.compute_capability
    if capability is not None and capability < row.compute_capability:
        return (
            f"compute capability {capability[0]}.{capability[1]}: {row.name} needs "
            f"{row.compute_capability[0]}.{row.compute_capability[1]}"
        )
    return None
