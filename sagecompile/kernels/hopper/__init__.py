"""Quantized attention in CUDA C++ for Hopper GPUs (compute capability 9.0), compiled at run time.

In: q, k, v with any strides, and an output to fill. Out: nothing; `out` is written.
Three launches: `quantize_kv` reads K and V once and writes 8-bit tiles, `attend` quantizes Q as it goes and multiplies,
and the exact kernel repeats the rows that 8 bits cannot hold. CUDA C++ because this needs what Triton does not give:
several wgmma in flight across a softmax, warpgroups that take turns, and operands kept in registers in the order of the
accumulators. attention.cu and quantize.cu say how; runtime.py compiles them with what torch brings.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_longlong, c_void_p
from functools import cache
from typing import NamedTuple

import torch

import sagecompile.formats as formats
from sagecompile.kernels.check import check

from .runtime import Kernel, kernel

FORMATS = formats.PROVIDERS["hopper"].formats

TILE = 128
"""Tokens of K and V in one tile."""
FLAG_ROWS = 16
"""Rows of the output that share one flag."""
LOG2E = math.log2(math.e)

_QUANTIZE_THREADS = 512
_SHARED_LIMIT = 227 * 1024
_MOST_STAGES = 4
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class Schedule(NamedTuple):
    """How attention.cu runs, see there."""

    consumers: int
    overlap: bool
    lag: int


# The fastest of what was tried for (head_dim, FP8) on one H200: 2 and 3 consumers, with and without overlap, lags of 2,
# 3 and 8 (none). Three consumers hide each other's waits best, where 160 registers hold all of a row.
SCHEDULES = {
    (64, True): Schedule(3, True, 2),
    (64, False): Schedule(3, False, 8),
    (96, True): Schedule(3, False, 2),
    (96, False): Schedule(3, False, 8),
    (128, True): Schedule(3, False, 3),
    (128, False): Schedule(2, True, 8),
}


class Tensor(ctypes.Structure):
    """As in common.cuh; strides in bytes."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_longlong) for name in ("batch", "head", "token", "channel")),
        ("vectors", c_int),
        ("unused", c_int),
    )


class QuantizeParameters(ctypes.Structure):
    """As in quantize.cu."""

    _fields_ = (
        *((name, Tensor) for name in ("k", "v")),
        ("tiles", c_void_p),
        *((name, c_int) for name in ("heads", "length", "head_dim", "count")),
    )


class AttendParameters(ctypes.Structure):
    """As in attention.cu."""

    _fields_ = (
        *((name, Tensor) for name in ("q", "out")),
        *((name, c_void_p) for name in ("tiles", "flags")),
        *((name, c_int) for name in ("batch", "heads", "group", "q_len", "kv_len", "head_dim")),
        *((name, c_int) for name in ("row_tiles", "kv_tiles")),
        ("scale_log2e", c_float),
        ("unused", c_int),
    )


class Variant(NamedTuple):
    """What is fixed when the kernels are compiled."""

    head_dim: int
    """64, 96 or 128: the narrowest that holds the tensors' own."""
    dtype: torch.dtype
    fp8: bool

    @property
    def k_bytes(self) -> int:
        """Of one tile of K with its header."""
        return TILE * self.head_dim + 128

    @property
    def v_bytes(self) -> int:
        """Of one tile of V."""
        return TILE * (self.head_dim + 8) * (1 if self.fp8 else 2)

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.head_dim, self.fp8]

    def defines(self) -> tuple[tuple[str, int], ...]:
        return (("HEAD_DIM", self.head_dim), ("DTYPE", _DTYPES[self.dtype]), ("FP8", self.fp8))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *, scale: float, is_causal: bool, format: str
) -> None:
    """softmax(scale * q k^T) v into out, with key j visible to query i iff j <= i where causal.

    q, out: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D) with Hq a multiple of Hkv; 1 <= D <= 128; one dtype; any strides.
    """
    check(q, k, v, out, format, FORMATS, max_head_dim=128)
    with torch.cuda.device_of(q):
        quantized = quantize(k, v, format=format)
        _attend(q, k, v, quantized, out, scale=scale, is_causal=is_causal, format=format, overlap=True)


