"""Quantize Q, K and V for the attention kernel, each in one pass over the caller's tensor.

In: q, k, v with any strides. Out: dense buffers padded to whole blocks, their scales, and one flag for each KV head.
Why: the attention kernel then loads whole tiles without masks; heads that INT8 cannot hold are known without a sync.

INT8 with a smoothed K follows SageAttention (https://arxiv.org/abs/2410.02367): softmax does not see a vector that is
subtracted from every key. Q and K are balanced and rotated so that no score changes: see sagecompile.ops.quantize.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .balance import balance

BLOCK = 128
"""Tokens that share one scale of K, and the multiple to which every buffer is padded."""

LOG2E = 1.4426950408889634

_BLOCK = tl.constexpr(BLOCK)
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_AMAX = tl.constexpr(2.0**-119)  # amax / 127 is then still a normal float32, and 127 / amax a finite one

# One unit of an integer score, in powers of two of P, above which a head is left to the exact kernel: rounding Q and K
# to INT8 moves a score by up to some hundred units. The same bound stands in sagecompile.ops.quantize.
STEEPEST = tl.constexpr(2.0**-6)

_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest even integer


class Quantized(NamedTuple):
    """What the attention kernel reads. N' is N padded to BLOCK, D' is D padded to 64, 96 or 128; padding is zero."""

    q: torch.Tensor
    """(B * Hq, Nq', D') int8, balanced and rotated"""
    q_factor: torch.Tensor
    """(B * Hq, Nq') float32: row scale * |softmax scale| * log2(e); the sign of the softmax scale is in q"""
    k: torch.Tensor
    """(B * Hkv, Nk', D') int8, smoothed, balanced and rotated; with FP8 values, tokens are permuted inside groups of 16
    (see _position_of)"""
    k_scale: torch.Tensor
    """(B * Hkv, Nk' / BLOCK) float32"""
    v: torch.Tensor
    """FP8: (B * Hkv, D', Nk') float8_e4m3fn, as 8-bit operands want the summed dimension contiguous.
    Else (B * Hkv, Nk', D') 16-bit"""
    v_amax: torch.Tensor
    """FP8: (B, Hkv, D) float32, the largest |v| of each channel, which is stored as 448. Else empty"""
    flags: torch.Tensor
    """(B * Hkv) int32: 1 where that head's K or V, or a query head of its group, holds a value that is not finite, or
    where one unit of the integer scores is more than STEEPEST"""


def padded_head_dim(head_dim: int) -> int:
    """The narrowest of 64, 96 and 128 that holds head_dim."""
    return next(width for width in (64, 96, 128) if head_dim <= width)


def quantize(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, fp8: bool) -> Quantized:
    """q: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D). V becomes FP8 per channel, or 16-bit: its own type, or bfloat16."""
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    width = padded_head_dim(head_dim)
    q_padded, kv_padded = triton.cdiv(q_len, BLOCK) * BLOCK, triton.cdiv(kv_len, BLOCK) * BLOCK
    q_rows, kv_rows = batch * q_heads, batch * kv_heads

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    if fp8:
        v_buffer = empty(kv_rows, width, kv_padded, dtype=torch.float8_e4m3fn)
        v_amax = torch.linalg.vector_norm(v, ord=float("inf"), dim=-2, dtype=torch.float32).contiguous()
    else:
        v_buffer = empty(kv_rows, kv_padded, width, dtype=torch.bfloat16 if v.dtype == torch.float32 else v.dtype)
        v_amax = empty(0, dtype=torch.float32)
    result = Quantized(
        q=empty(q_rows, q_padded, width, dtype=torch.int8),
        q_factor=empty(q_rows, q_padded, dtype=torch.float32),
        k=empty(kv_rows, kv_padded, width, dtype=torch.int8),
        k_scale=empty(kv_rows, kv_padded // BLOCK, dtype=torch.float32),
        v=v_buffer,
        v_amax=v_amax,
        flags=torch.zeros(kv_rows, dtype=torch.int32, device=q.device),
    )
    basis = balance(q, k, width).basis
    columns = triton.next_power_of_2(width)
    _quantize_k[(kv_rows * (kv_padded // BLOCK),)](
        k, basis, result.k, result.k_scale, result.flags, kv_heads, kv_len, head_dim,
        *k.stride(), PERMUTE=fp8, WIDTH=width, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    _quantize_q[(q_rows * (q_padded // BLOCK),)](
        q, basis, result.q, result.q_factor, result.k_scale, result.flags, scale * LOG2E, q_heads, q_heads // kv_heads,
        q_len, kv_len, head_dim, *q.stride(), WIDTH=width, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    _quantize_v[(kv_rows * (kv_padded // BLOCK),)](
        v, v_amax, result.v, result.flags, kv_heads, kv_len, head_dim,
        *v.stride(), FP8=fp8, WIDTH=width, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return result


@triton.jit
def _position_of(token):
    """Where a token of K is stored inside its group of 16: token 4t + 2h + b in row 8h + 2t + b.

    A thread of the 32-bit result of QK^T holds columns 8h + 2t + b (t: its lane in the quad), and an FP8 operand of PV
    wants 4t + 2h + b there (PTX ISA, fragments of wgmma and of mma.m16n8k32). With K stored so, P needs no shuffle.
    """
    return (token & ~15) | (((token >> 1) & 1) << 3) | (((token >> 2) & 3) << 1) | (token & 1)


@triton.jit
def token_at(position):
    """The token that _position_of puts at this position."""
    return (position & ~15) | (((position >> 1) & 3) << 2) | (((position >> 3) & 1) << 1) | (position & 1)


@triton.jit
def _round_to_int8(x):
    return ((x + _ROUNDING) - _ROUNDING).to(tl.int8)


@triton.jit
def _load_block(X, head, heads, tokens, length, columns, head_dim, stride_b, stride_h, stride_n, stride_d):
    """One (tokens, columns) block of a (B, H, N, D) tensor with any strides; zero outside."""
    base = X + head // heads * stride_b + head % heads * stride_h
    offsets = tokens.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(base + offsets, mask=(tokens < length)[:, None] & (columns < head_dim)[None, :], other=0.0)


@triton.jit
def _rotation(WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Signs, by a quadratic form of a channel's bits, times Hadamard's matrix, not scaled; of 96 those of 64 and 32."""
    row = tl.arange(0, COLUMNS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    ones = (row & column) ^ (row & (row >> 1) & 0x55)  # an odd number of them is a negative entry
    ones ^= ones >> 4
    matrix = tl.where((0x6996 >> (ones & 15)) & 1 != 0, -1.0, 1.0)
    if WIDTH == 96:
        matrix = tl.where((row ^ column) < tl.where(row < 64, 64, 32), matrix, 0.0)
    return matrix


@triton.jit
def _rotate(x, matrix):
    """Rows of Q or K times the matrix, by tensor cores. A value that is not finite makes its row so.

    Products of 16-bit values are exact; float32 is multiplied in two parts of 8 bits each, and is off by 2^-17.
    """
    if x.dtype == tl.float32:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        turned = tl.dot(low, matrix.to(tl.bfloat16), tl.dot(high, matrix.to(tl.bfloat16)))
    else:
        turned = tl.dot(x, matrix.to(x.dtype))
    return turned


@triton.jit
def _rotation_scale(WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each column of the matrix: what makes it orthonormal."""
    column = tl.arange(0, COLUMNS)
    half: tl.constexpr = 0.17677669529663687 if WIDTH == 96 else 0.08838834764831845  # 32^-0.5, 128^-0.5
    return tl.where(column < (64 if WIDTH < 128 else 0), 0.125, half)


@triton.jit
def _raise_flag(FLAGS, kv_head, x):
    """Set the head's flag if any of x is not finite. Several programs may store the same 1."""
    bad = tl.where(tl.abs(x) < float("inf"), 0, 1)
    tl.store(FLAGS + kv_head, 1, mask=tl.max(tl.max(bad, 1), 0) != 0)


@triton.jit(do_not_specialize=["length", "kv_length"])
def _quantize_q(
    Q, BASIS, Q8, FACTOR, K_SCALE, FLAGS, scale_log2e, heads, group, length, kv_length, head_dim,
    stride_b, stride_h, stride_n, stride_d, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Hq * blocks). Balanced, rotated, symmetric INT8 per token. After _quantize_k: it reads its scales."""
    blocks = tl.cdiv(length, _BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = tl.program_id(0) % blocks * _BLOCK + tl.arange(0, _BLOCK)
    columns = tl.arange(0, COLUMNS)
    q = _load_block(Q, head, heads, tokens, length, columns, head_dim, stride_b, stride_h, stride_n, stride_d)
    scale = _rotation_scale(WIDTH, COLUMNS) * tl.where(scale_log2e < 0, -1.0, 1.0)
    kv_head = head // group  # Hq = group * Hkv, so b * Hkv + h // group = (b * Hq + h) // group
    balanced = tl.load(BASIS + kv_head * (3 * WIDTH) + columns, mask=columns < WIDTH, other=0.0)
    x = _rotate(q * balanced.to(q.dtype)[None, :], _rotation(WIDTH, COLUMNS)) * scale[None, :]
    _raise_flag(FLAGS, kv_head, x)
    amax = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST_AMAX)
    factor = amax * (1 / 127) * tl.abs(scale_log2e)
    rows = head * blocks * _BLOCK + tokens
    tl.store(FACTOR + rows, factor)
    kv_blocks = tl.cdiv(kv_length, _BLOCK)
    largest = tl.zeros([_BLOCK], tl.float32)
    for start in range(0, kv_blocks, _BLOCK):
        block = start + tl.arange(0, _BLOCK)
        largest = tl.maximum(largest, tl.load(K_SCALE + kv_head * kv_blocks + block, mask=block < kv_blocks, other=0.0))
    tl.store(FLAGS + kv_head, 1, mask=tl.max(largest, 0) * tl.max(factor, 0) > STEEPEST)
    x8 = _round_to_int8(x * (127 / amax)[:, None])
    tl.store(Q8 + rows[:, None] * WIDTH + columns[None, :], x8, mask=(columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["length"])
def _quantize_k(
    K, BASIS, K8, SCALE, FLAGS, heads, length, head_dim, stride_b, stride_h, stride_n, stride_d,
    PERMUTE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Hkv * blocks). Smoothed by the mean, balanced, rotated, then symmetric INT8 per block."""
    blocks = tl.cdiv(length, _BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    tokens = block * _BLOCK + tl.arange(0, _BLOCK)
    columns = tl.arange(0, COLUMNS)
    k = _load_block(K, head, heads, tokens, length, columns, head_dim, stride_b, stride_h, stride_n, stride_d)
    BASIS += head * (3 * WIDTH) + columns
    balanced = tl.load(BASIS + WIDTH, mask=columns < WIDTH, other=0.0)
    mean = tl.load(BASIS + 2 * WIDTH, mask=columns < WIDTH, other=0.0)
    k *= balanced.to(k.dtype)[None, :]
    matrix = _rotation(WIDTH, COLUMNS)
    inside = (tokens < length)[:, None]
    if k.dtype == tl.float32:
        x = _rotate(tl.where(inside, k - mean[None, :], 0.0), matrix)
    else:  # a rotation's rounding of the mean is the same for all keys
        x = tl.where(inside, _rotate(k, matrix) - tl.sum(mean[:, None] * matrix, 0)[None, :], 0.0)
    x = x * _rotation_scale(WIDTH, COLUMNS)[None, :]
    _raise_flag(FLAGS, head, x)  # a mean that is not finite makes all of x so
    amax = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), SMALLEST_AMAX)
    tl.store(SCALE + head * blocks + block, amax * (1 / 127))
    rows = head * blocks * _BLOCK + (_position_of(tokens) if PERMUTE else tokens)
    tl.store(
        K8 + rows[:, None] * WIDTH + columns[None, :], _round_to_int8(x * (127 / amax)), mask=(columns < WIDTH)[None, :]
    )


@triton.jit(do_not_specialize=["length"])
def _quantize_v(
    V, AMAX, V8, FLAGS, heads, length, head_dim, stride_b, stride_h, stride_n, stride_d,
    FP8: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Hkv * blocks). FP8 per channel and transposed, or a dense 16-bit copy."""
    blocks = tl.cdiv(length, _BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = tl.program_id(0) % blocks * _BLOCK + tl.arange(0, _BLOCK)
    columns = tl.arange(0, COLUMNS)
    v = _load_block(V, head, heads, tokens, length, columns, head_dim, stride_b, stride_h, stride_n, stride_d)
    if FP8:
        _raise_flag(FLAGS, head, v.to(tl.float32))
        amax = tl.load(AMAX + head * head_dim + columns, mask=columns < head_dim, other=0.0)
        x = v.to(tl.float32) * (1 / tl.maximum(amax, SMALLEST_AMAX) * E4M3_MAX)[None, :]
        x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)
        rows = head * WIDTH + columns
        tl.store(V8 + rows[None, :] * (blocks * _BLOCK) + tokens[:, None], x, mask=(columns < WIDTH)[None, :])
    else:
        x = v.to(V8.dtype.element_ty)
        _raise_flag(FLAGS, head, x.to(tl.float32))  # after the cast: the largest float32 is not a finite bfloat16
        rows = head * blocks * _BLOCK + tokens
        tl.store(V8 + rows[:, None] * WIDTH + columns[None, :], x, mask=(columns < WIDTH)[None, :])
