"""Causality shifted, as where the first keys are a cached context: query i sees the keys j <= i + ahead.

In: every provider that says it can, on its device. Out: the relative L2 error against float64, or SDPA under that mask.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sagecompile.formats import PROVIDERS
from sagecompile.kernels import cpu, launcher
from sagecompile.kernels.call import Call
from sagecompile.ops import reference
from tests.support import ACCURATE, TOLERANCE, exact_attention, relative_error

SHAPES = {
    (1, 1): "one token: its own",
    (1, 1000): "one token behind a context",
    (13, 13): "no offset: SDPA's own causality",
    (63, 64): "an offset of 1",
    (64, 127): "an offset of 63: a block of K less one",
    (97, 1097): "an offset of 1000: no whole number of anything",
    (256, 512): "whole tiles",
    (700, 701): "long, and one",
}


def providers():
    for name, row in PROVIDERS.items():
        if row.causal_offset:
            on_gpu = "cpu" not in row.devices
            yield pytest.param(name, marks=[pytest.mark.gpu] if on_gpu else [])


@pytest.fixture(params=providers())
def launch(request: pytest.FixtureRequest):
    """Of a provider, on CPU tensors: moved to its device and back."""
    name = request.param
    if name == "cpu" and cpu.why_not() is not None:
        pytest.skip(f"the CPU kernel cannot run here: {cpu.why_not()}")
    needed = PROVIDERS[name].compute_capability
    if needed is None:
        return reference.attention if name == "reference" else launcher(name)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != needed:
        pytest.skip(f"needs a CUDA GPU of compute capability {needed}")

    def launch_on_gpu(call, out, *, format):
        moved = out.cuda()
        launcher(name)(replace(call, q=call.q.cuda(), k=call.k.cuda(), v=call.v.cuda()), moved, format=format)
        out.copy_(moved)

    return launch_on_gpu


def inputs(q_len, kv_len, heads=4, kv_heads=2, dim=64, dtype=torch.float32):
    """Tokens first in memory, as vLLM packs them; K has a bias of 3 on every channel."""
    q = torch.randn(1, q_len, heads, dim).to(dtype).transpose(1, 2)
    k = (torch.randn(1, kv_len, kv_heads, dim) + 3 * torch.randn(dim).sign()).to(dtype).transpose(1, 2)
    return q, k, torch.randn(1, kv_len, kv_heads, dim).to(dtype).transpose(1, 2)


def attend(launch, q, k, v, ahead):
    out = torch.full_like(q, float("nan"))
    launch(Call(q, k, v, q.shape[-1] ** -0.5, ahead), out, format=ACCURATE)
    return out


def under_mask(q, k, v, offset):
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(offset)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
def test_aligned_to_the_end(launch, q_len, kv_len, dtype):
    q, k, v = inputs(q_len, kv_len, dtype=dtype)
    expected = exact_attention(q, k, v, is_causal=True, causal_offset=kv_len - q_len)
    assert relative_error(attend(launch, q, k, v, kv_len - q_len), expected) <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("offset", [0, 1, 63, 64, 255, 256, 300, 5000])
def test_any_offset(launch, offset):
    """Also one that leaves rows no mask at all, and one past the last key."""
    q, k, v = inputs(130, 301)
    expected = exact_attention(q, k, v, is_causal=True, causal_offset=offset)
    assert relative_error(attend(launch, q, k, v, offset), expected) <= TOLERANCE[ACCURATE]


def test_a_chunk_is_its_part_of_the_whole(launch):
    """What a prompt's second half gets is what it gets in one piece, row for row."""
    q, k, v = inputs(300, 300)
    whole, part = attend(launch, q, k, v, 0), attend(launch, q[:, :, 200:], k, v, 200)
    assert relative_error(part, whole[:, :, 200:]) <= 1e-3


def agrees(result, expected):
    """NaN where SDPA has it, and close elsewhere: whole heads are exact, or only their rows that need it."""
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= TOLERANCE[ACCURATE]


def test_steep_heads_are_exact(launch):
    """A head that INT8 cannot hold is SDPA's under the same mask; its neighbours keep their accuracy."""
    q, k, v = inputs(97, 197)
    k[:, 1] *= 300
    result, expected = attend(launch, q, k, v, 100), under_mask(q, k, v, 100)
    torch.testing.assert_close(result[:, 2:], expected[:, 2:], rtol=1e-3, atol=1e-3)
    assert relative_error(result[:, :2], expected[:, :2]) <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("token", [0, 96])
def test_not_finite(launch, where, token):
    """At a key that every row sees: where a row does not, SDPA under a mask gives NaN and hopper does not."""
    q, k, v = inputs(97, 197)
    {"q": q, "k": k, "v": v}[where][0, 1, token % 97 if where == "q" else token, 5] = float("nan")
    agrees(attend(launch, q, k, v, 100), under_mask(q, k, v, 100))


def test_a_negative_offset_is_refused():
    with pytest.raises(ValueError, match="ahead -1: must be at least 0"):
        attend(cpu.attention, *inputs(5, 5), -1)
