"""The CPU kernel on random shapes, strides, dtypes and thread counts, against attention in float64 and the reference.

In: calls drawn by hypothesis, the same ones every time. Out: the first and smallest call that is wrong.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagecompile.kernels import cpu
from sagecompile.kernels.call import Call
from sagecompile.ops import reference
from tests.support import ACCURATE, TOLERANCE, exact_attention, relative_error

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"the CPU kernel cannot run here: {cpu.why_not()}")

GUARD = 17.0
"""Stands around and between the elements of every tensor, and must stand there afterwards."""


@st.composite
def calls(draw):
    """Sizes, dtype and thread count of one call, with a bias to the edges of blocks, tiles and panels."""
    edges = st.sampled_from((12, 16, 32, 64, 96, 256)).flatmap(lambda n: st.integers(n - 1, n + 1))
    lengths = st.one_of(st.integers(1, 40), edges, st.integers(1, 600))
    return {
        "batch": draw(st.integers(1, 3)),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 3)),
        "q_len": draw(lengths),
        "kv_len": draw(lengths),
        "dim": draw(st.one_of(st.integers(1, 256), st.sampled_from((64, 96, 128)))),
        "dtype": draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        "causal": draw(st.booleans()),
        "causal_offset": draw(st.sampled_from((0, 0, 1, 63, 500))),
        "threads": draw(st.integers(1, 4)),
        "orders": draw(st.lists(st.permutations(range(4)), min_size=4, max_size=4)),
        "gaps": draw(st.lists(st.integers(1, 2), min_size=4, max_size=4)),
        "seed": draw(st.integers(0, 2**16)),
    }


def strided(values: torch.Tensor, order: tuple[int, ...], gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """These values with their dims in memory in this order, every `gap`-th element, an offset; and what holds them."""
    sizes = [values.shape[i] for i in order]
    storage = torch.full([size + 2 for size in sizes[:-1]] + [gap * (sizes[-1] + 2)], GUARD, dtype=values.dtype)
    inner = storage[tuple(slice(1, size + 1) for size in sizes[:-1])][..., gap : gap * (sizes[-1] + 1) : gap]
    view = inner.permute([order.index(i) for i in range(4)])
    view.copy_(values)
    return view, storage


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(call=calls())
def test_any_call(call):
    torch.manual_seed(call["seed"])
    q_shape = (call["batch"], call["kv_heads"] * call["group"], call["q_len"], call["dim"])
    kv_shape = (call["batch"], call["kv_heads"], call["kv_len"], call["dim"])
    q, k, v = (torch.randn(shape).to(call["dtype"]) for shape in (q_shape, kv_shape, kv_shape))
    k += 3
    kept = [x.clone() for x in (q, k, v)]
    tensors, storages = zip(*map(strided, (q, k, v, torch.zeros_like(q)), call["orders"], call["gaps"]), strict=True)
    ahead = call["causal_offset"] if call["causal"] else None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(call["threads"])
        cpu.attention(Call(*tensors[:3], call["dim"] ** -0.5, ahead), tensors[3], format=ACCURATE)
    finally:
        torch.set_num_threads(before)
    for x, copy in zip(tensors, kept, strict=False):
        assert torch.equal(x, copy), "an input was modified"
    result = tensors[3].clone()
    for x, storage in zip(tensors, storages, strict=True):
        x.fill_(GUARD)
        assert (storage == GUARD).all(), "something beside the output was written"
    expected = exact_attention(q, k, v, is_causal=call["causal"], causal_offset=call["causal_offset"])
    plain = torch.empty_like(q)
    reference.attention(Call(q, k, v, call["dim"] ** -0.5, ahead), plain, format=ACCURATE)
    # Few keys of few dimensions can be harder than the table's inputs, for the reference as well.
    limit = max(TOLERANCE[ACCURATE], 1.5 * relative_error(plain, expected))
    assert relative_error(result, expected) <= limit
