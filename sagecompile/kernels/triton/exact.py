"""Attention in the input's own precision, for the heads or rows that cannot be quantized.

In: the caller's call and a flag for each KV head or some rows. Out: what is flagged of `out`, overwritten.
Why: INT8 has no NaN and no Inf, and which head holds one is known only on the device. A few programs look at all flags,
so that finding none costs little more than a launch, and no sync.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from sagecompile.kernels import counts
from sagecompile.kernels.call import Call
from sagecompile.kernels.prologue import ROPES, Prologue, table_strides

LOG2E = 1.4426950408889634
PROGRAMS = 264
"""At most: enough to fill a GPU where everything is flagged."""


class Tile(NamedTuple):
    """How a program is cut: query rows, keys in one step, warps, and steps of K and V in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


SMALL = Tile(64, 32, 8, 1)
LARGE = Tile(128, 64, 8, 3)
"""The fastest of six on an H200, where all is exact: 1.7 times SDPA's time (causal 2.0 to 2.6), SMALL 8 to 12. It takes
more shared memory than most other GPUs have."""
FLOAT32 = Tile(32, 16, 8, 1)
"""Without TF32 the ordinary cores multiply, with operands in registers: larger tiles spill."""


def tile_of(call: Call) -> Tile:
    """What is used for such tensors. What a prologue of K reads, three steps ahead, would need still more memory."""
    if call.q.dtype == torch.float32:
        return FLOAT32
    has_room = call.q.is_cuda and torch.cuda.get_device_capability(call.q.device)[0] in (9, 10)
    return LARGE if has_room and call.k_prologue is None else SMALL


class Repeated(NamedTuple):
    """The launch, so that others can repeat it."""

    compiled: Any
    """By Triton."""
    blocks: int
    arguments: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], tuple[Any, ...]]
    """Of q, k, v, out, flags and counts, and of the weight, cos and sin of q and of k: the tensors, or what stands for
    them."""


def recompute_flagged(
    call: Call, out: torch.Tensor, flags: torch.Tensor | None, *, flag_rows: int = 0, overlap: bool = False
) -> Repeated | None:
    """out: (B, Hq, Nq, D), any strides; of a prologue weight, cos and sin have adjacent channels, cos and sin the same
    strides.

    flags, int32: (B * Hkv), or with flag_rows, a divisor of 32, one for so many rows: (B * Hq, ceil(Nq / flag_rows)).
    Without flags nothing is launched: the kernel that some would need is built.
    A flag makes its whole tile exact, see Tile.
    overlap: start while the kernel before, the one that wrote the flags, still runs (compute capability 9.0 and up).
    A row that sees a NaN or an Inf gets what IEEE arithmetic gives softmax(q k^T) v. A row that sees none stays finite.
    Returns what was launched, on a GPU.
    """
    q, k, v = call.q, call.k, call.v
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    expected = (batch * q_heads, triton.cdiv(q_len, flag_rows)) if flag_rows else (batch * kv_heads,)
    assert flags is None or (flags.dtype == torch.int32 and flags.shape == expected)
    rows, keys, warps, stages = tile_of(call)
    tiles = batch * q_heads * triton.cdiv(q_len, rows)
    q_norm, q_rope, q_tables, q_numbers = _arguments(call.q_prologue, q)
    k_norm, k_rope, k_tables, k_numbers = _arguments(call.k_prologue, k)
    numbers = (
        tiles, call.scale * LOG2E, q_heads, q_heads // kv_heads, q_len, kv_len, call.ahead or 0, head_dim,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
    )  # fmt: skip
    columns, at_once = 64 if head_dim <= 64 else 128, 32
    constants = (
        q_norm, q_rope, k_norm, k_rope, flag_rows, call.is_causal, columns, rows, keys, stages, at_once, overlap,
    )  # fmt: skip

    def arguments(tensors: Sequence[Any], q_tables: Sequence[Any], k_tables: Sequence[Any]) -> tuple[Any, ...]:
        return *tensors, *numbers, *q_tables, *q_numbers, *k_tables, *k_numbers, *constants

    blocks = min(tiles, PROGRAMS)
    how = {"num_warps": warps, "num_stages": 1, **({"launch_pdl": True} if overlap else {})}
    with torch.cuda.device_of(q):
        counted = counts.slot(q.device, call.site)
        if flags is None:
            flags = torch.empty(expected, dtype=torch.int32, device=q.device)
            given = arguments((q, k, v, out, flags, counted), q_tables, k_tables)
            _attend_flagged.warmup(*given, grid=(blocks,), **how)
            return None
        compiled = _attend_flagged[(blocks,)](*arguments((q, k, v, out, flags, counted), q_tables, k_tables), **how)
    return None if compiled is None else Repeated(compiled, blocks, arguments)


