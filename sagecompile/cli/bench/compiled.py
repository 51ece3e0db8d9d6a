"""One module compiled by inductor and by sage_inductor, with policy `always` for each format and with `auto`.

In: a module and its inputs. Out: by name what runs it, after a first run that compiled it, and the report of its sites.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from sagecompile import ops
from sagecompile.decide import Use
from sagecompile.formats import FORMATS
from sagecompile.report import Report, recording

from .measure import Call, Measurement, or_left_out, say

BASELINE, AUTO = "inductor", "auto"


@dataclass(frozen=True)
class Compiled:
    """A module under one backend and its options."""

    call: Call
    """Returns the module's output, the first one of a tuple."""
    report: Report | None
    """None for inductor."""
    compile_s: float
    """Of the first call, nothing of it from Inductor's or Triton's caches."""


def ways(auto_only: bool, graph: bool = False) -> dict[str, dict[str, Any]]:
    """By name what torch.compile is given; `graph`: what it returns is captured in a CUDA graph."""
    always = {f"always {name}": {"sage.policy": "always", "sage.formats": name} for name in FORMATS}
    ours = ({} if auto_only else always) | {AUTO: {"sage.policy": "auto", "sage.cuda_graphs": graph}}
    return {
        BASELINE: {"backend": "inductor"},
        **{name: {"backend": "sage_inductor", "options": options} for name, options in ours.items()},
    }


def compile_each(
    module: torch.nn.Module, inputs: Mapping[str, Any], reference: bool, auto_only: bool = False, graph: bool = False
) -> dict[str, Compiled]:
    """Those of `ways` that compile, all on the same module; `reference`: also where plain torch would run a format.

    What rewrites nothing under `always` is left out, it is inductor once more; `auto` that keeps everything is not.
    """
    torch._dynamo.reset()  # nothing of earlier shapes and models: neither their code nor their memory
    gc.collect()
    found: dict[str, Compiled] = {}
    for name, how in ways(auto_only, graph).items():
        with or_left_out(name), recording() as reports:
            call = compiled_apart(module, inputs, how)
            start = time.perf_counter()
            with fresh_cache():
                try:
                    call()
                    compile_s = time.perf_counter() - start
                finally:
                    ops.settle()  # while there is a folder for what is built in the background
            report = None if name == BASELINE else sum(reports, start=Report(graphs=0))
            if report and name != AUTO and not report.used:
                say(name, f"left out: {report.summary()}")
            elif report and not reference and "reference" in _providers(report):
                say(name, "left out: the plain-torch reference would run it, which is slow; --reference times it")
            else:
                found[name] = Compiled(call, report, compile_s)
    return found


def rows(ways: Mapping[str, Compiled], measured: Mapping[str, Measurement]) -> Iterator[dict[str, Any]]:
    """Of what was measured; without inductor there is nothing to compare with, and no row."""
    for name, measurement in measured.items() if BASELINE in measured else ():
        report = ways[name].report
        yield {
            "what": name,
            "us": round(measurement.us, 2),
            "ratio_to_inductor": round(measured[BASELINE].us / measurement.us, 4),
            "error": measurement.error,
            "timed": measurement.timed,
            "compile_s": round(ways[name].compile_s, 2),
            "decisions": decided(report),
            "report": report.to_dict() if report else None,
        }


def decided(report: Report | None) -> str:
    """`2 qk_int8_pv_fp8 by triton; 1 kept: head_dim 256`; empty for inductor."""
    if report is None:
        return ""
    counted = Counter(
        f"{entry.decision.format} by {entry.decision.provider}"
        if isinstance(entry.decision, Use)
        else f"kept: {entry.decision.cause}"
        for entry in report.entries
    )
    return "; ".join(f"{count} {text}" for text, count in counted.items()) or "no attention sites found"


def compiled_apart(module: Callable[..., Any], inputs: Mapping[str, Any], how: Mapping[str, Any]) -> Call:
    """Compiled, at the first call, as a function of its own: Dynamo keeps what it compiled with the code object, and a
    call would look through what it compiled for the other backends."""

    def forward(**inputs: Any) -> Any:
        return module(**inputs)

    forward.__code__ = forward.__code__.replace()
    compiled = torch.compile(forward, dynamic=False, **how)

    def call() -> torch.Tensor:
        out = compiled(**inputs)
        first: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return first

    return call


def _providers(report: Report) -> set[str]:
    return {entry.decision.provider for entry in report.used if isinstance(entry.decision, Use)}
