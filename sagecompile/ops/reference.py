"""Quantized attention in plain torch: the specification of every format, on any device.

In: a call. Out: `out` (B, H, Nq, D), wholly written. INT8 products are exact, memory is bounded by working on slices of
the queries, and what INT8 cannot hold is computed by SDPA: heads with a NaN, an Inf or scores that are too steep, and
what quantize.exact_rows says. Keys that no query sees are not read. What a prologue makes of q or k is rounded to its
dtype, as the graph's own lines would.
"""

from __future__ import annotations

import math

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


def attention(call: Call, out: torch.Tensor, *, format: str) -> None:
    """Write the call's result into `out`."""
    call = call.after_prologues().of_seen_keys()
    result, exact = _quantized(call, format)
    out.copy_(result)
    counts.add(exact, call.site)
    _mend(call, out, exact)


def exact_rows(call: Call, *, format: str) -> torch.Tensor:
    """Which rows `attention` computes exactly: (B, H, Nq)."""
    return _quantized(call.after_prologues().of_seen_keys(), format)[1]


def _quantized(call: Call, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows by the format, and which of them (B, H, Nq) are to be exact instead; of a call of seen keys alone."""
    q, k, v, ahead = call.q, call.k, call.v, call.ahead
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    # One row of queries a KV head: its group's heads one after the other, so that K and V are never repeated.
    rows = q.reshape(batch, kv_heads, group * q_len, head_dim).float()
    last_key = torch.arange(q_len, device=q.device).repeat(group) + (ahead or 0)
    key_position = torch.arange(kv_len, device=q.device)
    smooth = quantize.smooth_k(k)
    factor = quantize.balance(rows, smooth)
    q_int, q_scale = quantize.int8_per_token(quantize.rotate(rows * factor))
    k_int, k_scale = quantize.int8_per_block(quantize.rotate(smooth / factor))
    q_scale = q_scale * (call.scale * LOG2_E)
    if format == "qk_int8_pv_fp8":
        values, v_scale = quantize.fp8_per_channel(v)
        v_scale = v_scale / P_FP8_SCALE
    else:
        wide = torch.bfloat16 if v.dtype == torch.float32 else v.dtype
        values, v_scale = v.to(wide).float(), None
    guard = _Guard(q_int, q_scale, k_int, k_scale, v)
    k_scale = k_scale.mT

    largest = torch.finfo(q.dtype).max
    result = torch.empty_like(rows, dtype=q.dtype, memory_format=torch.contiguous_format)
    error, size = (torch.empty(rows.shape[:3], device=q.device) for _ in range(2))
    step = max(1, MAX_SCORES // max(1, batch * kv_heads * kv_len))
    for start in range(0, group * q_len, step):
        part = slice(start, start + step)
        scores = (q_int[:, :, part] @ k_int.mT) * q_scale[:, :, part] * k_scale
        if ahead is not None:
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
    hard = quantize.exact_rows(*(x.reshape(batch, heads, q_len) for x in (guard.noise, error, size)))
    unit = q_scale.abs().amax((-2, -1)) * k_scale.amax((-2, -1))
    steep = (unit > quantize.STEEPEST).repeat_interleave(group, 1)
    finite_q = q.isfinite().all(-1).all(-1).unflatten(1, (-1, group)).all(-1)
    finite_kv = (k.isfinite() & v.isfinite()).all(-1).all(-1)
    broken = ~(finite_q & finite_kv).repeat_interleave(group, 1)  # quantization would spread a NaN over a block
    return result.view(batch, heads, q_len, head_dim), hard | (steep | broken)[:, :, None]


class _Guard:
    """What quantize.exact_rows asks of each row, from quantized q and k and their scales, and v."""

    def __init__(
        self, q_int: torch.Tensor, q_scale: torch.Tensor, k_int: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor
    ) -> None:
        self.v_unit = v.abs().amax((-2, -1), keepdim=True).float().clamp_min(quantize.TINY)
        k_unit = k_scale.amax(-2, keepdim=True)  # so that no square passes what a number can be
        self.q_unit = (q_scale * k_unit).square()
        self.q_square = q_int.square().sum(-1, keepdim=True)
        units = (k_scale / k_unit).square()
        of_k, of_v = (quantize.square_of_blocks(x) for x in (k_int, v.float() / self.v_unit))
        self.of_keys = torch.cat((units, units * of_k, of_v), -1)
        """Of each key: the square of its scale, that times the square of k, and the square of v."""
        self.noise = self._noise(slice(None), self.of_keys.mean(-2, keepdim=True))
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
