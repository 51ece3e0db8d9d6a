"""Time attention: every format and provider against what torch and other packages have, each figure beside its error.

In: shapes. Out: for each, one row a contestant, all on the same inputs in the same run. `ratio_to_best` is against the
fastest one that does not quantize, `ratio_to_sdpa` against plain SDPA. Everyone gets q, k and v in the layout it likes
best: contiguous (B, H, N, D), and packed (B * N, H, D) for FlashAttention-3; that copy is made before the timing.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sagecompile.formats import PROVIDERS
from sagecompile.kernels import available
from sagecompile.ops import attention

from . import flash_attention_3
from .alternatives import sageattention_package, unquantized
from .kernel_only import Apart, copy_gb_per_s, offered, take_apart
from .measure import Call, Error, Measurement, measure, or_left_out, relative_error, say
from .plot import draw
from .session import captures_graphs, device_of, require, results
from .shapes import HEADER, QKV, Shape, inputs, shapes

SAMPLED_QUERIES = 128


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments)
    graph = captures_graphs(arguments, device)
    if arguments.plot:
        require("matplotlib", "--plot")
    with results(arguments, device) as found, torch.inference_mode():
        with_flash_attention_3 = flash_attention_3.load(arguments.flash_attention_3, device)
        if arguments.kernel_only:
            found |= {"copy_gb_per_s": round(copy_gb_per_s(device, graph), 1), "quantization": []}
            print(f"kernels alone; a copy on the device: {found['copy_gb_per_s']:.0f} GB/s, read and written")
            _say_who_cannot_be_taken_apart(device)
        print(f"{HEADER}  {'what':28} {'us':>10} {'TFLOP/s':>8} {'of best':>7} {'of sdpa':>7} {'error':>7} timed")
        for shape in shapes(arguments, device):
            with or_left_out(str(shape)):
                qkv = inputs(shape, device)
                entered = enter(shape, qkv, arguments.kernel_only, arguments.reference, with_flash_attention_3)
                error = error_against_float64(*qkv, shape.is_causal)
                calls, budget_s = entered.plain | entered.quantized, arguments.seconds
                measured = measure(calls, device, graph, error, entered.eager_only, budget_s)
                for row in attention_rows(shape, measured, entered.plain):
                    found["rows"].append(row)
                    print(_render(shape, row), flush=True)
                calls = {name: kernels.quantize for name, kernels in entered.apart.items()}
                measured = measure(calls, device, graph, budget_s=budget_s)
                for name, measurement in measured.items():
                    least_bytes = entered.apart[name].least_bytes
                    row = quantization_row(shape, name, measurement, least_bytes, found["copy_gb_per_s"])
                    found["quantization"].append(row)
                    print(_render_quantization(shape, row), flush=True)
    if arguments.plot:
        draw(found["rows"], found["device"], arguments.plot)
    return 0


@dataclass(frozen=True)
class Contestants:
    """Of one shape: calls by name that return (B, H, N, D)."""

    plain: dict[str, Call]
    """They do not quantize."""
    quantized: dict[str, Call]
    apart: dict[str, Apart]
    """With --kernel-only: those of `quantized`, with their quantization."""
    eager_only: set[str]
    """They say themselves that they cannot be captured in a CUDA graph."""


def enter(shape: Shape, qkv: QKV, kernel_only: bool, reference: bool, with_flash_attention_3: bool) -> Contestants:
    """Everyone who can run this shape; the plain-torch reference only where it is asked for."""
    q, k, v = qkv
    site = shape.site(q.device)
    runners = available.runners(site, slow=reference)
    apart: dict[str, Apart] = {}
    if kernel_only:
        apart = take_apart(q, k, v, shape.is_causal, runners)
        quantized = {name: kernels.attend for name, kernels in apart.items()}
    else:
        whole = partial(attention, q, k, v, scale=None, ahead=0 if shape.is_causal else None, tokens_first=False)
        quantized = {f"{format} {name}": partial(whole, format=format, provider=name) for format, name in runners}
        quantized |= sageattention_package(q, k, v, shape.is_causal)
    return Contestants(
        plain=unquantized(q, k, v, shape.is_causal, with_flash_attention_3),
        quantized=quantized,
        apart=apart,
        eager_only={
            f"{format} {name}"
            for format, name in runners
            if available.refusal(site, format, name, cuda_graphs=True) is not None
        },
    )


def _say_who_cannot_be_taken_apart(device: torch.device) -> None:
    for provider in PROVIDERS.values():
        if device.type in provider.devices and provider.may_win and offered(provider.name) is None:
            say(provider.name, "left out: it does not offer quantize and attend apart")


def error_against_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> Error:
    """Relative L2 error of evenly spaced queries of the first head of the first sequence and the last of the last."""
    length = q.shape[2]
    rows = torch.linspace(0, length - 1, min(length, SAMPLED_QUERIES), device=q.device).long()

    def sample(x: torch.Tensor) -> torch.Tensor:  # (2, N, D) of (B, H, N, D)
        return torch.stack((x[0, 0], x[-1, -1])).double()

    scores = sample(q)[:, rows] @ sample(k).mT * q.shape[3] ** -0.5
    if is_causal:
        scores.masked_fill_(torch.arange(length, device=q.device) > rows[:, None], float("-inf"))
    expected = scores.softmax(-1) @ sample(v)
    return lambda out: relative_error(sample(out)[:, rows], expected)


def attention_rows(
    shape: Shape, measured: Mapping[str, Measurement], plain: Collection[str]
) -> Iterator[dict[str, Any]]:
    """`plain` names those that do not quantize; without one of them there is nothing to compare with, and no row."""
    if "sdpa" not in measured:
        say(str(shape), "left out: SDPA itself did not run")
        return
    best = min(measurement.us for name, measurement in measured.items() if name in plain)
    for name, measurement in measured.items():
        yield shape.to_dict() | {
            "what": name,
            "quantized": name not in plain,
            "us": round(measurement.us, 2),
            "tflops": round(shape.flops / measurement.us * 1e-6, 3),
            "ratio_to_best": round(best / measurement.us, 4),
            "ratio_to_sdpa": round(measured["sdpa"].us / measurement.us, 4),
            "error": round(measurement.error or 0.0, 5),
            "timed": measurement.timed,
        }


def quantization_row(
    shape: Shape, name: str, measurement: Measurement, least_bytes: int, copy_gb_per_s: float
) -> dict[str, Any]:
    """The floor is the time in which the device copies `least_bytes`."""
    floor_us = least_bytes / copy_gb_per_s * 1e-3
    return shape.to_dict() | {
        "what": name,
        "us": round(measurement.us, 2),
        "least_bytes": least_bytes,
        "gb_per_s": round(least_bytes / measurement.us * 1e-3, 1),
        "floor_us": round(floor_us, 2),
        "ratio_to_floor": round(measurement.us / floor_us, 3),
        "timed": measurement.timed,
    }


def _render(shape: Shape, row: dict[str, Any]) -> str:
    figures = f"{row['us']:10.1f} {row['tflops']:8.2f} {row['ratio_to_best']:7.2f} {row['ratio_to_sdpa']:7.2f}"
    return f"{shape}  {row['what']:28} {figures} {row['error']:7.4f} {row['timed']}"


def _render_quantization(shape: Shape, row: dict[str, Any]) -> str:
    floor = f"{row['ratio_to_floor']:.2f} x the floor of {row['floor_us']:.1f} us"
    return (
        f"{shape}  {row['what'] + ' quantize':28} {row['us']:10.1f} {row['gb_per_s']:8.0f} GB/s, {floor} {row['timed']}"
    )
