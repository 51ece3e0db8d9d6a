"""`torch.ops.sagecompile.attention` by the reference: against float64, for every length, layout and special value."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import FAST, TOLERANCE, exact_attention, relative_error
from torch import Tensor

from sagecompile.errors import UnsupportedError
from sagecompile.ops import attention, attention_into, quantize, reference

FORMATS = tuple(TOLERANCE)
INF = float("inf")
LENGTHS = {
    1: "a single token",
    9: "less than a vector register",
    63: "one less than a power of two",
    127: "one less than a block of K's scales",
    129: "one token in the second block",
    700: "a prompt",
    1001: "odd",
    2047: "one less than whole blocks",
    2048: "whole blocks only",
}


def inputs(
    q_len: int = 63,
    kv_len: int = 63,
    heads: int = 2,
    kv_heads: int = 2,
    dim: int = 64,
    batch: int = 1,
    bias: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """N(0, 1), K with a bias on every channel."""
    k = torch.randn(batch, kv_heads, kv_len, dim) + bias
    return torch.randn(batch, heads, q_len, dim), k, torch.randn(batch, kv_heads, kv_len, dim)


def attend(q: Tensor, k: Tensor, v: Tensor, *, format: str = FORMATS[0], **how: Any) -> Tensor:
    how["ahead"] = 0 if how.pop("is_causal", False) else None
    how = {"scale": None, "tokens_first": False, **how}
    return attention(q, k, v, format=format, provider="reference", **how)  # type: ignore[no-any-return]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_error_with_biased_keys(device: str, length: int, is_causal: bool, format: str) -> None:
    q, k, v = (x.to(device) for x in inputs(length, length))
    actual = attend(q, k, v, is_causal=is_causal, format=format)
    assert relative_error(actual, exact_attention(q, k, v, is_causal=is_causal)) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_len, kv_len", [(1, 700), (63, 200), (200, 63), (129, 1)])
def test_unequal_lengths_are_aligned_top_left(q_len: int, kv_len: int, is_causal: bool, format: str) -> None:
    q, k, v = inputs(q_len, kv_len)
    actual = attend(q, k, v, is_causal=is_causal, format=format)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert relative_error(actual, expected) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dim", [1, 8, 40, 64, 72, 96, 128])
def test_head_dims(dim: int, format: str) -> None:
    q, k, v = inputs(dim=dim)
    assert relative_error(attend(q, k, v, format=format), exact_attention(q, k, v)) <= TOLERANCE[format]


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (8, 1), (3, 3)])
def test_grouped_query_attention(heads: int, kv_heads: int) -> None:
    q, k, v = inputs(heads=heads, kv_heads=kv_heads, batch=2)
    for is_causal in (False, True):
        expected = exact_attention(q, k, v, is_causal=is_causal)
        assert relative_error(attend(q, k, v, is_causal=is_causal), expected) <= 0.02


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.125, 1e-6])
def test_scales(scale: float) -> None:
    q, k, v = inputs(bias=0.0)
    expected = exact_attention(q, k, v, scale=scale)
    assert relative_error(attend(q, k, v, scale=scale), expected) <= 0.03  # 0.5 sharpens the softmax fourfold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_dtypes(dtype: torch.dtype, format: str) -> None:
    q, k, v = (x.to(dtype) for x in inputs(bias=0.0))
    out = attend(q, k, v, format=format)
    assert out.dtype == dtype
    assert relative_error(out, exact_attention(q, k, v)) <= TOLERANCE[format]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 5)
    wide[..., 3:-2] = x
    offset = torch.zeros(x.numel() + 7)
    offset[7:] = x.flatten()
    return {
        "tokens first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "head dim outermost": x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "a slice of a wider tensor": wide[..., 3:-2],
        "an odd storage offset": offset[7:].view(x.shape),
        "every other token": x.repeat_interleave(2, 2)[:, :, ::2],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_strides_and_offsets(layout: str) -> None:
    q, k, v = inputs()
    error = relative_error(attend(*(layouts(x)[layout] for x in (q, k, v))), attend(q, k, v))
    assert error < 2e-3  # sums in another order can round an INT8 value the other way


def test_expanded_keys_and_values() -> None:
    q, k, v = inputs(batch=2)
    k, v = k[:1, :1].expand(2, 2, -1, -1), v[:1, :, :1].expand(2, -1, 63, -1)
    assert relative_error(attend(q, k, v), exact_attention(q, k, v)) <= 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_are_not_modified(format: str) -> None:
    q, k, v = inputs()
    before = [x.clone() for x in (q, k, v)]
    attend(q, k, v, format=format)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize(
    "q_shape, kv_shape",
    [((1, 2, 0, 64), (1, 2, 9, 64)), ((0, 2, 9, 64), (0, 2, 9, 64)), ((1, 2, 9, 64), (1, 2, 0, 64))],
    ids=["no queries", "no batch", "no keys"],
)
def test_empty(q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(q_shape), torch.randn(kv_shape), torch.randn(kv_shape)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), equal_nan=True)


SPECIAL = {
    "NaN in a key": ("k", (0, 0, 5, 3), float("nan")),
    "Inf in a key": ("k", (0, 0, 5, 3), INF),
    "-Inf in a query": ("q", (0, 1, 5, 3), -INF),
    "NaN in a query": ("q", (0, 1, 5, 3), float("nan")),
    "Inf in a value": ("v", (0, 1, 5, 3), INF),
    "NaN in a value": ("v", (0, 1, 62, 3), float("nan")),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", SPECIAL)
def test_nan_and_inf_come_out_where_sdpa_brings_them_out(name: str, is_causal: bool, format: str) -> None:
    which, place, special = SPECIAL[name]
    q, k, v = inputs()
    {"q": q, "k": k, "v": v}[which][place] = special
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert relative_error(attend(q, k, v, is_causal=is_causal, format=format), expected) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name, factor", [("zeros", 0.0), ("tiny", 1e-20), ("large", 1e4)])
def test_magnitudes(name: str, factor: float, format: str) -> None:
    """Values of any size; K of any size only at a scale that keeps the scores in reach of the softmax."""
    q, k, v = inputs(bias=0.0)
    actual = attend(q, k * factor, v * factor, scale=0.125 / max(factor, 1), format=format)
    expected = exact_attention(q, k * factor, v * factor, scale=0.125 / max(factor, 1))
    assert relative_error(actual, expected) <= TOLERANCE[format]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_near_the_largest_number_stay_finite(dtype: torch.dtype) -> None:
    q, k, _ = (x.to(dtype) for x in inputs(bias=0.0))
    v = torch.full_like(q, torch.finfo(dtype).max)
    for format in FORMATS:
        assert attend(q, k, v, format=format).isfinite().all()


def test_a_constant_added_to_every_key_changes_nothing() -> None:
    q, k, v = inputs(bias=0.0)
    assert relative_error(attend(q, k + 100, v), attend(q, k, v)) < 2e-3


@pytest.mark.parametrize("parts", [1, 7])
def test_slicing_the_queries_changes_nothing(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    q, k, v = inputs(heads=4, kv_heads=2)
    whole = attend(q, k, v, is_causal=True)
    monkeypatch.setattr(reference, "MAX_SCORES", parts * 2 * 63)
    assert relative_error(attend(q, k, v, is_causal=True), whole) < 1e-6


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 9, 16), (1, 1, 1, 1), (2, 4, 0, 16)], ids=str)
def test_opcheck(shape: tuple[int, ...], transposed: bool, tokens_first: bool) -> None:
    """Schema, fake (shape, dtype, strides), and tracing with static and symbolic shapes."""
    q, k, v = (torch.randn(shape) for _ in range(3))
    if transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    how = {
        "scale": None,
        "ahead": 0,
        "format": FORMATS[0],
        "provider": "reference",
        "tokens_first": tokens_first,
    }
    torch.library.opcheck(attention.default, (q, k, v), how)


INTO: dict[str, Any] = {"scale": 0.125, "format": FORMATS[0], "provider": "reference"}


def test_into_a_tensor_that_is_there() -> None:
    """The last queries of a prompt; a slice of something larger is written and nothing beside it."""
    q, k, v = inputs(kv_len=63)
    expected = exact_attention(q, k, v, is_causal=True, scale=0.125)[:, :, 40:]
    whole = torch.full((1, 2, 30, 64), 7.0)
    attention_into(q[:, :, 40:], k, v, whole[:, :, 3:26], **INTO, ahead=40)
    assert relative_error(whole[:, :, 3:26], expected) <= TOLERANCE[FORMATS[0]]
    assert (whole[:, :, :3] == 7).all() and (whole[:, :, 26:] == 7).all()


def test_opcheck_of_into() -> None:
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    torch.library.opcheck(attention_into.default, (q, k, v, torch.empty_like(q)), INTO | {"ahead": 0})


def test_into_says_what_it_needs() -> None:
    q, k, v = inputs(9, 9)
    with pytest.raises(UnsupportedError, match="ahead 3: triton needs 0 or None"):
        attention_into(q, k, v, torch.empty_like(q), **(INTO | {"provider": "triton"}), ahead=3)
    for wrong in (torch.empty(1, 2, 8, 64), torch.empty_like(q).half()):
        with pytest.raises(UnsupportedError, match="needs q's"):
            attention_into(q, k, v, wrong, **INTO, ahead=0)
    with pytest.raises(UnsupportedError, match="ahead -1"):
        attention_into(q, k, v, torch.empty_like(q), **INTO, ahead=-1)
    with pytest.raises(UnsupportedError, match="no backward"):
        attention_into(q.requires_grad_(), k, v, torch.empty_like(q), **INTO, ahead=0)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_the_output_layout_is_the_one_asked_for(tokens_first: bool) -> None:
    out = attend(*inputs(), tokens_first=tokens_first)
    assert (out.transpose(1, 2) if tokens_first else out).is_contiguous()


def test_autocast_does_not_reach_inside() -> None:
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(q, k, v)
    assert torch.equal(inside, attend(q, k, v))


def test_calling_it_with_a_gradient_says_what_to_do() -> None:
    q, k, v = inputs(9, 9)
    with pytest.raises(UnsupportedError, match=r"no backward.*F\.scaled_dot_product_attention"):
        attend(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert not attend(q, k, v).requires_grad


BAD = {
    "format": ({"format": "int4"}, inputs, "format 'int4': known are qk_int8_pv_fp16"),
    "provider": ({"provider": "nobody"}, inputs, "provider 'nobody': known are hopper, triton"),
    "rank": ({}, lambda: [x[0] for x in inputs()], "each needs 4"),
    "shapes": ({}, lambda: [inputs()[0], *inputs(kv_len=9)[1:2], inputs()[2]], r"need \(B, H, Nq, D\)"),
    "heads": ({}, lambda: inputs(heads=3, kv_heads=2), "3 query heads on 2 KV heads: needs a multiple"),
    "head dim": ({}, lambda: inputs(dim=264), "head_dim 264: reference needs at most 256"),
    "dtype": ({}, lambda: [x.double() for x in inputs()], "needs one of float16, bfloat16, float32"),
    "mixed dtypes": ({}, lambda: [inputs()[0].half(), *inputs()[1:]], "on all three"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_direct_call_says_what_is_needed(name: str) -> None:
    how, make, message = BAD[name]
    arguments = {
        "scale": None,
        "ahead": None,
        "format": FORMATS[0],
        "provider": "reference",
        "tokens_first": False,
    }
    with pytest.raises(UnsupportedError, match=message):
        attention(*make(), **{**arguments, **how})


def test_int8_products_are_exact_in_float32() -> None:
    """The largest INT8 sums up to head dim 256 are integers that float32 holds."""
    a = torch.full((1, 1, 300, 256), 127.0)
    a[..., 0] = 126.0
    assert torch.equal((a @ a.mT).double(), a.double() @ a.double().mT)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_int8_rounds_within_half_a_step(tokens: int) -> None:
    x = torch.randn(1, 2, tokens, 16) * torch.logspace(-6, 6, tokens)[:, None]
    for quantized, scale in (quantize.int8_per_token(x), quantize.int8_per_block(x)):
        assert quantized.abs().max() <= 127
        assert torch.equal(quantized, quantized.round())
        assert ((quantized * scale - x).abs() <= scale * 0.5001).all()


def test_blocks_of_keys_have_one_scale_each() -> None:
    _, scale = quantize.int8_per_block(torch.randn(1, 1, 300, 16))
    assert [len(block.unique()) for block in scale[0, 0, :, 0].split(quantize.K_BLOCK)] == [1, 1, 1]


def test_fp8_channels_have_a_scale_each() -> None:
    v = torch.randn(1, 1, 300, 16) * torch.logspace(-6, 6, 16)
    quantized, scale = quantize.fp8_per_channel(v)
    assert quantized.abs().amax(-2).eq(quantize.FP8_MAX).all()
    error = (quantized * scale - v).norm(dim=-2) / v.norm(dim=-2)
    assert (error < 0.04).all()  # e4m3 has 3 bits of mantissa: at most 1/16 of each value


def test_formats_differ_in_accuracy_as_they_say() -> None:
    q, k, v = inputs(700, 700)
    errors = [relative_error(attend(q, k, v, format=format), exact_attention(q, k, v)) for format in FORMATS]
    assert FORMATS[1] == FAST
    assert errors == sorted(errors)
    assert all(a < b for a, b in itertools.pairwise(errors))
