"""Time whole models of real width and few layers under sage_inductor against inductor.

In: models, lengths, layers. Out: for each model and length one row a backend and its options, with the error of the
output against inductor's, the peak memory of a forward, and the report of its sites. Weights are random, in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from textwrap import indent
from typing import Any

import torch

from .compiled import BASELINE, compile_each, rows
from .measure import Call, measure, or_left_out, relative_error, say
from .session import device_of, require, results

Case = tuple[torch.nn.Module, dict[str, Any]]
"""A model and the keyword arguments of its forward, which returns a tuple."""

TEXT_TOKENS = 512
"""Of a prompt, as the pipelines of Flux and Wan pad it; 16 with --small."""


def flux(diffusers: Any, length: int, layers: int, small: bool) -> Case:
    """`layers` double and `layers` single blocks; one image whose tokens and the prompt's make `length`."""
    heads, head_dim, axes, text_dim = (2, 64, (16, 24, 24), 64) if small else (24, 128, (16, 56, 56), 4096)
    text = _text_tokens(small)
    if length <= text:
        raise ValueError(f"length {length}: {text} are text, needs more")
    rows, columns = near_cube(length - text, 2)
    model = diffusers.FluxTransformer2DModel(
        num_layers=layers,
        num_single_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        axes_dims_rope=axes,
        joint_attention_dim=text_dim,
    )
    return model, {
        "hidden_states": torch.randn(1, length - text, 64),
        "encoder_hidden_states": torch.randn(1, text, text_dim),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def wan(diffusers: Any, length: int, layers: int, small: bool, heads: int, ffn_dim: int) -> Case:
    """One video whose latents have `length` patches; cross-attention to the prompt."""
    heads, head_dim, ffn_dim, text_dim = (2, 64, 256, 64) if small else (heads, 128, ffn_dim, 4096)
    frames, height, width = near_cube(length, 3)
    model = diffusers.WanTransformer3DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn_dim, text_dim=text_dim
    )
    return model, {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width),  # patches of 1 x 2 x 2
        "encoder_hidden_states": torch.randn(1, _text_tokens(small), text_dim),
        "timestep": torch.full((1,), 500),
        "return_dict": False,
    }


def llama(transformers: Any, length: int, layers: int, small: bool) -> Case:
    """The prefill of one prompt, logits for its last token."""
    hidden, heads, kv_heads, ffn_dim, vocabulary = (128, 2, 1, 256, 256) if small else (4096, 32, 8, 14336, 128256)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn_dim,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    tokens = torch.randint(0, vocabulary, (1, length))
    inputs = {"input_ids": tokens, "use_cache": False, "logits_to_keep": 1, "return_dict": False}
    return transformers.LlamaForCausalLM(config), inputs


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    package: str
    make: Callable[[Any, int, int, bool], Case]
    """Of the package, the length, the layers, whether it is small."""
    lengths: tuple[int, ...]
    """Where --lengths names none."""


FAMILIES = {
    "flux": Family("diffusers", flux, (4608, 16896)),  # images of 1024 x 1024 and 2048 x 2048
    "wan": Family("diffusers", partial(wan, heads=12, ffn_dim=8960), (4096, 16384, 32768)),
    "wan-14b": Family("diffusers", partial(wan, heads=40, ffn_dim=13824), (4096, 16384, 32768)),
    "llama": Family("transformers", llama, (8192, 32768, 65536)),
}


def near_cube(volume: int, sides: int) -> tuple[int, ...]:
    """`sides` whole numbers with that product, as equal as they can be taken one after the other."""
    if sides == 1:
        return (volume,)
    most = int(volume ** (1 / sides) + 1e-9)
    side = next(side for side in range(max(1, most), 0, -1) if volume % side == 0)
    return (side, *near_cube(volume // side, sides - 1))


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments)
    families = {name: FAMILIES[name] for name in arguments.models}
    packages = {name: require(family.package, f"--models {name}") for name, family in families.items()}
    with results(arguments, device) as found, torch.no_grad():
        found |= {"layers": arguments.layers, "small": arguments.small}
        print(f"{'model':8} {'length':>6}  {'what':24} {'ms':>10} {'ratio':>6} {'error':>7} {'GiB':>6}  decisions")
        for name, family in families.items():
            for length in arguments.lengths or family.lengths:
                with or_left_out(f"{name} {length}"):
                    make = partial(family.make, packages[name], length, arguments.layers, arguments.small)
                    case = build(make, device)
                    for row in time_model(case, device, arguments.reference):
                        found["rows"].append({"model": name, "length": length} | row)
                        print(_render(name, length, row), flush=True)
    return 0


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


def time_model(case: Case, device: torch.device, reference: bool) -> Iterator[dict[str, Any]]:
    """One row a backend and its options; prints the report of each before."""
    model, inputs = case
    ways = compile_each(model, inputs, reference)
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


def _text_tokens(small: bool) -> int:
    return 16 if small else TEXT_TOKENS


def _render(name: str, length: int, row: dict[str, Any]) -> str:
    figures = f"{row['us'] / 1e3:10.2f} {row['ratio_to_inductor']:6.2f} {row['error']:7.4f}"
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
    return f"{name:8} {length:6}  {row['what']:24} {figures} {peak:>6}  {row['decisions']}"
