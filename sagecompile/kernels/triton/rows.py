"""Rows of Q or K as they are read, with what a prologue does to them.

In: addresses, strides and the tables of a prologue. Out: (rows, columns) in the tensor's own dtype.
"""

import torch
import triton
import triton.language as tl

from sagecompile.kernels.prologue import ROPES, Prologue, table_strides


def arguments_of(
    prologue: Prologue | None, x: torch.Tensor
) -> tuple[int, int, tuple[torch.Tensor, ...], tuple[float, ...]]:
    """NORM (2: with a weight), ROPE (as in `ROPES`); weight, cos, sin (x where there is none); cos' strides and eps."""
    prologue = prologue or Prologue()
    weight = prologue.weight if prologue.eps is not None else None
    norm = 0 if prologue.eps is None else 1 if weight is None else 2
    weight = x if weight is None else weight
    cos, sin = prologue.cos, prologue.sin
    if prologue.rope == "none" or cos is None or sin is None:
        return norm, 0, (weight, x, x), (0, 0, prologue.eps or 0.0)
    assert table_strides(cos) == table_strides(sin) and cos.stride(-1) == sin.stride(-1) == 1
    return norm, ROPES.index(prologue.rope), (weight, cos, sin), (*table_strides(cos), prologue.eps or 0.0)


@triton.jit
def offset(index, stride):
    return tl.cast(index, tl.int64) * stride


@triton.jit
def load_rows(
    X, tokens, stride_n, stride_d, columns, mask, W, COS, SIN, stride_tn, eps, head_dim,
    NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Rows of Q or K after their prologue, in their own dtype; zeros where masked."""
    rows = X + offset(tokens, stride_n)[:, None]
    stored = tl.load(rows + offset(columns, stride_d)[None, :], mask=mask, other=0.0)
    if NORM == 0 and ROPE == 0:
        return stored
    x = stored.to(tl.float32)
    inverse = tl.full([tokens.shape[0]], 1.0, tl.float32)
    if NORM:
        inverse = tl.math.rsqrt(tl.sum(x * x, 1) / head_dim + eps)
        x = x * inverse[:, None] * _weights(W, columns, head_dim, NORM)[None, :]
    if ROPE:
        half = head_dim // 2
        partner = (columns + half) % head_dim if ROPE == 1 else columns ^ 1
        first = columns < half if ROPE == 1 else columns % 2 == 0
        turned = tl.load(rows + offset(partner, stride_d)[None, :], mask=mask, other=0.0).to(tl.float32)
        turned = turned * inverse[:, None] * _weights(W, partner, head_dim, NORM)[None, :]
        at = offset(tokens, stride_tn)[:, None] + columns[None, :]
        cos = tl.load(COS + at, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(SIN + at, mask=mask, other=0.0).to(tl.float32)
        x = x * cos + tl.where(first[None, :], -turned, turned) * sin
    return x.to(stored.dtype)


@triton.jit
def _weights(W, columns, head_dim, NORM: tl.constexpr):
    if NORM < 2:
        return tl.full([columns.shape[0]], 1.0, tl.float32)
    return tl.load(W + columns, mask=columns < head_dim, other=0.0).to(tl.float32)