def _arguments(
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
def _offset(index, stride):
    return tl.cast(index, tl.int64) * stride


@triton.jit
def _load(
    X, tokens, stride_n, stride_d, columns, mask, W, COS, SIN, stride_tn, eps, head_dim,
    NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Rows of Q or K after their prologue, in their own dtype; zeros where masked."""
    rows = X + _offset(tokens, stride_n)[:, None]
    stored = tl.load(rows + _offset(columns, stride_d)[None, :], mask=mask, other=0.0)
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
        turned = tl.load(rows + _offset(partner, stride_d)[None, :], mask=mask, other=0.0).to(tl.float32)
        turned = turned * inverse[:, None] * _weights(W, partner, head_dim, NORM)[None, :]
        at = _offset(tokens, stride_tn)[:, None] + columns[None, :]
        cos = tl.load(COS + at, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(SIN + at, mask=mask, other=0.0).to(tl.float32)
        x = x * cos + tl.where(first[None, :], -turned, turned) * sin
    return x.to(stored.dtype)


@triton.jit
def _weights(W, columns, head_dim, NORM: tl.constexpr):
    if NORM < 2:
        return tl.full([columns.shape[0]], 1.0, tl.float32)
    return tl.load(W + columns, mask=columns < head_dim, other=0.0).to(tl.float32)


# One is built for nearly all shapes; strides and head_dim are multiples of 16, which whole vectors need to know.
@triton.jit(do_not_specialize=["tiles", "q_heads", "group", "q_len", "kv_len", "ahead"])
def _attend_flagged(
    Q, K, V, OUT, FLAGS, COUNTS, tiles, scale_log2e, q_heads, group, q_len, kv_len, ahead, head_dim,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on, stride_od,
    Q_W, Q_COS, Q_SIN, stride_qtb, stride_qtn, q_eps, K_W, K_COS, K_SIN, stride_ktb, stride_ktn, k_eps,
    Q_NORM: tl.constexpr, Q_ROPE: tl.constexpr, K_NORM: tl.constexpr, K_ROPE: tl.constexpr,
    FLAG_ROWS: tl.constexpr, IS_CAUSAL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: any; a program looks at the tiles of rows pid, pid + grid, ..., AT_ONCE of them with one load.

    COUNTS: to the calls, rows and exact rows there are added those of this one.
    """
    if OVERLAP:
        gdc_wait()
    programs = tl.num_programs(0)
    row_tiles = tl.cdiv(q_len, ROWS)
    if tl.program_id(0) == 0:
        tl.atomic_add(COUNTS, 1, sem="relaxed")
        tl.atomic_add(COUNTS + 1, (tiles // row_tiles).to(tl.int64) * q_len, sem="relaxed")
    for start in tl.range(tl.program_id(0), tiles, programs * AT_ONCE):
        mine = start + tl.arange(0, AT_ONCE) * programs
        if tl.max(_flags(FLAGS, mine, tiles, group, q_len, FLAG_ROWS, ROWS), 0) != 0:
            for tile in tl.range(start, tl.minimum(tiles, start + programs * AT_ONCE), programs):
                if tl.max(_flags(FLAGS, tile + tl.arange(0, 1), tiles, group, q_len, FLAG_ROWS, ROWS), 0) != 0:
                    _attend_exact(
                        tile, Q, K, V, OUT, scale_log2e, q_heads, group, q_len, kv_len, ahead, head_dim,
                        stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
                        stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on, stride_od,
                        Q_W, Q_COS, Q_SIN, stride_qtb, stride_qtn, q_eps, K_W, K_COS, K_SIN, stride_ktb, stride_ktn,
                        k_eps, Q_NORM, Q_ROPE, K_NORM, K_ROPE, IS_CAUSAL, COLUMNS, ROWS, KEYS, STAGES,
                    )  # fmt: skip
                    tl.atomic_add(COUNTS + 2, tl.minimum(q_len - tile % row_tiles * ROWS, ROWS), sem="relaxed")


@triton.jit
def _flags(FLAGS, tile, tiles, group, q_len, FLAG_ROWS: tl.constexpr, ROWS: tl.constexpr):
    """Whether each of some tiles has a flag."""
    row_tiles = tl.cdiv(q_len, ROWS)
    head = (tile // row_tiles).to(tl.int64)
    if FLAG_ROWS == 0:
        found = tl.load(FLAGS + head // group, mask=tile < tiles, other=0)
    else:
        of_head = tl.cdiv(q_len, FLAG_ROWS)
        index = (tile % row_tiles * (ROWS // FLAG_ROWS))[:, None] + tl.arange(0, ROWS // FLAG_ROWS)[None, :]
        inside = (tile < tiles)[:, None] & (index < of_head)
        found = tl.max(tl.load(FLAGS + (head * of_head)[:, None] + index, mask=inside, other=0), 1)
    return found


@triton.jit
def _attend_exact(
    tile, Q, K, V, OUT, scale_log2e, q_heads, group, q_len, kv_len, ahead, head_dim,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on, stride_od,
    Q_W, Q_COS, Q_SIN, stride_qtb, stride_qtn, q_eps, K_W, K_COS, K_SIN, stride_ktb, stride_ktn, k_eps,
    Q_NORM: tl.constexpr, Q_ROPE: tl.constexpr, K_NORM: tl.constexpr, K_ROPE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of rows."""
    row_tiles = tl.cdiv(q_len, ROWS)
    head = (tile // row_tiles).to(tl.int64)
    batch, q_head = head // q_heads, head % q_heads
    kv_head = q_head // group
    first = tile % row_tiles * ROWS
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    in_head = (columns < head_dim)[None, :]
    Q += batch * stride_qb + q_head * stride_qh
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    OUT += batch * stride_ob + q_head * stride_oh
    Q_COS += batch * stride_qtb
    Q_SIN += batch * stride_qtb
    K_COS += batch * stride_ktb
    K_SIN += batch * stride_ktb
    in_out = (rows < q_len)[:, None] & in_head
    q = _load(
        Q, rows, stride_qn, stride_qd, columns, in_out, Q_W, Q_COS, Q_SIN, stride_qtn, q_eps, head_dim, Q_NORM, Q_ROPE
    )
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)

    # Whole tiles: every row sees every key of them, except keys past the end, whose K and V load as zero.
    if IS_CAUSAL:
        whole = tl.minimum(first + 1 + ahead, kv_len) // KEYS * KEYS
        end = tl.minimum(first + ROWS + ahead, kv_len)
    else:
        whole = kv_len
        end = kv_len
    for start in tl.range(0, whole, KEYS, num_stages=STAGES):
        tokens = start + tl.arange(0, KEYS)
        in_kv = (tokens < kv_len)[:, None] & in_head
        k = _load(
            K, tokens, stride_kn, stride_kd, columns, in_kv, K_W, K_COS, K_SIN, stride_ktn, k_eps, head_dim,
            K_NORM, K_ROPE,
        )  # fmt: skip
        v = tl.load(
            V + _offset(tokens, stride_vn)[:, None] + _offset(columns, stride_vd)[None, :], mask=in_kv, other=0.0
        )
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
        x = tl.where((tokens < kv_len)[None, :], x, float("-inf"))
        row_max, rescale, p = _step(row_max, x, tl.max(x, 1))
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")

    # The diagonal. A product with a masked P of zero would carry NaN and Inf of V into rows that see none.
    for start in tl.range(whole, end, KEYS):
        tokens = start + tl.arange(0, KEYS)
        in_kv = (tokens < kv_len)[:, None] & in_head
        v = tl.load(
            V + _offset(tokens, stride_vn)[:, None] + _offset(columns, stride_vd)[None, :], mask=in_kv, other=0.0
        )
        is_finite = tl.max(tl.max(tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1), 1), 0) == 0
        if is_finite:
            k = _load(
                K, tokens, stride_kn, stride_kd, columns, in_kv, K_W, K_COS, K_SIN, stride_ktn, k_eps, head_dim,
                K_NORM, K_ROPE,
            )  # fmt: skip
            x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
            visible = (tokens < kv_len)[None, :] & ((rows + ahead)[:, None] >= tokens[None, :])
            x = tl.where(visible, x, float("-inf"))
            row_max, rescale, p = _step(row_max, x, tl.max(x, 1))
            row_sum = row_sum * rescale + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        else:
            for token in tl.range(start, tl.minimum(end, start + KEYS)):
                k_row = _load(
                    K, token + tl.arange(0, 1), stride_kn, stride_kd, columns, in_head, K_W, K_COS, K_SIN, stride_ktn,
                    k_eps, head_dim, K_NORM, K_ROPE,
                )  # fmt: skip
                v_row = tl.load(
                    V + _offset(token, stride_vn) + _offset(columns, stride_vd), mask=columns < head_dim, other=0.0
                )
                x_key = tl.sum(q.to(tl.float32) * k_row.to(tl.float32), 1) * scale_log2e
                sees = rows + ahead >= token
                x_key = tl.where(sees, x_key, float("-inf"))
                row_max, by, p_key = _step(row_max, x_key[:, None], x_key)
                row_sum = row_sum * by + tl.sum(p_key, 1)
                acc = acc * by[:, None] + tl.where(sees[:, None], p_key * v_row.to(tl.float32)[None, :], 0.0)

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
