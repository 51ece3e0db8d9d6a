"""The specification on Q and K that INT8 does not hold by itself: its steps alone, and the whole against float64.

In: rows of support.HARD, what hypothesis draws, real models' kinds of trouble one by one. Out: the relative L2 error.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ACCURATE,
    FAST,
    HARD,
    assert_holds,
    exact_attention,
    hard_inputs,
    promised,
    relative_error,
    turned_by_rope,
)
from torch import Tensor

from sagecompile.kernels.call import Call
from sagecompile.ops import quantize, reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, causal_offset: int = 0, format: str = ACCURATE
) -> Tensor:
    out = torch.full_like(q, float("nan"))
    call = Call(q, k, v, q.shape[-1] ** -0.5, causal_offset if is_causal else None)
    reference.attention(call, out, format=format)
    return out


@pytest.mark.parametrize("width", [1, 2, 16, 32, 64, 128, 256])
def test_signs_are_bent(width: int) -> None:
    """What is constant, or any row of a Hadamard matrix, is spread as well as one channel: by sqrt(2) at most less."""
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < width:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    signs = quantize.signs(width)
    assert signs.abs().eq(1).all()
    spread = (hadamard * signs) @ hadamard / width**0.5
    assert spread.abs().max() <= 2**0.5 + 1e-6


@pytest.mark.parametrize("dim", [1, 8, 33, 40, 64, 72, 80, 96, 112, 128, 256])
def test_rotation_keeps_scores(dim: int) -> None:
    q, k = torch.randn(2, 3, 20, dim, dtype=torch.float64)
    turned = quantize.rotate(q)
    assert turned.shape[-1] == -(-dim // 16) * 16
    torch.testing.assert_close(turned @ quantize.rotate(k).mT, q @ k.mT)
    for channel in range(dim):
        one = torch.zeros(dim, dtype=torch.float64)
        one[channel] = 1.0
        assert quantize.rotate(one).abs().max() <= (turned.shape[-1] // 4) ** -0.5 + 1e-12


def test_balance_makes_channels_alike() -> None:
    sizes = torch.logspace(-1, 1, 64)
    q, k = torch.randn(1, 2, 500, 64), torch.randn(1, 2, 700, 64) * sizes
    factor = quantize.balance(q, k)
    a, b = (x.square().mean(-2).sqrt() for x in (q * factor, k / factor))
    assert factor.shape == (1, 2, 1, 64)
    assert ((a / b).log2().abs() < 1.5).all()  # as far as it is not left alone
    assert ((a / b)[..., sizes.log2().abs() > 2].log2().abs() < 1).all()  # as 128 tokens say
    torch.testing.assert_close((q * factor) @ (k / factor).mT, q @ k.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("q_size, k_size", [(1e-30, 1e30), (1e30, 1e-30), (1e-38, 1e-38), (0, 1), (1, 0), (0, 0)])
def test_balance_of_any_size_is_a_number(q_size: float, k_size: float) -> None:
    q, k = torch.randn(2, 1, 1, 200, 64)
    q[..., 5], k[..., 9] = 0.0, 0.0
    factor = quantize.balance(q * q_size, k * k_size)
    assert factor.isfinite().all() and (factor > 0).all() and factor.max() / factor.min() < 1e6


def test_what_is_not_a_number_leaves_the_balance_of_other_channels() -> None:
    q, k = torch.randn(2, 1, 1, 100, 64)
    before = quantize.balance(q, k)
    q[0, 0, 7, 3], k[0, 0, 9, 5] = float("inf"), float("nan")
    after = quantize.balance(q, k)
    assert after.isfinite().all() and float((after / before).log().abs().max()) < 0.01


def test_balance_takes_the_same_sample_alone_and_in_a_batch() -> None:
    q, k = torch.randn(2, 3, 4, 700, 64)
    together, alone = quantize.balance(q, k), quantize.balance(q[1:2, 2:3], k[1:2, 2:3])
    assert torch.equal(together[1:2, 2:3], alone)


def test_a_part_of_the_queries_has_the_basis_of_all() -> None:
    q, k = torch.randn(1, 4, 900, 64), torch.randn(1, 1, 900, 64) + 3
    parts = [quantize.balance(q[:, :, part].reshape(1, 1, -1, 64), k) for part in (slice(0, 900), slice(700, 900))]
    assert torch.equal(*parts)


def test_noise_is_that_of_rounding() -> None:
    """Of scores of integers, against what rounding does to those of the numbers."""
    q, k = 30 * torch.randn(1, 1, 400, 64, dtype=torch.float64), 40 * torch.randn(1, 1, 500, 64, dtype=torch.float64)
    off = q.round() @ k.round().mT - q @ k.mT
    square = quantize.noise(torch.tensor(1.0), q.square().sum(-1).mean(), k.square().sum(-1).mean()) / math.log(2) ** 2
    assert 0.95 < float(off.std() / square.sqrt()) < 1.05


def predicted(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[float, float]:
    """The error that is predicted of a call as a whole, and the one it has, with nothing exact."""
    seen = []

    def none(noise: Tensor, error: Tensor, size: Tensor) -> Tensor:
        seen.append(float(((error * size).sum() / size.sum()).sqrt()))
        return torch.zeros_like(error, dtype=torch.bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "exact_rows", none)
        out = attend(q, k, v, **how)
    return seen[0], relative_error(out, exact_attention(q, k, v, is_causal=how.get("is_causal", False)))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", [name for name in HARD if "scores of" not in name and "token" not in name])
def test_the_error_is_predicted(name: str, dim: int) -> None:
    """Of a whole call, by a factor of 1.6 at most; PV in 16 bits adds 0.003."""
    guess, error = predicted(*hard_inputs(name, 512, dim, 4, 2), is_causal="RoPE" in name)
    assert error / 1.4 - 0.003 <= guess <= 1.6 * error


def test_values_with_a_mean_in_common_are_less_in_error() -> None:
    q, k, v = (torch.randn(1, 2, 512, 64) for _ in range(3))
    guess, error = predicted(q, k, v + 5)
    assert error <= 0.004 and guess < 0.01


@pytest.mark.parametrize("format", [ACCURATE, FAST])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", HARD)
def test_hard_inputs(name: str, dim: int, format: str) -> None:
    q, k, v = hard_inputs(name, 400, dim, 4, 2)
    is_causal = "RoPE" in name
    assert_holds(name, format, attend(q, k, v, is_causal=is_causal, format=format), q, k, v, is_causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [64, 1000])
@pytest.mark.parametrize("dim", [72, 80, 96])
def test_hard_inputs_of_other_sizes(dim: int, tokens: int, dtype: torch.dtype) -> None:
    for name in ("a bias of 60 in 4 channels that RoPE turns, halves", "a channel of K times 60"):
        q, k, v = (x.to(dtype) for x in hard_inputs(name, tokens, dim, 2, 1))
        for format in (ACCURATE, FAST):
            assert_holds(name, format, attend(q, k, v, is_causal=True, format=format), q, k, v, True)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_distribution(data: st.DataObject) -> None:
    """Channels and tokens of any size, heavy tails, biases before and after RoPE, sharp and flat softmaxes, V too.

    0.03 and not 0.02, as single heads of few tokens are judged by a prediction that may be off by half.
    """
    q, k, v, is_causal = drawn(data)
    for format, whole in ((ACCURATE, 0.03), (FAST, 0.05)):
        out = attend(q, k, v, is_causal=is_causal, format=format)
        assert relative_error(out, exact_attention(q, k, v, is_causal=is_causal)) <= whole


def drawn(data: st.DataObject) -> tuple[Tensor, Tensor, Tensor, bool]:
    """q, k, v of a distribution that nothing was tuned for."""
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tokens, dim = draw(st.integers(100, 400)), draw(st.sampled_from((64, 96, 128)))
    sizes = st.floats(0.0, 1.5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def tensor(heads: int) -> Tensor:
        x = normal(1, heads, tokens, dim) * (draw(sizes) * normal(dim)).exp()
        x = x * (0.3 * draw(sizes) * normal(tokens, 1)).exp()
        return x + draw(st.sampled_from((0.0, 1.0, 10.0))) * normal(dim) * (normal(dim) > 1)

    q, k = tensor(2), tensor(1)
    q, k = (x / x.std() for x in (q, k))
    if draw(st.booleans()):
        q, k = turned_by_rope(q), turned_by_rope(k)
    v = normal(1, 1, tokens, dim) * (0.5 * draw(sizes) * normal(dim)).exp() + draw(sizes) * normal(dim)
    return draw(st.floats(0.1, 20.0)) * q, k, v, draw(st.booleans())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_what_the_readme_promises(data: st.DataObject) -> None:
    q, k, v, is_causal = as_promised(data)
    exact = exact_attention(q, k, v, is_causal=is_causal)
    for format, error in zip((ACCURATE, FAST), promised().errors, strict=True):
        assert relative_error(attend(q, k, v, is_causal=is_causal, format=format), exact) <= error


def as_promised(data: st.DataObject) -> tuple[Tensor, Tensor, Tensor, bool]:
    """q, k, v of the kinds that the README's sentence names, up to the sizes that it names."""
    draw, most = data.draw, promised()
    torch.manual_seed(draw(st.integers(0, 2**16)))
    tokens, dim, dtype = (
        draw(st.integers(100, 600)),
        draw(st.sampled_from((64, 96, 128))),
        draw(st.sampled_from(DTYPES)),
    )
    q, k, v = (torch.randn(1, heads, tokens, dim) for heads in (8, 4, 4))
    kind = draw(st.sampled_from(("constant", "turned", "channels")))
    channels = torch.randperm(dim)[: draw(st.integers(1, most.channels))]
    if kind == "constant":
        k += draw(st.floats(-100, 100))
    elif kind == "turned":
        bias, interleaved = torch.zeros(dim), draw(st.booleans())
        bias[channels] = draw(st.floats(0, most.bias)) * (2 * torch.rand(len(channels)) - 1)
        q, k = (turned_by_rope(x, interleaved=interleaved) for x in (q + 0.02 * bias, k + bias))
    else:
        k[..., channels] *= 1 + (draw(st.floats(1, most.times)) - 1) * torch.rand(len(channels))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return q, k, v, draw(st.booleans())


