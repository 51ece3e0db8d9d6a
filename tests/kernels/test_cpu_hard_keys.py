"""The CPU kernel on Q and K that INT8 does not hold by itself, and what it says that it computed exactly.

In: the rows of support.HARD in all dtypes, causal and not, with groups, strides and unequal lengths. Out: the relative
L2 error against float64, and how many rows were computed with scores in float32.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecompile.kernels import counts, cpu
from sagecompile.kernels.call import Call
from sagecompile.kernels.cpu import build
from tests.ops.test_hard_keys import as_promised, drawn
from tests.support import (
    ACCURATE,
    HARD,
    TOLERANCE,
    assert_holds,
    exact_attention,
    hard_inputs,
    promised,
    relative_error,
    turned_by_rope,
)

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"the CPU kernel cannot run here: {cpu.why_not()}")


@pytest.fixture(params=["bf16", "float32"])
def pv(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PV in bfloat16, if this CPU can, and in float32, as on CPUs that cannot."""
    if request.param == "bf16" and "avx512_bf16" not in build.features():
        pytest.skip("needs a CPU with avx512_bf16")
    kernel = build.function(bf16=request.param == "bf16")
    monkeypatch.setattr(cpu, "function", lambda: kernel)


def attend(q, k, v, *, causal=False, offset=0, site=""):
    out = torch.full_like(q, float("nan"))
    call = Call(q, k, v, q.shape[-1] ** -0.5, offset if causal else None, site=site)
    cpu.attention(call, out, format=ACCURATE)
    return out


def attend_and_count(q, k, v, **how):
    """The result, and the share of its rows that were computed exactly."""
    before = counts.read().get("hard keys", counts.Counts())
    out = attend(q, k, v, **how, site="hard keys")
    calls, rows, exact = counts.read()["hard keys"]
    assert (calls, rows) == (before.calls + 1, before.rows + out[..., 0].numel())
    return out, (exact - before.exact) / out[..., 0].numel()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", HARD)
def test_hard_inputs(pv, name, dim):
    q, k, v = hard_inputs(name, 400, dim, 4, 2)
    causal = "RoPE" in name
    assert_holds(name, ACCURATE, attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens, dim, group", [(64, 64, 1), (300, 72, 2), (1030, 80, 4), (257, 96, 3), (129, 128, 8)])
def test_hard_inputs_of_other_sizes(pv, tokens, dim, group, dtype, causal):
    for size in (30, 60):
        for name in (f"a bias of {size} in 4 channels that RoPE turns, interleaved", f"a channel of K times {size}"):
            q, k, v = (x.to(dtype) for x in hard_inputs(name, tokens, dim, group, 1))
            assert_holds(name, ACCURATE, attend(q, k, v, causal=causal), q, k, v, causal)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_distribution(data):
    """As of the specification, and as exact."""
    q, k, v, causal = drawn(data)
    assert relative_error(attend(q, k, v, causal=causal), exact_attention(q, k, v, is_causal=causal)) <= 0.03


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_what_the_readme_promises(data):
    q, k, v, causal = as_promised(data)
    exact = exact_attention(q, k, v, is_causal=causal)
    assert relative_error(attend(q, k, v, causal=causal), exact) <= promised().errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [33, 40, 64, 96, 128, 256])
def test_exact_rows_are_exact(pv, dim, dtype):
    """As far as PV in 16 bits is; keys before, on and after the ends of tiles, and no key that a row does not see."""
    q, k, v = (x.to(dtype) for x in hard_inputs("scores of 200", 530, dim, 4, 2))
    for causal, offset in ((False, 0), (True, 0), (True, 17)):
        out, share = attend_and_count(q[:, :, :333], k, v, causal=causal, offset=offset)
        exact = exact_attention(q[:, :, :333], k, v, is_causal=causal, causal_offset=offset)
        assert share == 1 and relative_error(out, exact) <= 0.004


def test_plain_inputs_are_not_computed_twice(pv):
    for tokens, dim, causal in ((64, 64, False), (700, 128, True), (2000, 64, False), (300, 96, True), (300, 80, True)):
        q, k, v = (torch.randn(2, 3, tokens, dim) for _ in range(3))
        assert attend_and_count(q, k + 3, v, causal=causal)[1] == 0
    assert attend_and_count(*hard_inputs("a channel of K times 60", 700, 128, 2, 1))[1] == 0


