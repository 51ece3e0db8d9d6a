"""Attention in the input's own precision, for the heads or rows that cannot be quantized.

In: the caller's q, k, v and a flag for each KV head or some rows. Out: what is flagged of `out`, overwritten; tiles of
rows without a flag exit at once.
Why: INT8 has no NaN and no Inf, and which head holds one is known only on the device. This costs microseconds, no sync.
"""

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


def recompute_flagged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    flags: torch.Tensor,
    *,
    flag_rows: int = 0,
    scale: float,
    is_causal: bool,
) -> None:
    """q, out: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D), any strides.

    flags, int32: (B * Hkv), or with flag_rows, a divisor of 32, one for so many rows: (B * Hq, ceil(Nq / flag_rows)).
    A flag makes its whole tile exact: 64 rows, or 32 in float32.
    A row that sees a NaN or an Inf gets what IEEE arithmetic gives softmax(q k^T) v. A row that sees none stays finite.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    expected = (batch * q_heads, triton.cdiv(q_len, flag_rows)) if flag_rows else (batch * kv_heads,)
    assert flags.dtype == torch.int32 and flags.shape == expected
    # float32 without TF32 runs on the ordinary cores, with operands in registers: larger tiles spill.
    rows, keys = (32, 16) if q.dtype == torch.float32 else (64, 32)
    with torch.cuda.device_of(q):
        _attend_exact[(batch * q_heads * triton.cdiv(q_len, rows),)](
            q, k, v, out, flags, scale * LOG2E, q_heads, q_heads // kv_heads, q_len, kv_len, head_dim,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            FLAG_ROWS=flag_rows, IS_CAUSAL=is_causal, COLUMNS=64 if head_dim <= 64 else 128, ROWS=rows, KEYS=keys,
            num_warps=8, num_stages=1,
        )  # fmt: skip


@triton.jit
def _offset(index, stride):
    return tl.cast(index, tl.int64) * stride


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def _attend_exact(
    Q, K, V, OUT, FLAGS, scale_log2e, q_heads, group, q_len, kv_len, head_dim,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on, stride_od,
    FLAG_ROWS: tl.constexpr, IS_CAUSAL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Hq * row tiles)."""
    row_tiles = tl.cdiv(q_len, ROWS)
    head = (tl.program_id(0) // row_tiles).to(tl.int64)
    if FLAG_ROWS:
        flags = tl.cdiv(q_len, FLAG_ROWS)
        mine = tl.program_id(0) % row_tiles * (ROWS // FLAG_ROWS) + tl.arange(0, ROWS // FLAG_ROWS)
        flag = tl.max(tl.load(FLAGS + head * flags + mine, mask=mine < flags, other=0), 0)
    else:
        flag = tl.load(FLAGS + head // group)
    if flag == 0:
        return
    batch, q_head = head // q_heads, head % q_heads
    kv_head = q_head // group
    first = tl.program_id(0) % row_tiles * ROWS
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    in_head = (columns < head_dim)[None, :]
    Q += batch * stride_qb + q_head * stride_qh
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    OUT += batch * stride_ob + q_head * stride_oh
    in_out = (rows < q_len)[:, None] & in_head
    q = tl.load(Q + _offset(rows, stride_qn)[:, None] + _offset(columns, stride_qd)[None, :], mask=in_out, other=0.0)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)

    # Whole tiles: every row sees every key of them, except keys past the end, whose K and V load as zero.
    if IS_CAUSAL:
        whole = tl.minimum(first + 1, kv_len) // KEYS * KEYS
        end = tl.minimum(first + ROWS, kv_len)
    else:
        whole = kv_len
        end = kv_len
    for start in tl.range(0, whole, KEYS):
        tokens = start + tl.arange(0, KEYS)
        in_kv = (tokens < kv_len)[:, None] & in_head
        k = tl.load(
            K + _offset(tokens, stride_kn)[:, None] + _offset(columns, stride_kd)[None, :], mask=in_kv, other=0.0
        )
        v = tl.load(
            V + _offset(tokens, stride_vn)[:, None] + _offset(columns, stride_vd)[None, :], mask=in_kv, other=0.0
        )
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
        x = tl.where((tokens < kv_len)[None, :], x, float("-inf"))
        row_max, rescale, p = _step(row_max, x, tl.max(x, 1))
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")

    # The diagonal, key by key: a product with a masked P of zero would carry NaN and Inf of V into rows that see none.
    for token in tl.range(whole, end):
        k_row = tl.load(K + _offset(token, stride_kn) + _offset(columns, stride_kd), mask=columns < head_dim, other=0.0)
        v_row = tl.load(V + _offset(token, stride_vn) + _offset(columns, stride_vd), mask=columns < head_dim, other=0.0)
        x = tl.sum(q.to(tl.float32) * k_row.to(tl.float32)[None, :], 1) * scale_log2e
        visible = rows >= token
        x = tl.where(visible, x, float("-inf"))
        row_max, rescale, p = _step(row_max, x[:, None], x)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None] + tl.where(visible[:, None], p * v_row.to(tl.float32)[None, :], 0.0)

    o = acc / row_sum[:, None]
    tl.store(
        OUT + _offset(rows, stride_on)[:, None] + _offset(columns, stride_od)[None, :],
        o.to(OUT.dtype.element_ty),
        mask=in_out,
    )


@triton.jit
def _step(row_max, x, x_max):
    """The new row maximum, the factor for what was summed so far, and P; a row that has met only -Inf stays at zero."""
    new_max = tl.maximum(row_max, x_max)
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, tl.math.exp2(row_max - reference), tl.math.exp2(x - reference[:, None])
