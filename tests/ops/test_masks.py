"""Masks of every kind by the reference: against float64 and SDPA, whatever they hide."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ACCURATE, EXACT, FAST, TOLERANCE, relative_error
from torch import Tensor

from sagecompile.errors import UnsupportedError
from sagecompile.kernels.call import Call
from sagecompile.ops import attention, attention_into, reference

INF, LOWEST = math.inf, torch.finfo(torch.float32).min
HOW: dict[str, Any] = {"scale": None, "format": ACCURATE, "provider": "reference", "tokens_first": False}


def inputs(q_len: int = 70, kv_len: int = 150, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> list[Tensor]:
    k = torch.randn(2, kv_heads, kv_len, dim) + 3
    return [torch.randn(2, heads, q_len, dim), k, torch.randn(2, kv_heads, kv_len, dim)]


def whole(q: Tensor, k: Tensor, **seen: Any) -> Tensor:
    """Which keys are seen, or what is added, spelled out: (B, H, Nq, Nk)."""
    shape = (*q.shape[:3], k.shape[2])
    i, j = torch.arange(shape[2])[:, None], torch.arange(shape[3])
    lets = torch.ones(shape, dtype=torch.bool)
    if seen.get("ahead") is not None:
        lets &= j - i <= seen["ahead"]
    if seen.get("behind") is not None:
        lets &= i - j <= seen["behind"]
    if seen.get("low") is not None:
        lets &= j >= seen["low"].expand(shape[0], shape[2])[:, None, :, None]
    if seen.get("high") is not None:
        lets &= j < seen["high"].expand(shape[0], shape[2])[:, None, :, None]
    mask = seen.get("mask")
    if mask is None:
        return lets
    return lets & mask if mask.dtype == torch.bool else mask.double().masked_fill(~lets, -INF)


def exactly(q: Tensor, k: Tensor, v: Tensor, **seen: Any) -> Tensor:
    """In float64, spelled out; rows that see nothing are 0."""
    mask, group = whole(q, k, **seen), q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0) @ v


def padded(*lengths: int, kv_len: int = 150, left: bool = False) -> Tensor:
    valid = torch.arange(kv_len) < torch.tensor(lengths)[:, None]
    return (valid.flip(1) if left else valid)[:, None, None]


KINDS: dict[str, Any] = {
    "right padding": lambda: {"mask": padded(90, 150)},
    "left padding, causal": lambda: {"ahead": 80, "mask": padded(30, 150, left=True)},
    "one sequence without a key": lambda: {"mask": padded(0, 150)},
    "window": lambda: {"ahead": 80, "behind": 9},
    "two-sided window": lambda: {"ahead": 5, "behind": 9},
    "a window that leaves the keys": lambda: {"behind": 9, "ahead": None},
    "a cache's valid part": lambda: {"high": torch.tensor([[100]], dtype=torch.int32)},
    "causal in a cache": lambda: {"high": torch.arange(20, 90, dtype=torch.int32)[None]},
    "documents": lambda: {
        "ahead": 0,
        "low": (torch.arange(70) // 20 * 20).int()[None],
        "high": torch.tensor([[150], [33]], dtype=torch.int32),
    },
    "random booleans": lambda: {"mask": torch.rand(2, 4, 70, 150) < 0.5},
    "random booleans, broadcast": lambda: {"mask": torch.rand(70, 150) < 0.1},
    "one key for each query": lambda: {"mask": torch.arange(150) == torch.randint(150, (2, 1, 70, 1))},
    "of all sequences and heads alike": lambda: {"mask": (torch.rand(1, 1, 70, 150) < 0.5).expand(2, 4, 70, 150)},
    "a bias": lambda: {"mask": torch.randn(1, 4, 70, 150)},
    "a bias of a row": lambda: {"mask": torch.randn(2, 1, 70, 1)},
    "a bias and -inf": lambda: {"mask": torch.randn(4, 70, 150).masked_fill(torch.rand(70, 150) < 0.5, -INF)},
    "ALiBi": lambda: {"mask": -0.3 * (torch.arange(150) - torch.arange(80, 150)[:, None]).abs().float(), "ahead": 80},
    "finfo.min": lambda: {"mask": torch.where(padded(90, 150), 0.0, LOWEST)},
    "-1e4": lambda: {"mask": torch.where(padded(90, 150), 0.0, -1e4)},
    "transposed": lambda: {"mask": torch.randn(150, 70).mT},
    "a number": lambda: {"mask": torch.tensor(True)},
}


@pytest.mark.parametrize("format", [ACCURATE, FAST])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name: str, format: str) -> None:
    (q, k, v), seen = inputs(), KINDS[name]()
    before = {key: x.clone() for key, x in seen.items() if isinstance(x, Tensor)}
    actual = attention(q, k, v, **{**HOW, "format": format, "ahead": None, **seen})
    assert relative_error(actual, exactly(q, k, v, **seen)) <= 1.5 * TOLERANCE[format]
    assert all(torch.equal(seen[key], x) for key, x in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo.min", "float32"])
def test_rows_without_a_key_are_sdpas(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(kv_heads=4))
    lets = (torch.rand(2, 1, 70, 150) < 0.3) & (torch.arange(70)[:, None] % 3 > 0)
    fill = {"-inf": -INF, "finfo.min": torch.finfo(dtype).min, "float32": LOWEST}.get(kind)
    mask = lets
    if fill is not None:
        mask = torch.zeros(lets.shape, dtype=torch.float32 if kind == "float32" else dtype).masked_fill(~lets, fill)
    actual = attention(q, k, v, **HOW, ahead=None, mask=mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative_error(actual[:, :, ::3], expected[:, :, ::3]) <= EXACT[dtype]
    assert relative_error(actual, expected) <= 0.03
    assert (actual[:, :, ::3] == 0).all() == (kind in ("bool", "-inf"))


@pytest.mark.parametrize("special", [math.nan, INF, 1e30], ids=str)
@pytest.mark.parametrize("kind", ["bool", "-inf", "high", "finfo.min", "-1e4"])
def test_keys_that_nobody_sees_influence_nothing(kind: str, special: float) -> None:
    q, k, v = inputs()
    lets = padded(100, 100)
    fills = {"-inf": -INF, "finfo.min": LOWEST, "-1e4": -1e4}
    seen: dict[str, Any] = {"mask": lets}
    if kind == "high":
        seen = {"high": torch.tensor([[100]], dtype=torch.int32)}
    elif kind in fills:
        seen = {"mask": torch.where(lets, 0.0, fills[kind])}
    plain = attention(q, k, v, **HOW, ahead=None, **seen)
    k[:, :, 100:] = v[:, :, 100:] = special
    assert torch.equal(attention(q, k, v, **HOW, ahead=None, **seen), plain)
    assert relative_error(plain, exactly(q, k[:, :, :100], v[:, :, :100])) <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("bias", [1e7, -1e7, -1e6])
def test_a_bias_beyond_int8_goes_the_exact_way(bias: float) -> None:
    q, k, v = inputs(kv_heads=4)
    mask = torch.full((70, 150), bias)
    call = Call(q, k, v, 32**-0.5, mask=mask)
    assert reference.exact_rows(call, format=ACCURATE).all()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(attention(q, k, v, **HOW, ahead=None, mask=mask), expected)


@pytest.mark.parametrize("value", [math.nan, INF], ids=str)
def test_a_bias_that_is_no_number_comes_out_where_sdpa_brings_it_out(value: float) -> None:
    q, k, v = inputs(kv_heads=4)
    mask = torch.randn(70, 150)
    mask[5, 7] = value
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative_error(attention(q, k, v, **HOW, ahead=None, mask=mask), expected) <= TOLERANCE[ACCURATE]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    q_len=st.integers(1, 80),
    kv_len=st.integers(1, 200),
    kv_heads=st.sampled_from([1, 2, 4]),
    ahead=st.none() | st.integers(0, 200),
    behind=st.none() | st.integers(0, 200),
    bounds=st.sampled_from(["", "low", "high", "both"]),
    mask=st.sampled_from(["", "bool", "bias", "-inf"]),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
    broadcast=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_any_of_them_together(
    seed: int, q_len: int, kv_len: int, kv_heads: int, ahead: Any, behind: Any, bounds: str, mask: str, share: float,
    broadcast: list[bool],
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    q, k, v = inputs(q_len, kv_len, kv_heads=kv_heads)
    seen: dict[str, Any] = {"ahead": ahead, "behind": behind}
    per_row = [1 if one else size for one, size in zip(broadcast, (2, q_len), strict=False)]
    if bounds in ("low", "both"):
        seen["low"] = torch.randint(-3, kv_len, per_row).int()
    if bounds in ("high", "both"):
        seen["high"] = torch.randint(0, kv_len + 3, per_row).int()
    sizes = [1 if one else size for one, size in zip(broadcast, (2, 4, q_len, kv_len), strict=True)]
    if mask:
        lets = torch.rand(sizes) < share
        seen["mask"] = lets if mask == "bool" else torch.randn(sizes)
        if mask == "-inf":
            seen["mask"] = seen["mask"].masked_fill(~lets, -INF)
    actual = attention(q, k, v, **HOW, **seen)
    # Few keys leave nothing to average over: up to a hidden score apart, the errors of a row do not cancel.
    assert relative_error(actual, exactly(q, k, v, **seen)) <= 0.04
    dense = whole(q, k, **seen)
    dense = dense if dense.dtype == torch.bool else dense.float()
    group = 4 // kv_heads
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=dense
    )
    assert relative_error(actual, expected) <= 0.04


def test_slicing_the_queries_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    seen = {"ahead": 80, "mask": torch.randn(2, 4, 70, 150)}
    plain = attention(q, k, v, **HOW, **seen)
    monkeypatch.setattr(reference, "MAX_SCORES", 7 * 4 * 150)
    assert relative_error(attention(q, k, v, **HOW, **seen), plain) < 1e-6


def test_opcheck() -> None:
    q, k, v = inputs(9, 12)
    bound = torch.tensor([[3]], dtype=torch.int32)
    seen = {"ahead": 5, "behind": 4, "low": bound, "high": bound + 8, "mask": torch.rand(2, 1, 1, 12) < 0.5}
    torch.library.opcheck(attention.default, (q, k, v), HOW | seen)


def test_into_a_tensor_that_is_there() -> None:
    (q, k, v), seen = inputs(), KINDS["left padding, causal"]()
    out = torch.empty_like(q)
    attention_into(q, k, v, out, scale=32**-0.5, format=ACCURATE, provider="reference", **seen)
    assert torch.equal(out, attention(q, k, v, **HOW, **seen))


BAD = {
    "behind -1: needs 0 or more": {"behind": -1},
    r"low torch.int64 \(1, 1\): needs torch.int32 \(2, 70\)": {"low": torch.zeros(1, 1, dtype=torch.int64)},
    r"high torch.int32 \(70,\): needs torch.int32": {"high": torch.zeros(70, dtype=torch.int32)},
    r"mask torch.bool \(70, 149\): needs torch.bool or torch.float32": {"mask": torch.ones(70, 149).bool()},
    r"mask torch.float64": {"mask": torch.ones(70, 150).double()},
    r"mask torch.float16": {"mask": torch.ones(70, 150).half()},
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_call_says_what_is_needed(message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        attention(*inputs(), **HOW, **{"ahead": None, **BAD[message]})


def test_a_provider_without_masks_says_so() -> None:
    with pytest.raises(UnsupportedError, match="provider 'triton': behind, low, high and mask need one of reference"):
        attention(*inputs(), **{**HOW, "provider": "triton"}, ahead=None, behind=3)
