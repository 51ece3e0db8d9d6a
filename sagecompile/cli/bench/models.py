"""Time whole models of real width and few layers under sage_inductor against inductor.

In: models, lengths, sequences, layers. Out: for each model, length and number of sequences one row a backend and its
options, with how long compiling took, the error of the output against inductor's, the peak memory of a forward, and
the report of its sites. Weights are random, in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from textwrap import indent
from typing import Any

import torch
import torch.nn.functional as F

from .compiled import BASELINE, compile_each, rows
from .families import FAMILIES, Case
from .measure import Call, measure, or_left_out, relative_error, say
from .session import device_of, require, results


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments)
    families = {name: FAMILIES[name] for name in arguments.models}
    packages = {name: require(family.package, f"--models {name}") for name, family in families.items()}
    with results(arguments, device) as found, torch.no_grad():
        found |= {"layers": arguments.layers, "small": arguments.small}
        compile_trivial(device)
        print(
            f"{'model':12} {'length':>6} {'batch':>5}  {'what':24} {'ms':>10} {'ratio':>6} {'error':>7} {'GiB':>6} "
            f"{'compile s':>9}  decisions"
        )
        for name, family in families.items():
            lengths = arguments.lengths or (family.lengths[:1] if arguments.small else family.lengths)
            for length, batch in product(lengths, arguments.batches):
                with or_left_out(f"{name} {length}"):
                    make = partial(family.make, packages[name], length, arguments.layers, batch, arguments.small)
                    case = build(make, device)
                    for row in time_model(case, device, arguments.reference, arguments.auto_only):
                        found["rows"].append({"model": name, "length": length, "batch": batch} | row)
                        print(_render(found["rows"][-1]), flush=True)
    return 0


def compile_trivial(device: torch.device) -> None:
    """So that no model pays for what the first compilation of a process starts, nor for what a machine builds once."""
    q = torch.ones(1, 1, 128, 64, device=device, dtype=torch.bfloat16)
    torch.compile(F.scaled_dot_product_attention, backend="sage_inductor", options={"sage.policy": "always"})(q, q, q)


def build(make: Callable[[], Case], device: torch.device) -> Case:
    """The same on every call, on that device, in bfloat16 but for what the model keeps in float32."""
    torch.manual_seed(0)
    with torch.device(device):
        model, inputs = make()
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():  # buffers stay: RoPE's frequencies need float32
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    for name, x in inputs.items():
        if torch.is_tensor(x) and x.is_floating_point():
            inputs[name] = x.to(torch.bfloat16)
    return model.eval().requires_grad_(False), inputs


def time_model(case: Case, device: torch.device, reference: bool, auto_only: bool) -> Iterator[dict[str, Any]]:
    """One row a backend and its options; prints the report of each before."""
    model, inputs = case
    ways = compile_each(model, inputs, reference, auto_only)
    if BASELINE not in ways:
        return
    for name, way in ways.items():
        if way.report:
            say(name, f"its sites\n{indent(str(way.report), '    ')}")
    expected = ways[BASELINE].call()
    calls = {name: way.call for name, way in ways.items()}
    measured = measure(calls, device, graph=False, error=lambda out: relative_error(out, expected))
    for row in rows(ways, measured):
        yield row | {"peak_gib": peak_gib(calls[row["what"]], device)}


def peak_gib(call: Call, device: torch.device) -> float | None:
    """Of GPU memory in one call, weights and inputs included; None where torch does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)


def _render(row: dict[str, Any]) -> str:
    model = f"{row['model']:12} {row['length']:6} {row['batch']:5}"
    figures = f"{row['us'] / 1e3:10.2f} {row['ratio_to_inductor']:6.2f} {row['error']:7.4f}"
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
    return f"{model}  {row['what']:24} {figures} {peak:>6} {row['compile_s']:9.1f}  {row['decisions']}"
