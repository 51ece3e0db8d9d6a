"""What the tests of real models share: run one rewritten, and compare the sites found with those expected.

In: a model and the keyword inputs of its calls. Out: the Report, and how far its first output is from the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from support import ACCURATE, Rewriter, relative_error
from torch.utils._pytree import tree_map_only

from sagecompile.decide import Use
from sagecompile.kernels import cpu
from sagecompile.report import Report


def provider(device: str, format: str) -> str:
    """Who runs the sites of a device under policy=always."""
    if device == "cuda":
        return "hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    return "cpu" if format == ACCURATE and cpu.why_not() is None else "reference"


def on(device: str, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The inputs on that device, those with a floating dtype in that one."""
    moved = tree_map_only(torch.Tensor, lambda x: x.to(device), inputs)
    return tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, moved)


def run(
    model: Any, *calls: dict[str, Any], dynamic: bool | None = None, format: str = ACCURATE
) -> tuple[Report, float]:
    """The calls through one model that is rewritten but not compiled: its Report, and the largest relative error."""
    backend = Rewriter(formats=(format,))
    rewritten = torch.compile(model, backend=backend, dynamic=dynamic)
    error = max(relative_error(rewritten(**call)[0], model(**call)[0]) for call in calls)
    return backend.report, error


def assert_sites(report: Report, expected: dict[str, str]) -> None:
    """Exactly these sites in this order, kept with a reason that starts so, or used where it is "".

    Behind a graph break (torch 2.11 has one between Whisper's encoder and decoder) a path starts below the outermost
    module.
    """
    names = [entry.site.name for entry in report.entries]
    assert names == list(expected) if report.graphs == 1 else len(names) == len(expected)
    assert all(full.endswith(name) for full, name in zip(expected, names, strict=True))
    for entry, because in zip(report.entries, expected.values(), strict=True):
        reason = "" if isinstance(entry.decision, Use) else entry.decision.reason
        assert reason.startswith(because) and bool(reason) == bool(because), (entry.site.name, reason)


def assert_run_by(report: Report, format: str, device: str) -> None:
    """Every used site runs in that format, by the device's own provider."""
    assert {(entry.decision.format, entry.decision.provider) for entry in report.used} <= {
        (format, provider(device, format))
    }
