"""The contract, line by line, through the whole backend, with Inductor behind it.

What needs no Inductor is tested beside its source: every spelling and Keep reason in passes/, the op itself in ops/.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import TOLERANCE, compiled, exact_attention, relative_error
from torch import Tensor, nn

from sagecompile import report
from sagecompile.report import Report

sdpa = F.scaled_dot_product_attention


def qkv(length: int = 40, batch: int = 1, heads: int = 2, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """N(0, 1), K with a bias of 3 on every channel."""
    q, k, v = (torch.randn(batch, heads, length, dim) for _ in range(3))
    return q, k + 3, v


@contextmanager
def always(fn: Callable[..., Any], **how: Any) -> Iterator[tuple[Callable[..., Any], list[Report]]]:
    """`fn` compiled with policy=always, and the reports of all its graphs as they come."""
    with report.recording() as reports:
        yield torch.compile(fn, backend="sage_inductor", options={"sage.policy": "always"}, **how), reports


class Block(nn.Module):
    """QKV projection, causal attention, output projection."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 16)).transpose(1, 3).unbind(2)
        return x + self.out(sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


# 1. No argument is ever ignored.


def test_all_arguments_together_in_one_graph() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (
            sdpa(q, k, v, scale=0.5),
            sdpa(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True),
            sdpa(q, k, v, attn_mask=mask, scale=0.1),
            sdpa(q[:, :, :7], k, v, is_causal=True),
        )

    inputs = (*qkv(), torch.randn(40, 40))
    actual, done = compiled(fn, *inputs)
    assert (len(done.used), len(done.kept)) == (3, 1)
    errors = [relative_error(a, e) for a, e in zip(actual, fn(*inputs), strict=True)]
    assert max(errors) <= 0.04
    assert errors[2] < 1e-5


# 2. Inputs are never modified.


def test_a_static_cache_reads_the_same_after_the_call(device: str) -> None:
    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, new: Tensor) -> Tensor:
        k_cache[:, :, 5:6] = new
        v_cache[:, :, 5:6] = new
        return sdpa(q, k_cache, v_cache)

    q, k, v = (x.to(device) for x in qkv())
    new = torch.randn(1, 2, 1, 64, device=device)
    k_expected, v_expected = k.clone(), v.clone()
    expected = step(q, k_expected, v_expected, new)
    q_before = q.clone()
    actual, done = compiled(step, q, k, v, new)
    assert len(done.used) == 1
    assert relative_error(actual, expected) <= 0.02
    assert torch.equal(q, q_before)
    assert torch.equal(k, k_expected)
    assert torch.equal(v, v_expected)


# 3. Any length, strides and storage offsets.


@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_function_at_every_length(device: str, is_causal: bool, format: str) -> None:
    """Compiled for symbolic lengths once; 0 and 1 are graphs of their own."""
    fn = lambda q, k, v: sdpa(q, k, v, is_causal=is_causal)  # noqa: E731
    options = {"sage.policy": "always", "sage.formats": (format,)}
    model = torch.compile(fn, backend="sage_inductor", dynamic=True, fullgraph=True, options=options)
    with report.recording() as reports:
        for length in (700, 1001, 9, 63, 2047, 2048, 1, 0):
            q, k, v = (x.to(device) for x in qkv(length))
            assert relative_error(model(q, k, v), exact_attention(q, k, v, is_causal=is_causal)) <= TOLERANCE[format]
    assert len(reports) <= 3
    assert [entry.site.q_len for entry in sum(reports, Report()).kept] in ([0], [])


def test_strides_and_storage_offsets() -> None:
    q, k, v = qkv()
    packed = torch.cat([torch.zeros(3), torch.stack([q, k, v], 3).flatten()])[3:].view(1, 2, 40, 3, 64)
    inputs = packed.unbind(3)
    actual, done = compiled(sdpa, *inputs)
    assert len(done.used) == 1
    assert relative_error(actual, exact_attention(*inputs)) <= 0.02


