"""The ops on CPU tensors without Python: the numbers that Python's way has, and to Python what is not the kernel's.

In: calls of every kind, after a first one. Out: the same bits as `_in_python`, which a profile says was not called.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sagecompile import ops
from sagecompile.errors import UnsupportedError
from sagecompile.kernels import compiler
from sagecompile.kernels.cpu import build
from sagecompile.ops.attention import IN_PYTHON

pytestmark = pytest.mark.skipif(
    build.why_not() is not None, reason=f"the CPU kernel cannot run here: {build.why_not()}"
)

HOW = {"scale": None, "ahead": None, "format": "qk_int8_pv_fp16", "provider": "cpu", "tokens_first": True}
INTO = {"scale": 0.125, "ahead": 0, "format": "qk_int8_pv_fp16", "provider": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    build.OPS_LIBRARY.now()
    compiler.settle()


def called(op: Any, *given: Any, **how: Any) -> tuple[list[str], Any]:
    """Which ops of Python's it called, and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = op(*given, **how)
    names = (event.name.removeprefix("sagecompile::") for event in profile.events())
    return [name for name in names if name.endswith(IN_PYTHON)], found


def inputs(q_len: int = 70, kv_len: int = 90, heads: int = 4, kv_heads: int = 2, dim: int = 64) -> list[torch.Tensor]:
    return [torch.randn(2, h, n, dim) for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))]


CALLS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "as it is": ({}, {}),
    "one query": ({"q_len": 1}, {}),
    "causal": ({}, {"ahead": 0}),
    "causal behind a context": ({}, {"ahead": 20}),
    "a scale": ({}, {"scale": 0.3}),
    "heads first": ({}, {"tokens_first": False}),
    "no groups": ({"kv_heads": 4}, {}),
    "an odd head": ({"dim": 33}, {}),
    "a wide head": ({"dim": 256}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits(name: str, dtype: torch.dtype) -> None:
    sizes, changed = CALLS[name]
    given = [x.to(dtype) for x in inputs(**sizes)]
    names, found = called(ops.attention, *given, **(HOW | changed))
    expected = torch.ops.sagecompile.attention_in_python(*given, **(HOW | changed))
    assert names == []
    assert torch.equal(found, expected) and found.stride() == expected.stride() and found.dtype == dtype


def test_strides_of_slices_and_of_expanded_heads() -> None:
    packed = torch.randn(2, 90, 3, 4, 64)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    v = v[:, :1].expand(-1, 4, -1, -1)
    names, found = called(ops.attention, q[:, :, 5:], k, v, **HOW)
    assert names == [] and torch.equal(found, torch.ops.sagecompile.attention_in_python(q[:, :, 5:], k, v, **HOW))


def test_heads_that_eight_bits_cannot_hold() -> None:
    """Python gives these alone their exact result, also under autocast."""
    q, k, v = inputs()
    q[0, 1], k[1, 1, 3] = 1e4 * q[0, 1], float("nan")
    with torch.autocast("cpu", torch.bfloat16):
        names, found = called(ops.attention, q, k, v, **HOW)
        expected = torch.ops.sagecompile.attention_in_python(q, k, v, **HOW)
    assert names == ["exact_heads_in_python"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found[1, 2:].isnan().all() and not found[0].isnan().any()


def test_into_a_tensor_that_is_there() -> None:
    q, k, v = inputs()
    found, expected = torch.zeros(2, 100, 4, 64).transpose(1, 2), torch.zeros(2, 4, 70, 64)
    names, _ = called(ops.attention_into, q, k, v, found[:, :, 10:80], **(INTO | {"ahead": 20}))
    torch.ops.sagecompile.attention_into_in_python(q, k, v, expected, **(INTO | {"ahead": 20}))
    assert names == [] and torch.equal(found[:, :, 10:80], expected)
    assert not found[:, :, :10].any() and not found[:, :, 80:].any()


TO_PYTHON: dict[str, tuple[list[torch.Tensor], dict[str, Any], str]] = {
    "reference": (inputs(), {"provider": "reference"}, ""),
    "nothing": (inputs(q_len=0), {}, ""),
    "no keys": (inputs(kv_len=0), {}, ""),
    "gradient": ([x.requires_grad_() for x in inputs()], {}, "no backward"),
    "dtype": ([x.double() for x in inputs()], {}, "needs one of float16"),
    "wide": (inputs(dim=264), {}, "head_dim 264: cpu needs at most 256"),
    "heads": (inputs(heads=3), {}, "3 query heads on 2 KV heads"),
    "shapes": ([*inputs()[:2], inputs(kv_len=8)[2]], {}, "need"),
    "format": (inputs(), {"format": "int4"}, "format 'int4'"),
    "another's format": (inputs(), {"format": "qk_int8_pv_fp8"}, "qk_int8_pv_fp8"),
}


@pytest.mark.parametrize("name", TO_PYTHON)
def test_python_does_the_rest_and_says_what_is_wrong(name: str) -> None:
    given, changed, message = TO_PYTHON[name]
    if message:
        with pytest.raises((UnsupportedError, ValueError), match=message):
            ops.attention(*given, **(HOW | changed))
    else:
        names, found = called(ops.attention, *given, **(HOW | changed))
        assert names == ["attention_in_python"] and found.shape == given[0].shape


def test_an_output_that_does_not_fit_is_refused() -> None:
    q, k, v = inputs()
    for wrong in (torch.empty(2, 4, 71, 64), torch.empty(2, 4, 70, 64, dtype=torch.float16)):
        with pytest.raises(UnsupportedError, match="needs q's"):
            ops.attention_into(q, k, v, wrong, **INTO)
    with pytest.raises(UnsupportedError, match="ahead -1"):
        ops.attention_into(q, k, v, torch.empty_like(q), **(INTO | {"ahead": -1}))


@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_a_gradient_that_needs_what_was_overwritten_is_refused(provider: str) -> None:
    q, k, v = inputs()
    saved, weight = torch.randn_like(q), torch.ones(1, requires_grad=True)
    loss = (weight * saved).sum()
    with torch.no_grad():
        ops.attention_into(q, k, v, saved, **(INTO | {"provider": provider}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
