"""Keys that 8 bits hold only after Q and K are rotated, on the kernels of our own for CUDA GPUs, against float64.

In: K with a bias in four channels that RoPE turns, so that no mean takes it away, or with one channel larger than the
others; large queries. What 8 bits do not hold then must be computed exactly. Out: the relative L2 error,
||out - expected|| / ||expected||, over a whole call, and of its worst row.
"""

from __future__ import annotations

import pytest
import torch
from support import ACCURATE, FAST, promised, relative_error

from sagecompile import formats, kernels
from sagecompile.kernels.call import Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = [
    *(("half", size) for size in (3, 10, 30, 60, 100, 150)),
    *(("interleaved", size) for size in (10, 60)),
    *(("channel", size) for size in (3, 10, 30, 60, 100)),
]
"""The outliers of K, whose usual channels are 1: a bias that RoPE turns by halves or interleaved, or one channel."""
MOST = dict(zip((ACCURATE, FAST), promised().on_gpus, strict=True))
MOST_OF_SMALL = {ACCURATE: 0.022, FAST: 0.048}
"""Where outliers are of 10 at most."""
MOST_OF_A_ROW = 0.25
HEAD_DIMS = (64, 96, 128)
CALLS = {
    "64, causal": (2, 2, 64, torch.float16, True),
    "64, grouped heads, float32": (4, 1, 64, torch.float32, False),
    "1000, grouped heads": (4, 2, 1000, torch.bfloat16, False),
    "1000, causal, float32": (2, 2, 1000, torch.float32, True),
    "4096": (2, 2, 4096, torch.float16, False),
    "4096, grouped heads, causal": (4, 1, 4096, torch.bfloat16, True),
}
"""Heads of Q and of K, tokens, dtype, causal."""


@pytest.fixture(params=("triton", "hopper"))
def attend(request):
    """`attend(q, k, v, format=, causal=)` of a provider, where the GPU can run it."""
    format = request.node.callspec.params["format"]
    capability = torch.cuda.get_device_capability()
    only, least = formats.PROVIDERS[request.param].compute_capability, formats.FORMATS[format].compute_capability
    if only not in (None, capability) or capability < least:
        pytest.skip(f"{request.param} or {format} does not run on compute capability {capability}")

    def run(q, k, v, *, format, causal):
        out = torch.full_like(q, float("nan"))
        scale = q.shape[-1] ** -0.5
        kernels.launcher(request.param)(Call(q, k, v, scale, 0 if causal else None), out, format=format)
        return out

    return run


def turned(x, rope):
    """x (..., N, D) after RoPE with a base of 1e6; rope: by halves, or interleaved."""
    tokens, dim = x.shape[-2:]
    turns = torch.outer(torch.arange(tokens), 1e6 ** (-torch.arange(0, dim, 2) / dim))
    cos, sin = turns.cos(), turns.sin()
    first, second = x.chunk(2, -1) if rope == "half" else (x[..., ::2], x[..., 1::2])
    parts = first * cos - second * sin, second * cos + first * sin
    return torch.cat(parts, -1) if rope == "half" else torch.stack(parts, -1).flatten(-2)


def inputs(kind, size, q_heads, kv_heads, tokens, dim, dtype, *, batch=1):
    """q (B, Hq, N, D), k, v (B, Hkv, N, D): N(0, 1) but for the outliers of K; of a bias Q has a fiftieth."""
    q, k, v = (torch.randn(batch, heads, tokens, dim) for heads in (q_heads, kv_heads, kv_heads))
    if kind == "channel":
        k[..., 7] *= size
    else:
        bias = torch.zeros(dim)
        channels = [channel * dim // 128 for channel in (20, 45, 84, 109)]
        bias[channels] = size * torch.tensor([1, -1, 0.7, 0.5])
        q, k = turned(q + 0.02 * bias, kind), turned(k + bias, kind)
    return tuple(x.to("cuda", dtype) for x in (q, k, v))


def expected(q, k, v, *, causal):
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("dim", "call"), [(dim, call) for dim in HEAD_DIMS for call in CALLS if dim != 96 or "1000" in call]
)
@pytest.mark.parametrize(("kind", "size"), KINDS)
@pytest.mark.parametrize("format", (ACCURATE, FAST))
def test_error(attend, format, kind, size, dim, call, record_property):
    *heads_and_tokens, dtype, causal = CALLS[call]
    q, k, v = inputs(kind, size, *heads_and_tokens, dim, dtype)
    result, exact = attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)
    error = relative_error(result, exact)
    record_property("error", error)
    assert error <= (MOST_OF_SMALL if size <= 10 else MOST)[format]
    of_rows = (result.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert of_rows.max() <= MOST_OF_A_ROW


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("gain", (2, 4, 8, 40, 120))
@pytest.mark.parametrize("format", (ACCURATE, FAST))
def test_large_scores(attend, format, gain, causal, dim):
    """Queries so much larger: what they make of rounding is, too, until it is computed exactly."""
    q, k, v = inputs("channel", 1, 4, 2, 1000, dim, torch.bfloat16)
    result = attend(gain * q, k, v, format=format, causal=causal)
    assert relative_error(result, expected(gain * q, k, v, causal=causal)) <= MOST[format]


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("format", (ACCURATE, FAST))
def test_plain_inputs_are_not_computed_twice(attend, format, dim):
    """Not even a part of them: an exact result would be nearer by far."""
    q, k, v = inputs("channel", 1, 4, 2, 1000, dim, torch.float32)
    for causal in (False, True):
        result, exact = attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)
        of_rows = ((result.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten()
        assert (of_rows < 1e-3).float().mean() < 0.01


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("format", (ACCURATE, FAST))
def test_alone_and_in_a_batch(attend, format, causal, dim, dtype):
    """The same bits."""
    q, k, v = inputs("half", 30, 4, 2, 1000, dim, dtype, batch=5)
    together = attend(q, k, v, format=format, causal=causal)
    for i in range(5):
        alone = attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], format=format, causal=causal)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("dim", (40, *HEAD_DIMS))
@pytest.mark.parametrize("which", range(2), ids="qk")
@pytest.mark.parametrize("format", (ACCURATE, FAST))
def test_rows_that_cannot_be_rotated(attend, format, which, dim):
    """The sum of a row of the largest numbers is none: such rows come out exact."""
    given = list(inputs("channel", 1, 2, 2, 200, dim, torch.float32))
    given[1 - which] *= 1e-36
    given[which][:, 0, 100] = 2e38 * given[which][:, 0, 100].sign()
    given[2] += 1.0  # a uniform softmax averages N(0,1) to nearly nothing
    q, k, v = given
    result = attend(q, k, v, format=format, causal=True)
    assert relative_error(result, expected(q, k, v, causal=True)) <= {ACCURATE: 0.02, FAST: 0.045}[format]
