"""QK-norm and RoPE of real models go into the attention op wherever that is right, and nothing else changes.

In float32 the quantization is taken out of the reference, so that only its own rounding is left.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import zoo
from support import FAST, TOLERANCE, Rewriter, compiled, relative_error

HEAD_DIM = 64
"""Of the formats' own; the models of the zoo have smaller ones."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def text_model(name: str, how: str = "sdpa", **settings: Any) -> Any:
    return zoo.build(name, how, **{"head_dim": HEAD_DIM, **settings})


def run(model: Any, *calls: dict[str, Any], dynamic: bool | None = None) -> tuple[list[str], float]:
    """What is fused at each site, and the largest relative error of a first output."""
    torch._dynamo.reset()
    backend = Rewriter(formats=(FAST,))
    rewritten = torch.compile(model, backend=backend, dynamic=dynamic)
    error = max(relative_error(rewritten(**call)[0], model(**call)[0]) for call in calls)
    assert not backend.report.kept
    return [entry.decision.fused for entry in backend.report.used], error


def flux(**settings: Any) -> Any:
    """Of one double and one single block."""
    torch.manual_seed(0)
    sizes = {"attention_head_dim": HEAD_DIM, "num_attention_heads": 2, "axes_dims_rope": (16, 24, 24)}
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=48,
        pooled_projection_dim=24,
        **{**sizes, **settings},
    )
    return zoo.with_sharp_attention(model)


def flux_call(side: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = zoo.DIFFUSION["flux"].inputs(2, side)
    return {name: x.to(dtype) for name, x in inputs.items()} | {"return_dict": False}


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("name, expected", [("llama", "RoPE"), ("qwen3", "QK-norm and RoPE")])
def test_text(name: str, expected: str, how: str) -> None:
    model, call = text_model(name, how), {**zoo.tokens(2, zoo.LENGTH), "use_cache": False}
    done, error = run(model, call)
    assert done == [expected] * len(zoo.LAYERS) and error < 1e-5


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("name, expected", [("llama", "Q-RoPE"), ("qwen3", "Q-norm and Q-RoPE")])
def test_text_with_a_cache_keeps_the_keys_as_they_are_cached(name: str, expected: str) -> None:
    done, error = run(text_model(name), {**zoo.tokens(2, zoo.LENGTH), "use_cache": True})
    assert done == [expected] * len(zoo.LAYERS) and error < 1e-5


@pytest.mark.usefixtures("not_quantized")
def test_text_of_a_second_length() -> None:
    calls = [{**zoo.tokens(2, length), "use_cache": False} for length in (zoo.LENGTH, zoo.SHORTER)]
    done, error = run(text_model("qwen3"), *calls)
    assert done == ["QK-norm and RoPE"] * 2 * len(zoo.LAYERS) and error < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_text_compiled(name: str, dtype: torch.dtype) -> None:
    model, call = text_model(name), {**zoo.tokens(2, zoo.LENGTH), "use_cache": False}
    expected = model(**call)[0]
    out, report = compiled(model.to(dtype), call_kwargs=call, formats=(FAST,))
    assert all(entry.decision.fused.endswith("RoPE") for entry in report.used) and len(report.used) == len(zoo.LAYERS)
    assert relative_error(out[0], expected) <= TOLERANCE[FAST]


@pytest.mark.usefixtures("not_quantized")
def test_text_under_autocast_is_left() -> None:
    """There the lines in between compute in dtypes of their own."""
    model, call = text_model("qwen3"), {**zoo.tokens(2, zoo.LENGTH), "use_cache": False}
    with torch.autocast("cpu", torch.bfloat16):
        done, error = run(model, call)
    assert done == [""] * len(zoo.LAYERS) and error < 1.6e-2


@pytest.mark.usefixtures("not_quantized")
def test_head_dims_that_kernels_would_pad_are_left() -> None:
    done, error = run(text_model("llama", head_dim=32), {**zoo.tokens(2, zoo.LENGTH), "use_cache": False})
    assert done == [""] * len(zoo.LAYERS) and error < 1e-5


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("dynamic", [None, True])
def test_flux(dynamic: bool | None) -> None:
    """The double block puts text and image together behind their norms, which writes q and k anyway."""
    done, error = run(flux(), flux_call(), dynamic=dynamic)
    assert done == ["", "QK-norm and RoPE"] and error < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flux_compiled(dtype: torch.dtype) -> None:
    model = flux()
    expected = model(**flux_call())[0]
    out, report = compiled(model.to(dtype), call_kwargs=flux_call(dtype=dtype), formats=(FAST,))
    assert [entry.decision.fused for entry in report.used] == ["", "QK-norm and RoPE"]
    assert relative_error(out[0], expected) <= TOLERANCE[FAST]