def quantize(k: torch.Tensor, v: torch.Tensor, *, format: str) -> torch.Tensor:
    """The 8-bit tiles of k and v (B, Hkv, Nk, D) that `attend` reads: (B * Hkv, tiles, bytes) uint8."""
    batch, heads, length, head_dim = k.shape
    variant = _variant(head_dim, k.dtype, format)
    tile_bytes = variant.k_bytes + variant.v_bytes
    tiles = torch.empty((batch * heads, -(-length // TILE), tile_bytes), dtype=torch.uint8, device=k.device)
    parameters = QuantizeParameters(
        _tensor(k, variant), _tensor(v, variant), tiles.data_ptr(), heads, length, head_dim, tiles.shape[1]
    )
    index = k.device.index
    grid = (tiles.shape[0] * tiles.shape[1], 2, 1)
    _quantize_kernel(variant, index)(grid, parameters, torch.cuda.current_stream(index).cuda_stream)
    return tiles


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    quantized: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    is_causal: bool,
    format: str,
) -> None:
    """`attention` on what `quantize` made of k and v, which are read again only for rows that 8 bits cannot hold."""
    with torch.cuda.device_of(q):
        _attend(q, k, v, quantized, out, scale=scale, is_causal=is_causal, format=format, overlap=False)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    quantized: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    is_causal: bool,
    format: str,
    overlap: bool,
) -> None:
    """overlap: the kernel before on this stream is `quantize`; what it does not write may be read before it ends."""
    from sagecompile.kernels.triton.exact import recompute_flagged

    batch, heads, q_len, head_dim = q.shape
    variant = _variant(head_dim, q.dtype, format)
    flags = torch.empty((batch * heads, -(-q_len // FLAG_ROWS)), dtype=torch.int32, device=q.device)
    row_tiles = -(-q_len // (64 * variant.schedule.consumers))
    parameters = AttendParameters(
        _tensor(q, variant), _tensor(out, variant), quantized.data_ptr(), flags.data_ptr(),
        batch, heads, heads // k.shape[1], q_len, k.shape[2], head_dim, row_tiles, quantized.shape[1], scale * LOG2E, 0,
    )  # fmt: skip
    index = q.device.index
    blocks = min(batch * heads * row_tiles, _multiprocessors(index))
    stream = torch.cuda.current_stream(index).cuda_stream
    _attend_kernel(variant, is_causal, index)(blocks, parameters, stream, overlap=overlap)
    recompute_flagged(q, k, v, out, flags, flag_rows=FLAG_ROWS, scale=scale, is_causal=is_causal)


def _variant(head_dim: int, dtype: torch.dtype, format: str) -> Variant:
    return Variant(next(width for width in (64, 96, 128) if head_dim <= width), dtype, format == "qk_int8_pv_fp8")


def _tensor(x: torch.Tensor, variant: Variant) -> Tensor:
    size = x.element_size()
    batch, head, token, channel = (stride * size for stride in x.stride())
    vectors = x.shape[3] == variant.head_dim and channel == size and (x.data_ptr() | batch | head | token) % 16 == 0
    return Tensor(x.data_ptr(), batch, head, token, channel, vectors, 0)


@cache
def _quantize_kernel(variant: Variant, device: int) -> Kernel:
    return kernel(
        "quantize.cu", "quantize_kv", defines=variant.defines(), threads=_QUANTIZE_THREADS,
        shared_bytes=variant.v_bytes, device=device,
    )  # fmt: skip


@cache
def _attend_kernel(variant: Variant, is_causal: bool, device: int) -> Kernel:
    consumers, overlap, lag = variant.schedule
    sums = 64 * (variant.head_dim + 8) * 4 if variant.fp8 else 0
    fixed = consumers * (sums + 64 * variant.head_dim)
    stage = variant.k_bytes + variant.v_bytes + 32
    stages = min(_MOST_STAGES, (_SHARED_LIMIT - fixed) // stage)
    settings = {"CAUSAL": is_causal, "CONSUMERS": consumers, "STAGES": stages, "OVERLAP": overlap, "LAG": lag}
    return kernel(
        "attention.cu", "attend", defines=(*variant.defines(), *settings.items()), threads=128 * (consumers + 1),
        shared_bytes=fixed + stages * stage, device=device,
    )  # fmt: skip


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
