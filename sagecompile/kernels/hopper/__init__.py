"""Quantized attention in CUDA C++ for Hopper GPUs (compute capability 9.0), compiled at run time.

In: q, k, v with any strides, and an output to fill. Out: nothing; `out` is written.
Three launches: `quantize_kv` reads K and V once and writes tiles, `attend` quantizes Q as it goes and multiplies, and
the exact kernel repeats the rows that 8 bits cannot hold. CUDA C++ because this needs what Triton does not give: wgmma
in flight across a softmax, a loader warp beside warpgroups that drift apart, operands kept in registers in the order of
the accumulators. attention.cu and quantize.cu say how, LOG.md why; runtime.py compiles them with what torch brings.
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
# 3 and 8 (none). Three consumers hide each other's waits best, where 160 registers hold (almost) all of a thread.
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
        ("never", c_int),
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
    _check_limits(q, k)
    with torch.cuda.device_of(q):
        quantized = _quantize(k, v, format)
        _attend(q, k, v, quantized, out, scale=scale, is_causal=is_causal, format=format, overlap=True)


def quantize(k: torch.Tensor, v: torch.Tensor, *, format: str) -> torch.Tensor:
    """The tiles of k and v (B, Hkv, Nk, D) that `attend` reads: (B * Hkv, tiles, bytes) uint8."""
    with torch.cuda.device_of(k):
        return _quantize(k, v, format)


def _quantize(k: torch.Tensor, v: torch.Tensor, format: str) -> torch.Tensor:
    _, heads, length, head_dim = k.shape
    variant = _variant(head_dim, k.dtype, format)
    tiles = torch.empty(_tiles_shape(k, variant), dtype=torch.uint8, device=k.device)
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
    check(q, k, v, out, format, FORMATS, max_head_dim=128)
    _check_limits(q, k)
    shape = _tiles_shape(k, _variant(k.shape[3], k.dtype, format))
    if quantized.shape != shape or not quantized.is_contiguous() or quantized.device != k.device:
        raise ValueError(f"quantized {tuple(quantized.shape)} on {quantized.device}: need what quantize made, {shape}")
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
    from sagecompile.kernels.triton.exact import recompute_flagged  # late: `quantize` and the types need no Triton

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


def _check_limits(q: torch.Tensor, k: torch.Tensor) -> None:
    """What the kernels count in 32 bits, and that the tensors are where they can be read."""
    if q.device.type != "cuda":
        raise ValueError(f"q on {q.device}: hopper needs a CUDA device")
    if max(q.shape[2], k.shape[2]) > 2**31 - 256 or q.shape[0] * q.shape[1] * (q.shape[2] // 64 + 1) >= 2**31:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: need fewer than 2^31 tokens and blocks of 64 queries"
        )


def _tiles_shape(k: torch.Tensor, variant: Variant) -> tuple[int, int, int]:
    return k.shape[0] * k.shape[1], -(-k.shape[2] // TILE), variant.k_bytes + variant.v_bytes


def _variant(head_dim: int, dtype: torch.dtype, format: str) -> Variant:
    return Variant(next(width for width in (64, 96, 128) if head_dim <= width), dtype, format == "qk_int8_pv_fp8")


def _tensor(x: torch.Tensor, variant: Variant) -> Tensor:
    size = x.element_size()
    strides = (stride if length > 1 else 0 for length, stride in zip(x.shape[:3], x.stride(), strict=False))
    batch, head, token = (stride * size for stride in strides)
    channel = x.stride(3) * size
    vectors = x.shape[3] == variant.head_dim and channel == size and (x.data_ptr() | batch | head | token) % 16 == 0
    return Tensor(x.data_ptr(), batch, head, token, channel, vectors)


@cache
def _quantize_kernel(variant: Variant, device: int) -> Kernel:
    sizes = {"PARAMETER_BYTES": ctypes.sizeof(QuantizeParameters), "SHARED_BYTES": variant.v_bytes}
    return kernel(
        "quantize.cu", "quantize_kv", defines=(*variant.defines(), *sizes.items()), threads=_QUANTIZE_THREADS,
        shared_bytes=variant.v_bytes, device=device,
    )  # fmt: skip


@cache
def _attend_kernel(variant: Variant, is_causal: bool, device: int) -> Kernel:
    consumers, overlap, lag = variant.schedule
    sums = 64 * (variant.head_dim + 8) * 4 if variant.fp8 else 0
    fixed = consumers * (sums + 64 * variant.head_dim)
    stage = variant.k_bytes + variant.v_bytes + 32
    stages = min(_MOST_STAGES, (_SHARED_LIMIT - fixed) // stage)
    shared_bytes = fixed + stages * stage
    settings = {"CAUSAL": is_causal, "CONSUMERS": consumers, "STAGES": stages, "OVERLAP": overlap, "LAG": lag}
    settings |= {"PARAMETER_BYTES": ctypes.sizeof(AttendParameters), "SHARED_BYTES": shared_bytes}
    return kernel(
        "attention.cu", "attend", defines=(*variant.defines(), *settings.items()), threads=128 * (consumers + 1),
        shared_bytes=shared_bytes, device=device,
    )  # fmt: skip


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