def test_plain_inputs_are_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "sdpa", None)
    for tokens, dim, is_causal in ((64, 64, False), (700, 128, True), (2000, 64, False)):
        attend(*(torch.randn(1, 2, tokens, dim) for _ in range(3)), is_causal=is_causal)
    attend(*hard_inputs("a channel of K times 60", 700, 128, 2, 1))


def test_rows_are_exact_by_themselves() -> None:
    """One row's scores are steep: its ROWS are exact, the others are as they were."""
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    before = attend(q, k, v)
    q[0, 1, 70] *= 12
    after, expected = attend(q, k, v), exact_attention(q, k, v)
    assert relative_error(after[:, 1, 64:128], expected[:, 1, 64:128]) < 1e-5
    assert relative_error(after[:, 1, 128:], before[:, 1, 128:]) < 0.02 and torch.equal(after[:, 0], before[:, 0])


@pytest.mark.parametrize("format", [ACCURATE, FAST])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e30])
def test_keys_that_nobody_sees_influence_nothing(special: float, format: str) -> None:
    """The end of a cache, behind what the last query sees."""
    q, k, v = torch.randn(1, 4, 40, 64), torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
    how: dict[str, Any] = {"is_causal": True, "causal_offset": 60, "format": format}
    before = attend(q, k, v, **how)
    k[:, :, 100:], v[:, :, 100:] = special, special
    assert torch.equal(attend(q, k, v, **how), before)
    assert torch.equal(attend(q, k[:, :, :100], v[:, :, :100], **how), before)


def test_the_same_bits_alone_and_in_a_batch() -> None:
    q, k, v = (torch.cat(x) for x in zip(*(hard_inputs(name, 200, 64, 4, 2) for name in list(HARD)[-3:]), strict=True))
    together = attend(q, k, v)
    for i in range(3):
        assert torch.equal(attend(q[i : i + 1], k[i : i + 1], v[i : i + 1]), together[i : i + 1])


def test_a_real_kind_of_model() -> None:
    """Qwen2's: K's bias is a hundred times as large as what it is added to, and turns."""
    q, k, v = torch.randn(1, 4, 512, 64), torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
    bias = torch.zeros(64)
    bias[[3, 9, 30, 40, 41, 60]] = torch.tensor([90.0, -140.0, 30.0, 100.0, -20.0, 5.0])
    q, k = turned_by_rope(q + 0.05 * bias), turned_by_rope(k + bias)
    for format, whole in ((ACCURATE, 0.02), (FAST, 0.045)):
        out = attend(q, k, v, is_causal=True, format=format)
        assert relative_error(out, exact_attention(q, k, v, is_causal=True)) <= whole
