"""Quantized attention in plain torch: the specification of every format, on any device.

In: a call. Out: `out` (B, H, Nq, D), wholly written. INT8 products are exact, memory is bounded by working on slices of
the queries, and what INT8 cannot hold is computed by SDPA: heads with a NaN, an Inf or scores that are too steep, and
what quantize.exact_rows says. Keys that no query sees influence nothing. What a prologue makes of q or k is rounded to
its dtype, as the graph's own lines would.

A key is hidden from a query by a bound, by False, or by a bias far below the largest of its row. A row whose largest
bias is beyond `LARGEST_BIAS` is exact: so is one that only finfo.min empties, which averages over all keys. One that
-inf or a boolean empties is 0, as SDPA has it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from sagecompile.kernels import counts
from sagecompile.kernels.call import Call
from sagecompile.kernels.sdpa import sdpa

from . import quantize

LOG2_E = math.log2(math.e)
P_FP8_SCALE = 256.0
"""P is at most 1; times this it uses e4m3's range down to 2^-17."""
MAX_SCORES = 1 << 25
"""Scores held at a time (128 MiB in float32)."""


LARGEST_BIAS = 2.0**14
"""Of a row, in magnitude: above it float32 rounds the sum of a score and a bias by more than INT8 rounds the score."""
FARTHEST = 1024.0
"""A bias that is lower by more than that than the row's largest hides the key: INT8 is used for scores up to 200."""


def attention(call: Call, out: torch.Tensor, *, format: str) -> None:
    """Write the call's result into `out`."""
    call = call.after_prologues().of_seen_keys()
    seen = _Seen.of(call)
    result, exact = _quantized(call, seen, format)
    out.copy_(result)
    counts.add(exact, call.site)
    if seen is not None:
        hidden = ~seen.reached[..., None]  # NaN times the weight 0 would be NaN
        call = replace(call, k=call.k.masked_fill(hidden, 0), v=call.v.masked_fill(hidden, 0))
    _mend(call, out, exact)


def exact_rows(call: Call, *, format: str) -> torch.Tensor:
    """Which rows `attention` computes exactly: (B, H, Nq)."""
    call = call.after_prologues().of_seen_keys()
    return _quantized(call, _Seen.of(call), format)[1]


