"""How Q and K are balanced before they are rotated: a factor for each channel, from a sample of tokens.

In: q, k as the caller has them, with what prologues do to them. Out: for each KV head the factors of Q and of K, and
the mean of K. See `balance` in sagecompile.ops.quantize; here factors are powers of two, so 16-bit values stay exact.
It is a launch of its own because quantization needs the answer before its first tile, for all query heads of a KV head.
Hopper's kernels read the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from sagecompile.kernels.prologue import Prologue

from .rows import arguments_of, load_rows, offset

SAMPLE = tl.constexpr(64)
"""Tokens, evenly spaced: with all of them errors are the same."""
_LEAST_RMS = tl.constexpr(2.0**-7)
_TINY = tl.constexpr(1e-30)
_LARGEST = tl.constexpr(1e18)
"""What a value counts at most: its square is still a finite float32."""


class Balanced(NamedTuple):
    """What was launched, on a GPU, and what it wrote."""

    basis: torch.Tensor
    """(B * Hkv, 3, width) float32: what Q is multiplied by, what K is multiplied by, and K's mean times that."""
    compiled: Any
    """By Triton."""
    blocks: int
    arguments: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], tuple[Any, ...]]
    """Of q, k and basis, and of the weight, cos and sin of q and of k: the tensors, or what stands for them."""


def balance(
    q: torch.Tensor,
    k: torch.Tensor,
    width: int,
    *,
    q_prologue: Prologue | None = None,
    k_prologue: Prologue | None = None,
    overlap: bool = False,
    launch: bool = True,
) -> Balanced:
    """q: (B, Hq, Nq, D); k: (B, Hkv, Nk, D), any strides; width: that D is padded to.

    A prologue is applied to q or k as they are read, see recompute_flagged.
    overlap: the kernel behind this one may start before it has ended (compute capability 9.0 and up).
    launch: False where it is only to be built.
    """
    batch, kv_heads, kv_len, head_dim = k.shape
    basis = torch.empty((batch * kv_heads, 3, width), dtype=torch.float32, device=q.device)
    q_norm, q_rope, q_tables, q_numbers = arguments_of(q_prologue, q)
    k_norm, k_rope, k_tables, k_numbers = arguments_of(k_prologue, k)
    numbers = (kv_heads, q.shape[1] // kv_heads, q.shape[2], kv_len, head_dim, *q.stride(), *k.stride())
    constants = (q_norm, q_rope, k_norm, k_rope, width, 64 if width == 64 else 128, overlap)

    def arguments(tensors: Sequence[Any], q_tables: Sequence[Any], k_tables: Sequence[Any]) -> tuple[Any, ...]:
        return *tensors, *numbers, *q_tables, *q_numbers, *k_tables, *k_numbers, *constants

    blocks = batch * kv_heads
    given = arguments((q, k, basis), q_tables, k_tables)
    if launch:
        compiled = _balance[(blocks,)](*given, num_warps=8)
    else:
        compiled = _balance.warmup(*given, grid=(blocks,), num_warps=8)
    return Balanced(basis, compiled, blocks, arguments)


@triton.jit(do_not_specialize=["kv_heads", "group", "q_len", "kv_len"])
def _balance(
    Q, K, BASIS, kv_heads, group, q_len, kv_len, head_dim,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    Q_W, Q_COS, Q_SIN, stride_qtb, stride_qtn, q_eps, K_W, K_COS, K_SIN, stride_ktb, stride_ktn, k_eps,
    Q_NORM: tl.constexpr, Q_ROPE: tl.constexpr, K_NORM: tl.constexpr, K_ROPE: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Hkv)."""
    if OVERLAP:
        gdc_launch_dependents()
    head = tl.program_id(0).to(tl.int64)
    batch, kv_head = head // kv_heads, head % kv_heads
    columns = tl.arange(0, COLUMNS)
    in_head = columns < head_dim
    index = tl.arange(0, SAMPLE).to(tl.int64)

    k_count = tl.minimum(kv_len, SAMPLE)
    token = index * kv_len // k_count
    k_inside = (index < k_count)[:, None] & in_head[None, :]
    k = load_rows(
        K + batch * stride_kb + kv_head * stride_kh, token, stride_kn, stride_kd, columns, k_inside,
        K_W, K_COS + batch * stride_ktb, K_SIN + batch * stride_ktb, stride_ktn, k_eps, head_dim, K_NORM, K_ROPE,
    ).to(tl.float32)  # fmt: skip
    rows = group.to(tl.int64) * q_len
    q_count = tl.minimum(rows, SAMPLE)
    row = index * rows // q_count
    q_head = kv_head * group + row // q_len
    q_inside = (index < q_count)[:, None] & in_head[None, :]
    q = load_rows(
        Q + batch * stride_qb + offset(q_head, stride_qh)[:, None], row % q_len, stride_qn, stride_qd, columns,
        q_inside, Q_W, Q_COS + batch * stride_qtb, Q_SIN + batch * stride_qtb, stride_qtn, q_eps, head_dim,
        Q_NORM, Q_ROPE,
    ).to(tl.float32)  # fmt: skip

    mean = tl.sum(k, 0) / k_count
    size_of_k = _log2_rms(tl.where(k_inside, k - mean[None, :], 0.0), k_count, in_head)
    size_of_q = _log2_rms(q, q_count, in_head)
    exponent = tl.where(in_head, (size_of_k - size_of_q) * 0.5, 0.0)
    exponent = tl.where(in_head, tl.floor(exponent - tl.sum(exponent, 0) / head_dim + 0.5), 0.0)
    BASIS += head * (3 * WIDTH) + columns
    tl.store(BASIS, tl.math.exp2(exponent), mask=columns < WIDTH)
    tl.store(BASIS + WIDTH, tl.math.exp2(-exponent), mask=columns < WIDTH)
    tl.store(BASIS + 2 * WIDTH, mean * tl.math.exp2(-exponent), mask=columns < WIDTH)


@triton.jit
def _log2_rms(x, count, in_head):
    """Of each column; what is not finite counts as 0."""
    size = tl.minimum(tl.abs(x), _LARGEST)
    rms = tl.sqrt(tl.sum(tl.where(tl.abs(x) < float("inf"), size * size, 0.0), 0) / count)
    largest = tl.max(tl.where(in_head, rms, 0.0), 0)
    return tl.math.log2(tl.maximum(tl.maximum(rms, largest * _LEAST_RMS), _TINY))