def test_nan_comes_out_where_sdpa_brings_it_out() -> None:
    q, k, v = qkv()
    v[0, 1, 7, 3] = float("nan")
    actual, done = compiled(sdpa, q, k, v)
    assert len(done.used) == 1
    assert relative_error(actual, sdpa(q, k, v)) <= 0.02


# 4. One functional op: whole graphs, CUDA graphs, dynamic shapes. (opcheck: ops/test_attention.py)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_fullgraph_in_every_mode(device: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.to(device) for x in qkv())
    monkeypatch.setenv("SAGECOMPILE_POLICY", "always")  # torch.compile takes a mode or options, not both
    model = torch.compile(sdpa, backend="sage_inductor", fullgraph=True, mode=mode)
    with report.recording() as reports:
        results = [model(q, k, v).clone() for _ in range(3)]  # a CUDA graph is captured in the second call
    assert len(reports[0].used) == 1
    assert max(relative_error(out, exact_attention(q, k, v)) for out in results) <= 0.02


# 5. Gradients, no_grad, inference_mode, autocast and mixed dtypes behave as without us.


def test_training_has_inductors_gradients() -> None:
    block, x = Block(), torch.randn(2, 24, 64)
    actual, done = compiled(block, x)
    assert (len(done.used), done.kept[0].decision.cause) == (0, "needs a gradient")  # type: ignore[union-attr]
    parameters = list(block.parameters())
    plain = torch.compile(block, backend="inductor")
    torch._dynamo.reset()
    ours = torch.autograd.grad(actual.square().sum(), parameters)
    theirs = torch.autograd.grad(plain(x).square().sum(), parameters)
    assert relative_error(ours, theirs) < 1e-6


def test_training_and_evaluation_take_turns() -> None:
    block, x = Block(), torch.randn(2, 24, 64)
    with always(block) as (model, reports):
        for _ in range(2):
            model(x).sum().backward()
            with torch.no_grad():
                assert relative_error(model(x), block(x)) <= 0.02
    assert [(len(done.used), len(done.kept)) for done in reports] == [(0, 1), (1, 0)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    block, x = Block(), torch.randn(2, 24, 64)
    with mode():
        actual, done = compiled(block, x)
        assert len(done.used) == 1
        assert relative_error(actual, block(x)) <= 0.02


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(where: str) -> None:
    block, x = Block(), torch.randn(2, 24, 64)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if where == "around" else nullcontext():
        fn = block if where == "around" else inside
        actual, done = compiled(fn, x)
        expected = fn(x)
    assert done.used[0].site.dtype == "bfloat16"
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) <= 0.02


def test_autocast_of_mixed_dtypes() -> None:
    """SDPA under autocast takes q, k and v of different dtypes."""
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        actual, done = compiled(sdpa, q, k.bfloat16(), v)
        expected = sdpa(q, k.bfloat16(), v)
    assert len(done.used) == 1
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert relative_error(actual, expected) <= 0.03


def test_mixed_dtypes_without_autocast_are_refused_as_without_us() -> None:
    q, k, v = qkv()
    with pytest.raises(Exception, match="same dtype"):
        sdpa(q, k.bfloat16(), v)
    with pytest.raises(Exception, match="same dtype"):
        compiled(sdpa, q, k.bfloat16(), v)


# 6. Never a wrong answer: what is kept is Inductor's own, to the bit.


@pytest.mark.parametrize("policy", ["never", "auto"])
def test_a_kept_model_is_inductors_to_the_bit(policy: str) -> None:
    block, x = Block(), torch.randn(2, 24, 64)
    with torch.no_grad():
        actual, done = compiled(block, x, policy=policy, options={"sage.min_speedup": 1000})  # so that auto keeps it
        torch._dynamo.reset()
        expected = torch.compile(block, backend="inductor")(x)
    assert len(done.kept) == 1
    assert torch.equal(actual, expected)


# 8. Smoothing K by any vector is exact in real arithmetic.


def test_a_bias_on_the_keys_changes_nothing() -> None:
    q, k, v = qkv()
    with always(sdpa) as (model, _):
        assert relative_error(model(q, k + 30, v), model(q, k, v)) < 5e-3
