"""Decide, for one attention call, whether a quantized kernel replaces it.

In: an AttentionSite, the settings, what is known about the device. Out: Use(...) or Keep(reason). First what is legal
(a list of limits, each with its reason), then what is faster (a prediction). No torch op runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    def alternative(self) -> Alternative:
        return self.format, self.provider

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
    site: AttentionSite,
    device: Device,
    settings: Settings,
    can_run: CanRun,
    local: Measures | None = None,
    cuda_graphs: bool = False,
) -> Decision:
    """Use or Keep for one site. Comparing a symbolic size here adds a Dynamo guard, which is what makes it hold.

    `auto` goes by what was measured on this machine (`local`), then by the device's profile where that is sure, then by
    a measurement now. `cuda_graphs`: whether launches cost nothing. A symbolic length is compared once at most: with
    that of the fastest candidate.
    """
    if settings.policy == "never":
        return Keep("policy=never: set sage.policy to auto or always")
    for refusal in _site_limits(site):
        return Keep(refusal)
    refusals: list[str] = []
    candidates: list[Use] = []
    auto = settings.policy == "auto"
    known = local.recall(site) if auto and local else {}
    for name in settings.formats:
        refused = _format_limit(site, FORMATS[name], device)
        if refused:
            refusals.append(refused)
            continue
        for provider in PROVIDERS.values():
            if name in provider.formats and _is_for(provider, device) and (provider.may_win or not auto):
                wanted = (site, name, provider.name, device.name, settings.min_speedup, cuda_graphs)
                prediction = known.get((name, provider.name)) or (predict(*wanted) if auto else None)
                candidates.append(Use(name, provider.name, prediction))
    while candidates:
        chosen = _faster(candidates, site, device, settings, can_run, local) if auto else candidates[0]
        if isinstance(chosen, Keep):
            refusals.append(chosen.reason)
            break
        refused = can_run(site, chosen.format, chosen.provider)
        if refused is None:
            return _if_long_enough(chosen, site)
        refusals.append(refused)
        candidates = [use for use in candidates if use.alternative != chosen.alternative]
    return Keep("; ".join(dict.fromkeys(refusals)) or f"device {device.type}: no provider runs on it")


def _is_for(provider: Provider, device: Device) -> bool:
    """Whether this provider is made for such a device; one that is not is no candidate, so no reason names it."""
    return device.type in provider.devices and provider.compute_capability in (None, device.compute_capability)


def _if_long_enough(use: Use, site: AttentionSite) -> Decision:
    """The one comparison of lengths that are symbols."""
    least = use.prediction.at_least if use.prediction else 0
    if least == 0 or (site.q_len >= least and site.kv_len >= least):
        return use
    return Keep(f"fewer than {least} tokens: {use.format} by {use.provider} wins from there on")


def _faster(
    candidates: list[Use],
    site: AttentionSite,
    device: Device,
    settings: Settings,
    can_run: CanRun,
    local: Measures | None,
) -> Decision:
    """The candidate with the largest speed-up of at least `min_speedup`, the first of equal ones; Keep if none has it.

    Of what another candidate beats only a prediction is looked at. With `local`, what is not sure is measured first.
    """
    contenders = [use for use in candidates if use.prediction or not any(_beats(other, use) for other in candidates)]
    found: Mapping[Alternative, Prediction] | str = {}
    if local:
        unsure = [use for use in contenders if use.prediction is None or not use.prediction.sure]
        for use in unsure:
            if can_run(site, use.format, use.provider) is not None:
                return use  # which says why not
        found = local.measure(site, [use.alternative for use in unsure]) if unsure else {}
    why_not, found = (found, {}) if isinstance(found, str) else ("", found)
    predicted = [replace(use, prediction=found.get(use.alternative, use.prediction)) for use in contenders]
    wins = [use for use in predicted if use.prediction and use.prediction.speedup >= settings.min_speedup]
    if wins:
        return max(wins, key=lambda use: use.prediction.speedup if use.prediction else 0.0)
    slow = [
        f"predicted below {settings.min_speedup:.2f}x: {use.prediction.speedup:.2f}x for {use.format} by "
        f"{use.provider} ({use.prediction.basis})"
        for use in predicted
        if use.prediction
    ]
    unmeasured = ", ".join(f"{use.format} by {use.provider}" for use in predicted if use.prediction is None)
    if unmeasured:
        why = f" ({why_not})" if why_not else ""
        slow.append(f"not measured at this shape on {device.name}{why}: {unmeasured}; run `sagecompile calibrate`")
    return Keep("; ".join(slow))


def _beats(use: Use, other: Use) -> bool:
    return use.format == other.format and other.provider in PROVIDERS[use.provider].beats


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
