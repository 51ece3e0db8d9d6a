"""Say what this machine can run: device, versions, formats and providers, and why not.

In: nothing but the machine. Out: a table, or JSON. Kernels are tried for real, on small inputs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagecompile.formats import Provider

HELP = "what this machine can run, and why not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    found = examine()
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 0


def examine() -> dict[str, Any]:
    """Versions, devices with every format and provider on them, and the settings in force."""
    import dataclasses

    import torch

    import sagecompile
    from sagecompile import files, settings
    from sagecompile.kernels import available

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    names = {"python": platform.python_version(), "torch": torch.__version__, "sagecompile": sagecompile.__version__}
    optional = {name: available.version(name) or "not installed" for name in ("triton", "sageattention")}
    return {
        "versions": names | optional | {"cuda": torch.version.cuda or "none in this torch"},
        "settings": dataclasses.asdict(settings.from_environment()),
        "measurements": str(files.folder("measured")),
        "cannot_keep": files.why_not_kept("measured"),
        "devices": [_examine_device(name) for name in devices],
    }


def _examine_device(name: str) -> dict[str, Any]:
    from sagecompile.backend import measurements
    from sagecompile.cost import profiles, store
    from sagecompile.formats import FORMATS, PROVIDERS
    from sagecompile.kernels import available
    from sagecompile.kernels.hopper import relaunch

    device = available.device(name)
    profile = profiles().get(device.name)
    rows = []
    for format in FORMATS.values():
        for provider in PROVIDERS.values():
            if device.type in provider.devices and format.name in provider.formats:
                reason = _why_not(name, format.name, provider.name)
                row = {"format": format.name, "provider": provider.name, "works": reason is None, "why": reason}
                rows.append(row | {"does": _abilities(provider)})
    return {
        "device": name,
        "name": device.name,
        "compute_capability": device.compute_capability,
        "measured": store.count(measurements(name, cuda_graphs=False).machine, without=("calibration", "lost")),
        "profile": {"date": profile.date, "source": profile.source} if profile else None,
        "slow_launches": relaunch.why_not() if device.slow_launches else None,
        "formats": rows,
    }


def _abilities(provider: Provider) -> dict[str, Any]:
    """What `decide` asks of it."""
    names = ("head_dims", "causal_offset", "masks", "prologues", "cuda_graphs", "may_win")
    return {name: getattr(provider, name) for name in names}


def _why_not(device: str, format: str, provider: str) -> str | None:
    """Try one ordinary attention call: 1024 tokens, 16 heads of 128, bfloat16."""
    from sagecompile.decide import legal
    from sagecompile.kernels import available
    from sagecompile.site import AttentionSite

    site = AttentionSite("doctor", "", "sdpa", 1, 16, 16, 1024, 1024, 128, 128, "bfloat16", device)
    candidates, limits = legal(site, available.device(device), (format,))
    if not candidates:  # the format itself cannot
        return "; ".join(limits)
    return available.refusal(site, format, provider, cuda_graphs=False)


def render(found: dict[str, Any]) -> str:
    """The same as text."""
    lines = [f"{name:13} {value}" for name, value in found["versions"].items()]
    lines += ["", "settings      " + ", ".join(f"{key}={value}" for key, value in found["settings"].items())]
    lines.append(f"measurements  in {found['measurements']}")
    if found["cannot_keep"]:
        lines.append(f"              not kept: {found['cannot_keep']}, so every process measures again")
    for device in found["devices"]:
        capability = device["compute_capability"]
        shown = f", compute capability {capability[0]}.{capability[1]}" if capability else ""
        lines += ["", f"{device['device']}: {device['name']}{shown}"]
        if device["profile"]:
            date, source = device["profile"]["date"], device["profile"]["source"]
            age = (datetime.date.today() - datetime.date.fromisoformat(date)).days
            other = "measures" if found["settings"]["measure"] else "keeps"
            lines.append(
                f"  profile of {date}, {age} days old, {source}: policy=auto goes by it, and {other} other shapes"
            )
        else:
            lines.append("  no profile: policy=auto measures each shape when it is first compiled, and remembers it;")
            lines.append("  `sagecompile calibrate` measures a grid of them in about two minutes")
        if device["slow_launches"]:
            lines.append(f"  {device['slow_launches']}: Python launches each kernel, and only")
            lines.append("  in CUDA graphs does policy=auto go by a shipped profile")
        lines.append(f"  {device['measured']} measurements that hold for these versions")
        lines += [
            f"  {row['format']:15} {row['provider']:13} {_said(row['does']) if row['works'] else 'no: ' + row['why']}"
            for row in device["formats"]
        ]
    return "\n".join(lines)


def _said(does: dict[str, Any]) -> str:
    """`works: head_dim up to 128, causal behind a context, any mask, norm and RoPE of q and k`."""
    able = [f"head_dim up to {does['head_dims'][-1]}"]
    able += ["causal behind a context"] if does["causal_offset"] else []
    able += ["any mask"] if does["masks"] else []
    able += ["norm and RoPE of q and k"] if does["prologues"] else []
    able += [] if does["cuda_graphs"] else ["not in CUDA graphs"]
    able += [] if does["may_win"] else ["never chosen by policy=auto"]
    return f"works: {', '.join(able)}"
