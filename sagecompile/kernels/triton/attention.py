"""Attention on quantized Q, K and V: INT8 QK^T, softmax in float32, PV in 16-bit or FP8.

In: a call, its tensors as the caller has them. Out: `out`, wholly written.
Why in this shape: quantize once, then a FlashAttention loop (https://arxiv.org/abs/2307.08691) over 8-bit tiles, then
an exact kernel for the heads that 8 bits cannot hold. Nothing is read back, so CUDA graphs can capture it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

import sagecompile.formats as formats
from sagecompile.kernels.call import Call
from sagecompile.kernels.check import check

from .exact import recompute_flagged
from .quantize import BLOCK, E4M3_MAX, SMALLEST_AMAX, Quantized, padded_head_dim, quantize, token_at

FORMATS = {name: formats.FORMATS[name].compute_capability for name in formats.PROVIDERS["triton"].formats}
"""Format -> lowest CUDA compute capability that runs it."""


class Tile(NamedTuple):
    """How a program of the kernel is cut: query rows, keys in one step, warps, and steps of K and V in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# Rows and keys divide BLOCK. Every tile stays below the 99 KiB of shared memory of sm86, sm89 and sm120.
TILES = {
    ("qk_int8_pv_fp16", 64): Tile(128, 64, 4, 3),
    ("qk_int8_pv_fp16", 96): Tile(128, 64, 8, 3),
    ("qk_int8_pv_fp16", 128): Tile(128, 64, 8, 3),
    ("qk_int8_pv_fp8", 64): Tile(64, 128, 4, 2),
    ("qk_int8_pv_fp8", 96): Tile(64, 128, 4, 2),
    ("qk_int8_pv_fp8", 128): Tile(64, 128, 4, 2),
}

_BLOCK = tl.constexpr(BLOCK)

FLAG_ROWS = 32
"""Rows of the output that share one flag."""
_FLAG_ROWS = tl.constexpr(FLAG_ROWS)

# Of a guard that sagecompile.ops.quantize explains. 0.03 and not 0.022, as channels are not balanced here.
MOST_ERROR = tl.constexpr(0.03)
MOST_ERROR_OF_A_ROW = tl.constexpr(0.07)
MOST_NOISE = tl.constexpr(0.1)
_ROUNDING_NOISE = tl.constexpr(0.6931471805599453**2 / 12)

# 1.5 * 2^23 and its bits: adding an integer below 2^22 to the bits gives the bits of the sum.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)

# P is about 2^8 at most in FP8: inside e4m3's range (448), and 2^-17 of the maximum is still above zero.
_P_SHIFT = tl.constexpr(8.0)


def attention(call: Call, out: torch.Tensor, *, format: str) -> None:
    """The call's result into out, (B, Hq, Nq, D) with any strides; 1 <= D <= 128."""
    check(call, out, format, FORMATS, max_head_dim=128)
    with torch.cuda.device_of(out):
        quantized = quantize(call.q, call.k, call.v, scale=call.scale, fp8=format == "qk_int8_pv_fp8")
        flags = _launch(quantized, out, call.k.shape, is_causal=call.is_causal, format=format)
        recompute_flagged(call, out, flags, flag_rows=FLAG_ROWS)