def test_rows_are_exact_by_themselves(pv):
    """A query whose scores are steep takes only those that the kernel multiplies together with it."""
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    q[0, 1, 70] *= 12
    before = exact_attention(q, k, v)
    out, share = attend_and_count(q, k, v)
    assert share == 12 / 600
    assert relative_error(out[:, 1, 60:72], before[:, 1, 60:72]) < 0.004
    assert 0.005 < relative_error(out[:, 1, 72:], before[:, 1, 72:]) <= TOLERANCE[ACCURATE]


def test_values_of_any_size_are_judged(pv):
    """Of |v| that has no square in float32, and none of it: rows are as hard as with others."""
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    for size in (0.0, 1e-30, 1e-15, 1e15, 1e25):
        out, share = attend_and_count(q, k, v * size)
        assert share == 0 and relative_error(out, exact_attention(q, k, v * size)) <= TOLERANCE[ACCURATE]
        out, share = attend_and_count(4 * q, k, v * size)
        assert (share > 0.2 or size == 0) and relative_error(out, exact_attention(4 * q, k, v * size)) <= 0.02


@pytest.mark.parametrize("q_size, k_size", [(1e-20, 1e20), (1e20, 1e-20), (1e-15, 1e15), (1e10, 1e-10)])
def test_queries_and_keys_of_any_size(pv, q_size, k_size):
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    assert relative_error(attend(q * q_size, k * k_size, v), exact_attention(q, k, v)) <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e30])
def test_keys_that_nobody_sees_influence_nothing(pv, special):
    q, k, v = torch.randn(1, 4, 40, 64), torch.randn(1, 2, 700, 64), torch.randn(1, 2, 700, 64)
    before = attend(q, k, v, causal=True, offset=160)
    k[:, :, 200:], v[:, :, 200:] = special, special
    assert torch.equal(attend(q, k, v, causal=True, offset=160), before)
    assert torch.equal(attend(q, k[:, :, :200], v[:, :, :200], causal=True, offset=160), before)


def test_the_same_bits_alone_and_in_a_batch(pv):
    """Of hard and plain inputs beside each other, whatever other threads compute."""
    names = ["a token of K times 20", "scores of 20", "a bias of 60 in 4 channels that RoPE turns, halves"]
    q, k, v = (torch.cat(x) for x in zip(*(hard_inputs(name, 200, 64, 4, 2) for name in names), strict=True))
    before, together = torch.get_num_threads(), attend(q, k, v, causal=True)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for i in range(3):
                assert torch.equal(attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], causal=True), together[i : i + 1])
            assert torch.equal(attend(q, k, v, causal=True), together)
    finally:
        torch.set_num_threads(before)


def test_a_nan_leaves_the_basis_of_its_group_alone(pv):
    """One query head holds a NaN: the other of its group is as accurate as without, on keys that need the balance."""
    q, k, v = hard_inputs("a channel of K times 60", 300, 64, 2, 1)
    expected = exact_attention(q, k, v)
    before = relative_error(attend(q, k, v)[:, 1], expected[:, 1])
    q[0, 0, 0, 5], q[0, 0, 20] = float("nan"), float("inf")
    assert relative_error(attend(q, k, v)[:, 1], expected[:, 1]) <= 1.2 * before <= 0.02


def test_a_real_kind_of_model(pv):
    """Qwen2's: K's bias is a hundred times as large as what it is added to, and turns."""
    bias = torch.zeros(128)
    bias[[3, 9, 30, 40, 41, 60, 90, 127]] = torch.tensor([90.0, -140.0, 30.0, 300.0, -20.0, 5.0, 600.0, 500.0])
    q, k, v = torch.randn(1, 4, 512, 128), torch.randn(1, 2, 512, 128), torch.randn(1, 2, 512, 128)
    q, k = turned_by_rope(q + 0.02 * bias), turned_by_rope(k + bias)
    assert relative_error(attend(q, k, v, causal=True), exact_attention(q, k, v, is_causal=True)) <= 0.02