class _Seen(NamedTuple):
    """What a mask that is not only `ahead` lets through."""

    mask: torch.Tensor
    """As SDPA takes it, broadcast to (B, H, Nq, Nk)."""
    keys: torch.Tensor
    """Which keys some query sees: (B, Hkv, Nk)."""
    reached: torch.Tensor
    """Those, and the ones that only a number hides: a row that is emptied by numbers averages over them."""
    none: torch.Tensor
    """Rows that nothing but -inf and False is left to: (B, H, Nq)."""
    odd: torch.Tensor
    """Rows with too large a bias, or one that is NaN: to be exact."""

    @classmethod
    def of(cls, call: Call) -> _Seen | None:
        """None where `ahead` says it all."""
        if call.is_affine:
            return None
        mask = call.joined_mask()
        assert mask is not None
        batch, heads, q_len, _ = call.q.shape
        kv_heads, kv_len = call.k.shape[1], call.k.shape[2]
        if mask.dtype == torch.bool:
            reached = keys = mask
            odd = mask.new_zeros(()).expand(1, 1, 1, 1)
        else:
            largest = mask.float().amax(-1, keepdim=True)
            reached = mask != -math.inf
            odd = ~(largest.abs() <= LARGEST_BIAS) & (largest != -math.inf)
            keys = reached & (mask.float() >= largest - FARTHEST) & ~odd

        def by_key(seen: torch.Tensor) -> torch.Tensor:
            seen = seen.any(-2).expand(batch, heads, kv_len)
            return seen.unflatten(1, (kv_heads, -1)).any(2)

        def by_row(seen: torch.Tensor) -> torch.Tensor:
            return seen.any(-1).expand(batch, heads, q_len)

        return cls(mask, by_key(keys), by_key(reached), ~by_row(reached), by_row(odd))

    def bias(self, part: slice, group: int, q_len: int, kv_heads: int) -> torch.Tensor:
        """What is added to scores of base 2, of the rows `part` of a KV head's: (B or 1, Hkv or 1, rows, Nk or 1)."""
        row = torch.arange(part.start, min(part.stop, group * q_len), device=self.mask.device)
        mask = self.mask.expand(-1, kv_heads * group, q_len, -1).unflatten(1, (kv_heads, group))
        mask = mask[:, :, row // q_len, row % q_len]
        if mask.dtype == torch.bool:
            return torch.where(mask, 0.0, -math.inf)
        return mask.float() * LOG2_E


def _quantized(call: Call, seen: _Seen | None, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows by the format, and which of them (B, H, Nq) are to be exact instead; of a call of seen keys alone."""
    q, k, v, ahead = call.q, call.k, call.v, call.ahead
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    keys = None if seen is None else seen.keys
    if keys is not None:
        k, v = (x.masked_fill(~keys[..., None], 0) for x in (k, v))
    # One row of queries a KV head: its group's heads one after the other, so that K and V are never repeated.
    rows = q.reshape(batch, kv_heads, group * q_len, head_dim).float()
    last_key = torch.arange(q_len, device=q.device).repeat(group) + (ahead or 0)
    key_position = torch.arange(kv_len, device=q.device)
    smooth = quantize.smooth_k(k, keys)
    factor = quantize.balance(rows, smooth, keys)
    q_int, q_scale = quantize.int8_per_token(quantize.rotate(rows * factor))
    k_int, k_scale = quantize.int8_per_block(quantize.rotate(smooth / factor))
    q_scale = q_scale * (call.scale * LOG2_E)
    if format == "qk_int8_pv_fp8":
        values, v_scale = quantize.fp8_per_channel(v)
        v_scale = v_scale / P_FP8_SCALE
    else:
        wide = torch.bfloat16 if v.dtype == torch.float32 else v.dtype
        values, v_scale = v.to(wide).float(), None
    guard = _Guard(q_int, q_scale, k_int, k_scale, v, keys)
    k_scale = k_scale.mT

    largest = torch.finfo(q.dtype).max
    result = torch.empty_like(rows, dtype=q.dtype, memory_format=torch.contiguous_format)
    error, size = (torch.empty(rows.shape[:3], device=q.device) for _ in range(2))
    step = max(1, MAX_SCORES // max(1, batch * kv_heads * kv_len))
    for start in range(0, group * q_len, step):
        part = slice(start, start + step)
        scores = (q_int[:, :, part] @ k_int.mT) * q_scale[:, :, part] * k_scale
        if seen is not None:
            scores += seen.bias(part, group, q_len, kv_heads)
        elif ahead is not None:
            scores.masked_fill_(key_position > last_key[part, None], -math.inf)
        p = torch.exp2(scores - scores.amax(-1, keepdim=True))
        total = p.sum(-1, keepdim=True)
        if v_scale is not None:
            sliced = quantize.fp8(p * P_FP8_SCALE) @ values * v_scale
        else:
            sliced = p.to(wide).float() @ values
        # A mean of V's values cannot pass the largest number, but rounded weights could carry it there.
        sliced = (sliced / total).clamp(-largest, largest)
        result[:, :, part] = sliced.to(result.dtype)
        error[:, :, part], size[:, :, part] = guard.look(part, p, total, sliced)
    of_rows = [x.reshape(batch, heads, q_len) for x in (guard.noise, error, size)]
    if seen is not None:  # none of which has an error of INT8's
        of_rows = [x.masked_fill(seen.none | seen.odd, 0) for x in of_rows]
    hard = quantize.exact_rows(*of_rows)
    unit = q_scale.abs().amax((-2, -1)) * k_scale.amax((-2, -1))
    steep = (unit > quantize.STEEPEST).repeat_interleave(group, 1)
    finite_q = q.isfinite().all(-1).all(-1).unflatten(1, (-1, group)).all(-1)
    finite_kv = (k.isfinite() & v.isfinite()).all(-1).all(-1)
    broken = ~(finite_q & finite_kv).repeat_interleave(group, 1)  # quantization would spread a NaN over a block
    result, exact = result.view(batch, heads, q_len, head_dim), hard | (steep | broken)[:, :, None]
    if seen is not None:
        result = result.masked_fill(seen.none[..., None], 0)
        exact = exact | seen.odd
    return result, exact


class _Guard:
    """What quantize.exact_rows asks of each row, from quantized q and k and their scales, and v."""

    def __init__(
        self,
        q_int: torch.Tensor,
        q_scale: torch.Tensor,
        k_int: torch.Tensor,
        k_scale: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor | None,
    ) -> None:
        self.v_unit = v.abs().amax((-2, -1), keepdim=True).float().clamp_min(quantize.TINY)
        k_unit = k_scale.amax(-2, keepdim=True)  # so that no square passes what a number can be
        self.q_unit = (q_scale * k_unit).square()
        self.q_square = q_int.square().sum(-1, keepdim=True)
        units = (k_scale / k_unit).square()
        of_k, of_v = (quantize.square_of_blocks(x, keys) for x in (k_int, v.float() / self.v_unit))
        self.of_keys = torch.cat((units, units * of_k, of_v), -1)
        """Of each key: the square of its scale, that times the square of k, and the square of v."""
        self.noise = self._noise(slice(None), quantize.mean(self.of_keys, keys))
        """Of a score with keys of the usual size, squared: (B, Hkv, G * Nq)."""

    def _noise(self, part: slice, of_keys: torch.Tensor) -> torch.Tensor:
        unit, square = of_keys[..., :1], of_keys[..., 1:2] / of_keys[..., :1].clamp_min(quantize.TINY)
        return quantize.noise(self.q_unit[:, :, part] * unit, self.q_square[:, :, part], square)[..., 0]

    def look(
        self, part: slice, p: torch.Tensor, total: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predicted error and the size of rows of the output, squared, by their weights and the sum of those."""
        weighted = p @ self.of_keys / total
        size = (out / self.v_unit).square().sum(-1)
        error = quantize.predicted_error(self._noise(part, weighted), 1 / total[..., 0], weighted[..., 2], size)
        return error, size


def _mend(call: Call, out: torch.Tensor, exact: torch.Tensor) -> None:
    """Give the rows `exact` (B, H, Nq), which INT8 cannot hold, SDPA's own result.

    On a GPU both results are computed, so as not to wait for the answer.
    """
    if out.device.type == "cpu" and not bool(exact.any()):
        return
    out.copy_(torch.where(exact[..., None], sdpa(call), out))
