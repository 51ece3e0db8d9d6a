"""Find out what this machine can run: the only place where anything is detected or tried.

In: a device, a provider, a site. Out: facts (`Device`), or the reason why not as text. A kernel is trusted after a
trial on this very device: built, launched, and compared with SDPA, once for each combination that compiles differently.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from sagecompile.formats import FORMATS, PROVIDERS, beats, fuses
from sagecompile.site import AttentionSite, Device, Prologue

from . import launcher, module
from .call import Call
from .prologue import example
from .sdpa import sdpa

logger = logging.getLogger("sagecompile")


def device(name: str) -> Device:
    """The facts of a torch device such as `cuda:0`."""
    found = torch.device(name)
    if found.type == "cuda":
        return _cuda_device(found)
    if found.type == "cpu":
        return Device("cpu", _cpu_name(), threads=torch.get_num_threads())
    return Device(found.type, found.type)


@cache
def _cuda_device(device: torch.device) -> Device:
    from .hopper import relaunch  # late: a CPU needs none of it

    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Device("cuda", name, capability, slow_launches=relaunch.why_not() is not None)


@cache
def machine(name: str) -> dict[str, str | int | None]:
    """What a time measured on a torch device holds for: the device, what runs on it, and with what."""
    found: dict[str, str | int | None] = {"device": device(name).name}
    found |= {"torch": torch.__version__, "triton": version("triton"), "sageattention": version("sageattention")}
    cuda = {"driver": _nvidia_driver(), "slow_launches": device(name).slow_launches}
    return found | (cuda if device(name).type == "cuda" else {})


def _nvidia_driver() -> str | None:
    """The line with its version, where Linux's kernel module gives one."""
    said = Path("/proc/driver/nvidia/version")
    return said.read_text().partition("\n")[0] if said.exists() else None


CPU_KINDS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512_vnni": "AVX-512 VNNI"}
"""Of CPUs that virtual machines call by one name, by Linux's name of the best that SDPA or our kernel use."""


@cache
def _cpu_name() -> str:
    """`AMD EPYC (AVX-512 BF16)`: what runs as fast as another of this name."""
    from .cpu import build

    lines = build.CPUINFO.read_text().splitlines() if build.CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    features = build.features()
    kind = next((kind for feature, kind in CPU_KINDS.items() if feature in features), None)
    return f"{name} ({kind})" if kind else name


def version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def refusal(site: AttentionSite, format: str, provider: str, cuda_graphs: bool) -> str | None:
    """Why this provider cannot run this site in this format here, or None if it can."""
    row = PROVIDERS[provider]
    if version(row.package) is None:
        return f"{row.package} not installed: pip install {row.package}"
    capability = device(site.device).compute_capability
    if row.compute_capability not in (None, capability):
        return f"compute capability {_dotted(capability)}: {provider} needs {_dotted(row.compute_capability)}"
    reason = _own_refusal(site, format, provider, cuda_graphs)
    if reason is not None:
        return reason
    if site.head_dim > row.max_head_dim:
        return f"head_dim {site.head_dim}: needs at most {row.max_head_dim}"
    if row.trial_tokens is None:
        return None
    padded = min(d for d in row.head_dims if d >= site.head_dim)
    prologues = site.prologues if site.prologues and fuses((format, provider), site.head_dim) else None
    return _tried(provider, format, site.device, padded, site.dtype, site.mask.is_causal, prologues)


def _own_refusal(site: AttentionSite, format: str, provider: str, cuda_graphs: bool) -> str | None:
    """What the provider's module says; nothing where it cannot be imported, as the trial finds out why."""
    try:
        found = module(provider)
    except Exception:  # a broken package may raise anything
        return None
    own: Callable[..., str | None] | None = getattr(found, "refusal", None)
    return own(site, format, cuda_graphs) if own else None


def _dotted(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else f"{capability[0]}.{capability[1]}"


def runners(site: AttentionSite, *, slow: bool = False) -> list[tuple[str, str]]:
    """Every (format, provider) that can run this site outside of CUDA graphs; `slow`: also what cannot win."""
    found: list[tuple[str, str]] = []
    for provider in PROVIDERS.values():
        if site.device_type not in provider.devices or not (slow or provider.may_win):
            continue
        for format in provider.formats:
            beaten = any(beats(other, (format, provider.name)) for other in found)
            if (slow or not beaten) and refusal(site, format, provider.name, cuda_graphs=False) is None:
                found.append((format, provider.name))
    return found


_NO_MEMORY = (torch.OutOfMemoryError, MemoryError)


def _tried(provider: str, *what: Any) -> str | None:
    """As `_trial`, which is remembered unless memory was short: there may be more the next time."""
    try:
        return _trial(provider, *what)
    except _NO_MEMORY as failure:
        return f"{provider} not tried: {str(failure).strip() or 'no memory'}"


@cache
def _trial(
    provider: str,
    format: str,
    device_name: str,
    head_dim: int,
    dtype: str,
    is_causal: bool,
    prologues: tuple[Prologue, Prologue] | None,
) -> str | None:
    """Build and launch the kernel on a small input and compare it with SDPA; the failure as text, or None.

    Raises what a machine without memory raises.
    """
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            error = _trial_error(provider, format, torch.device(device_name), head_dim, dtype, is_causal, prologues)
    except _NO_MEMORY:
        raise
    # Broad on purpose: whatever a broken package, compiler or driver raises, the model must still run without us.
    except Exception as failure:
        reason = f"{provider} failed: {type(failure).__name__}: {str(failure).strip() or 'no message'}"
        logger.warning("%s by %s cannot run on %s: %s", format, provider, device_name, reason)
        return reason
    bound = 2 * FORMATS[format].error_bound
    if error <= bound:
        return None
    reason = f"{provider} wrong: relative error {error:.3g} in a trial, needs at most {bound:g}"
    logger.warning("%s by %s cannot be trusted on %s: %s", format, provider, device_name, reason)
    return reason


def _trial_error(
    provider: str,
    format: str,
    where: torch.device,
    head_dim: int,
    dtype: str,
    is_causal: bool,
    prologues: tuple[Prologue, Prologue] | None,
) -> float:
    generator = torch.Generator().manual_seed(0)  # its own: the user's random numbers stay as they are
    tokens = PROVIDERS[provider].trial_tokens
    assert tokens is not None
    shape = (3, 1, 2, tokens, head_dim)
    q, k, v = torch.randn(shape, generator=generator).to(where, getattr(torch, dtype))
    q_prologue, k_prologue = (
        kind and example(kind, tokens, head_dim, generator, where) for kind in prologues or (None, None)
    )
    call = Call(q, k, v, head_dim**-0.5, 0 if is_causal else None, q_prologue, k_prologue)
    out = torch.empty_like(q)
    launcher(provider)(call, out, format=format)
    expected = sdpa(replace(call, q=q.float(), k=k.float(), v=v.float()).after_prologues())
    return float((out.float() - expected).norm() / expected.norm())
