"""Decide, for one attention call, whether a quantized kernel replaces it.

In: an AttentionSite, the settings, what is known about the device. Out: Use(...) or Keep(reason). First what is legal
(a list of limits, each with its reason), then what is faster (a prediction). No torch op runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .cost import Alternative, Measures, Prediction, predict
from .formats import FORMATS, PROVIDERS, Format, Provider
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
    """What the kernel does besides attention, as the rewritten graph says: `QK-norm and RoPE`."""

    @property
    def reason(self) -> str:
        why = "policy=always"
        if self.prediction is not None:
            why = f"{self.prediction.speedup:.2f}x predicted ({self.prediction.basis})"
        return f"{why}; {self.fused} fused" if self.fused else why


@dataclass(frozen=True)
class Keep:
    """Leave the call as it is. The reason reads `cause value: what is needed`."""

    reason: str

    @property
    def cause(self) -> str:
        """The reason's first part, short enough to count by: `head_dim 256`."""
        return self.reason.partition(":")[0]


Decision = Use | Keep

CanRun = Callable[[AttentionSite, str, str], str | None]
"""(site, format, provider) to None if that provider can run it, else the reason why not."""


def decide(
    site: AttentionSite, device: Device, settings: Settings, can_run: CanRun, local: Measures | None = None
) -> Decision:
    """Use or Keep for one site. Comparing a symbolic size here adds a Dynamo guard, which is what makes it hold.

    `auto` goes by what was measured on this machine (`local`), then by the device's profile, then by a measurement now.
    """
    if settings.policy == "never":
        return Keep("policy=never: set sage.policy to auto or always")
    for refusal in _site_limits(site):
        return Keep(refusal)
    refusals: list[str] = []
    slow: list[str] = []
    candidates: list[Use] = []
    why_not = ""
    auto = settings.policy == "auto"
    known = local.recall(site) if auto and local else {}
    for name in settings.formats:
        refused = _format_limit(site, FORMATS[name], device)
        if refused:
            refusals.append(refused)
            continue
        for provider in PROVIDERS.values():
            if name in provider.formats and _is_for(provider, device) and (provider.may_win or not auto):
                wanted = (site, name, provider.name, device.name, settings.min_speedup)
                prediction = known.get((name, provider.name)) or (predict(*wanted) if auto else None)
                candidates.append(Use(name, provider.name, prediction))
    if auto:
        if local:
            candidates, why_not, cannot = _measured_now(candidates, site, can_run, local)
            refusals += cannot
        candidates, slow = _predicted_wins(candidates, device, settings, why_not)
    for use in sorted(candidates, key=_by_prediction):
        refused = can_run(site, use.format, use.provider)
        if refused is None:
            return use
        refusals.append(refused)
    return Keep("; ".join(dict.fromkeys(refusals + slow)) or f"device {device.type}: no provider runs on it")


def _is_for(provider: Provider, device: Device) -> bool:
    """Whether this provider is made for such a device; one that is not is no candidate, so no reason names it."""
    return device.type in provider.devices and provider.compute_capability in (None, device.compute_capability)


def _by_prediction(use: Use) -> float:
    """The largest predicted speed-up first; equal ones, and what is not predicted, keep the tables' order."""
    return -use.prediction.speedup if use.prediction else 0.0


def _measured_now(
    candidates: list[Use], site: AttentionSite, can_run: CanRun, local: Measures
) -> tuple[list[Use], str, list[str]]:
    """The candidates that can run, with a measurement where nothing was known; why there is none; why some cannot."""
    unknown = [use for use in candidates if use.prediction is None]
    refused = {use: can_run(site, use.format, use.provider) for use in unknown}
    wanted: list[Alternative] = [(use.format, use.provider) for use in unknown if refused[use] is None]
    found = local.measure(site, wanted) if wanted else {}
    why_not, found = (found, {}) if isinstance(found, str) else ("", found)
    able = [
        replace(use, prediction=use.prediction or found.get((use.format, use.provider)))
        for use in candidates
        if refused.get(use) is None
    ]
    return able, why_not, [reason for reason in refused.values() if reason is not None]


def _predicted_wins(
    candidates: list[Use], device: Device, settings: Settings, why_not_measured: str
) -> tuple[list[Use], list[str]]:
    """The candidates predicted to win, and one reason for each kind of the others."""
    wins, refusals, unmeasured = [], [], []
    for use in candidates:
        if use.prediction is None:
            unmeasured.append(f"{use.format} by {use.provider}")
        elif use.prediction.speedup < settings.min_speedup:
            refusals.append(
                f"predicted below {settings.min_speedup:.2f}x: {use.prediction.speedup:.2f}x for {use.format} by "
                f"{use.provider} ({use.prediction.basis})"
            )
        else:
            wins.append(use)
    if unmeasured:
        why = f" ({why_not_measured})" if why_not_measured else ""
        names = ", ".join(unmeasured)
        refusals.append(f"not measured at this shape on {device.name}{why}: {names}; run `sagecompile calibrate`")
    return wins, refusals


def _site_limits(site: AttentionSite) -> Iterator[str]:
    """What no format can do, whatever the device."""
    if site.obstacle:
        yield site.obstacle
    if site.needs_grad:
        yield "needs a gradient: run under torch.inference_mode() or torch.no_grad()"
    if site.dropout_p != 0.0:
        yield f"dropout_p {site.dropout_p:g}: needs 0 (model.eval())"
    if site.mask is not None:
        yield f"mask {site.mask}: needs none, or one that the graph shows to be causal"
    if site.value_dim != site.head_dim:
        yield f"value head_dim {site.value_dim}: needs q's and k's, {site.head_dim}"
    for what, size in (("batch", site.batch), ("heads", site.heads), ("q_len", site.q_len), ("kv_len", site.kv_len)):
        if size == 0:
            yield f"{what} 0: nothing to compute"


def _format_limit(site: AttentionSite, row: Format, device: Device) -> str | None:
    """What this format cannot do."""
    if site.dtype not in row.dtypes:
        return f"dtype {site.dtype}: needs {', '.join(row.dtypes)}"
    if site.head_dim > row.max_head_dim:
        return f"head_dim {site.head_dim}: needs at most {row.max_head_dim}"
    capability = device.compute_capability
    if capability is not None and capability < row.compute_capability:
        return (
            f"compute capability {capability[0]}.{capability[1]}: {row.name} needs "
            f"{row.compute_capability[0]}.{row.compute_capability[1]}"
        )
    return None