def _launch(
    quantized: Quantized, out: torch.Tensor, kv_shape: torch.Size, *, is_causal: bool, format: str
) -> torch.Tensor:
    """Which rows must be computed again, by FLAG_ROWS: (B * Hq, ceil(Nq / FLAG_ROWS)) int32."""
    batch, q_heads, q_len, head_dim = out.shape
    kv_heads, kv_len = kv_shape[1:3]
    width = padded_head_dim(head_dim)
    tile = TILES[format, width]
    flags = torch.empty((batch * q_heads, triton.cdiv(q_len, FLAG_ROWS)), dtype=torch.int32, device=out.device)
    _attend[(batch * q_heads * triton.cdiv(q_len, tile.rows),)](
        quantized.q, quantized.q_factor, quantized.k, quantized.k_scale, quantized.v, quantized.v_amax,
        quantized.flags, flags, out, q_heads, q_heads // kv_heads, q_len, kv_len, head_dim, *out.stride(),
        IS_CAUSAL=is_causal, FP8=format == "qk_int8_pv_fp8",
        D0=64 if width == 96 else width, D1=32 if width == 96 else 0,
        ROWS=tile.rows, KEYS=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return flags


@triton.jit
def _key_tile(
    acc0, acc1, row_max, row_sum, start, q0, q1, q_factor, rows, K, k_scale_ptr, V, kv_len, kv_padded,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, FP8: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys [start, start + KEYS)."""
    keys = tl.arange(0, KEYS)
    # The scores arrive as the floats 12582912 + score (|score| <= 127 * 127 * 128 < 2^22): no conversion, and the
    # offset leaves in the multiply-add that scales them. That rounds by at most one unit of the integer score, alike
    # for all of a row, which is far below the error of INT8; heads in which a unit is large go to the exact kernel.
    k_ptrs = K + tl.cast(start, tl.int64) * (D0 + D1) + keys[:, None] * (D0 + D1)
    scores = tl.dot(
        q0,
        tl.trans(tl.load(k_ptrs + tl.arange(0, D0)[None, :])),
        acc=tl.full([ROWS, KEYS], _MAGIC_BITS, tl.int32),
        out_dtype=tl.int32,
    )
    if D1:
        scores = tl.dot(q1, tl.trans(tl.load(k_ptrs + D0 + tl.arange(0, D1)[None, :])), acc=scores, out_dtype=tl.int32)
    scores = scores.to(tl.float32, bitcast=True)
    factor = q_factor * tl.load(k_scale_ptr + start // _BLOCK)
    shift: tl.constexpr = _P_SHIFT if FP8 else 0.0
    if MASKED:
        tokens = start + (token_at(keys) if FP8 else keys)
        visible = (tokens < kv_len)[None, :]
        if IS_CAUSAL:
            visible = visible & (tokens[None, :] <= rows[:, None])
        x = tl.where(visible, (scores - _MAGIC) * factor[:, None], float("-inf"))
        new_max = tl.maximum(row_max, tl.max(x, 1))
        p = tl.math.exp2(x - (new_max - shift)[:, None])
    else:
        new_max = tl.maximum(row_max, (tl.max(scores, 1) - _MAGIC) * factor)
        p = tl.math.exp2(tl.fma(scores, factor[:, None], -(factor * _MAGIC + new_max - shift)[:, None]))
    rescale = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc0 = acc0 * rescale[:, None]
    if FP8:
        # Hopper's FP8 tensor cores keep about 14 bits of their accumulator, so a running sum over a long sequence would
        # lose every small step (DeepSeek-V3 report, https://arxiv.org/abs/2412.19437, section 3.3.2). Each key tile is
        # therefore summed on its own and added in float32. P goes from the order of K's storage to that of the tokens.
        p8 = p.to(tl.float8e4nv).reshape(ROWS, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, KEYS)
        v_ptrs = V + start + keys[None, :]
        v0 = tl.trans(tl.load(v_ptrs + tl.arange(0, D0).to(tl.int64)[:, None] * kv_padded))
        acc0 = tl.dot(p8, v0, acc0, max_num_imprecise_acc=KEYS)
        if D1:
            v1 = tl.trans(tl.load(v_ptrs + (D0 + tl.arange(0, D1)).to(tl.int64)[:, None] * kv_padded))
            acc1 = tl.dot(p8, v1, acc1 * rescale[:, None], max_num_imprecise_acc=KEYS)
    else:
        p16 = p.to(V.dtype.element_ty)
        v_ptrs = V + tl.cast(start, tl.int64) * (D0 + D1) + keys[:, None] * (D0 + D1)
        acc0 = tl.dot(p16, tl.load(v_ptrs + tl.arange(0, D0)[None, :]), acc0)
        if D1:
            acc1 = tl.dot(p16, tl.load(v_ptrs + D0 + tl.arange(0, D1)[None, :]), acc1 * rescale[:, None])
    return acc0, acc1, new_max, row_sum


@triton.jit
def _store_columns(
    OUT, V_AMAX, acc, row_sum, rows, q_len, kv_head, head_dim, stride_n, stride_d,
    FP8: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Normalise and store columns [FIRST, FIRST + COUNT) of the output tile."""
    columns = FIRST + tl.arange(0, COUNT)
    o = acc / row_sum[:, None]
    # The result lies between the smallest and largest value of its channel: rounding P must not carry it past the
    # dtype's maximum. Comparisons, not minimum and maximum: those would turn a NaN into a number.
    limit: tl.constexpr = (
        E4M3_MAX if FP8 else (65504.0 if OUT.dtype.element_ty == tl.float16 else 3.3895313892515355e38)
    )
    o = tl.where(o > limit, limit, tl.where(o < -limit, -limit, o))
    if FP8:
        v_amax = tl.load(V_AMAX + kv_head * head_dim + columns, mask=columns < head_dim, other=0.0)
        o *= (tl.maximum(v_amax, SMALLEST_AMAX) / E4M3_MAX)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    tl.store(OUT + offsets, o.to(OUT.dtype.element_ty), mask=(rows < q_len)[:, None] & (columns < head_dim)[None, :])


@triton.jit
def _noise(q_factor, q_square, K_SCALE, blocks, WIDTH: tl.constexpr):
    """Of each row's scores, squared: quantize.noise, with the mean of the blocks of K that it sees. NaN if unknown.

    A rotated key has |k|^2 of 127^2 * WIDTH / 15 as integers, as the largest of a block's nearly normal values is 127.
    """
    squares = tl.zeros([_BLOCK], tl.float32)
    for start in range(0, blocks, _BLOCK):
        block = start + tl.arange(0, _BLOCK)
        k_scale = tl.load(K_SCALE + block, mask=block < blocks, other=0.0)
        squares += k_scale * k_scale
    unit = q_factor * q_factor * (tl.sum(squares, 0) / blocks)
    return unit * _ROUNDING_NOISE * (q_square.to(tl.float32) + 127.0 * 127.0 * WIDTH / 15.0)


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def _attend(
    Q, Q_FACTOR, K, K_SCALE, V, V_AMAX, FLAGS, AGAIN, OUT,
    q_heads, group, q_len, kv_len, head_dim, stride_b, stride_h, stride_n, stride_d,
    IS_CAUSAL: tl.constexpr, FP8: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Hq * row tiles), one dimension because the others end at 65535. The longest causal rows come first.

    The head dim is D0 + D1: 96 is 64 + 32, because Triton's shapes are powers of two. D1 is 0 otherwise.
    """
    row_tiles = tl.cdiv(q_len, ROWS)
    head = (tl.program_id(0) // row_tiles).to(tl.int64)
    kv_head = head // group
    first = (row_tiles - 1 - tl.program_id(0) % row_tiles) * ROWS
    rows = first + tl.arange(0, ROWS)
    flag = first // _FLAG_ROWS + tl.arange(0, ROWS // _FLAG_ROWS)
    flags = AGAIN + head * tl.cdiv(q_len, _FLAG_ROWS) + flag
    if tl.load(FLAGS + kv_head) != 0:  # left to the exact kernel
        tl.store(flags, 1, mask=flag * _FLAG_ROWS < q_len)
        return
    q_rows = head * (tl.cdiv(q_len, _BLOCK) * _BLOCK) + rows
    kv_padded = tl.cdiv(kv_len, _BLOCK) * _BLOCK
    q_factor = tl.load(Q_FACTOR + q_rows)
    q_ptrs = Q + q_rows[:, None] * (D0 + D1)
    q0 = tl.load(q_ptrs + tl.arange(0, D0)[None, :])
    q1 = q0
    acc0 = tl.zeros([ROWS, D0], tl.float32)
    acc1 = acc0
    if D1:
        q1 = tl.load(q_ptrs + D0 + tl.arange(0, D1)[None, :])
        acc1 = tl.zeros([ROWS, D1], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    K += kv_head * kv_padded * (D0 + D1)
    V += kv_head * kv_padded * (D0 + D1)
    k_scale_ptr = K_SCALE + kv_head * (kv_padded // _BLOCK)

    square = tl.sum(q0.to(tl.int32) * q0.to(tl.int32), 1)
    if D1:
        square += tl.sum(q1.to(tl.int32) * q1.to(tl.int32), 1)
    if IS_CAUSAL:
        end = tl.minimum(first + ROWS, kv_len)
        whole = tl.minimum(first + 1, kv_len) // KEYS * KEYS
    else:
        end = kv_len
        whole = kv_len // KEYS * KEYS
    for start in tl.range(0, whole, KEYS):
        acc0, acc1, row_max, row_sum = _key_tile(
            acc0, acc1, row_max, row_sum, start, q0, q1, q_factor, rows, K, k_scale_ptr, V, kv_len, kv_padded,
            False, IS_CAUSAL, FP8, D0, D1, ROWS, KEYS,
        )  # fmt: skip
    for start in tl.range(whole, end, KEYS):
        acc0, acc1, row_max, row_sum = _key_tile(
            acc0, acc1, row_max, row_sum, start, q0, q1, q_factor, rows, K, k_scale_ptr, V, kv_len, kv_padded,
            True, IS_CAUSAL, FP8, D0, D1, ROWS, KEYS,
        )  # fmt: skip

    OUT += head // q_heads * stride_b + head % q_heads * stride_h
    noise = _noise(q_factor, square, k_scale_ptr, tl.cdiv(end, _BLOCK), D0 + D1)
    shift: tl.constexpr = _P_SHIFT if FP8 else 0.0
    rest = tl.maximum(1.0 - tl.math.exp2(shift) / row_sum, 0.0)  # but for the largest weight
    error = noise * rest * tl.sqrt(rest)
    fine = (noise <= MOST_NOISE * MOST_NOISE) & (error <= MOST_ERROR_OF_A_ROW * MOST_ERROR_OF_A_ROW)
    inside = rows < q_len
    hard = tl.max(tl.where(inside & (fine == 0), 1, 0).reshape(ROWS // _FLAG_ROWS, _FLAG_ROWS), 1)
    together = tl.sum(tl.where(inside & fine, error, 0.0).reshape(ROWS // _FLAG_ROWS, _FLAG_ROWS), 1)
    hard = tl.where(together > MOST_ERROR * MOST_ERROR * _FLAG_ROWS, 1, hard)
    tl.store(flags, hard, mask=flag * _FLAG_ROWS < q_len)
    _store_columns(OUT, V_AMAX, acc0, row_sum, rows, q_len, kv_head, head_dim, stride_n, stride_d, FP8, 0, D0)
    if D1:
        _store_columns(OUT, V_AMAX, acc1, row_sum, rows, q_len, kv_head, head_dim, stride_n, stride_d, FP8, D0, D1)
