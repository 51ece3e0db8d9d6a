"""Quantized attention in CUDA C++ for Hopper GPUs (compute capability 9.0), compiled at run time.

In: q, k, v with any strides, and an output to fill. Out: nothing; `out` is written.
Three launches: `quantize_kv` reads K and V once and writes tiles, `attend` quantizes Q as it goes and multiplies, and
the exact kernel repeats the rows that 8 bits cannot hold; each does the Prologue of what it reads. CUDA C++ because
this needs what Triton does not give: wgmma in flight across a softmax, a loader warp beside warpgroups that drift
apart, operands kept in registers in the order of the accumulators. attention.cu and quantize.cu say how, LOG.md why;
runtime.py compiles them with what torch brings.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import sagecompile.formats as formats
from sagecompile.kernels.check import check
from sagecompile.kernels.prologue import ROPES, Prologue, table_strides

from .cut import cut_rows, even
from .runtime import Defines, Kernel, kernel

if TYPE_CHECKING:
    from sagecompile.kernels.triton.exact import Repeat

FORMATS = formats.PROVIDERS["hopper"].formats

TILE = 128
"""Tokens of K and V in one tile."""
FLAG_ROWS = 16
"""Rows of the output that share one flag."""
LOG2E = math.log2(math.e)

_QUANTIZE_THREADS, _QUANTIZE_STAGES = 512, 2
# Of the blocks of `quantize`, how many take K: as long as it takes compared with V, as measured on one H200.
_K_SHARE, _K_SHARE_WITH_PROLOGUE = 0.5, 0.62
_SHARED_LIMIT = 227 * 1024
_MOST_STAGES, _TURNS = 4, 8
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_NO_WEIGHT = 3


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


class PrologueParameters(ctypes.Structure):
    """Prologue in prologue.cuh; strides in bytes."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "cos", "sin")),
        *((name, c_longlong) for name in ("batch", "token")),
        ("eps", c_float),
    )


class QuantizeParameters(ctypes.Structure):
    """As in quantize.cu."""

    _fields_ = (
        *((name, Tensor) for name in ("k", "v")),
        ("prologue", PrologueParameters),
        ("tiles", c_void_p),
        *((name, c_int) for name in ("heads", "length", "head_dim", "count", "all", "k_blocks")),
    )


class AttendParameters(ctypes.Structure):
    """As in attention.cu."""

    _fields_ = (
        *((name, Tensor) for name in ("q", "out")),
        ("prologue", PrologueParameters),
        *((name, c_void_p) for name in ("tiles", "flags")),
        *((name, c_int) for name in ("batch", "heads", "group", "q_len", "kv_len", "head_dim", "ahead")),
        *((name, c_int) for name in ("row_tiles", "whole_tiles", "tail_rows", "kv_tiles")),
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
        return self.head_dim // 16 * (TILE * 16 + 16) + 128

    @property
    def v_bytes(self) -> int:
        """Of one tile of V."""
        return TILE * (self.head_dim + 8) * (1 if self.fp8 else 2)

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.head_dim, self.fp8]

    def defines(self) -> tuple[tuple[str, int], ...]:
        return (("HEAD_DIM", self.head_dim), ("DTYPE", _DTYPES[self.dtype]), ("FP8", self.fp8))


class _Prepared(NamedTuple):
    """A prologue as the kernels take it."""

    parameters: PrologueParameters
    defines: Defines
    prologue: Prologue | None
    """The same, of the tensors that `parameters` points to."""


class _Launch(NamedTuple):
    """One kernel's launch, but for the addresses of the tensors."""

    kernel: Kernel
    blocks: int
    parameters: ctypes.Structure
    made: tuple[int, ...]
    """The shape of what it writes for the next one: tiles, or flags."""


class _Launches:
    """All that `attention` does for tensors of some shapes, strides, dtypes, alignments: found out once, then repeated.

    It takes the host longer to find out what to launch than to launch it.
    """

    def __init__(self, quantize: _Launch, attend: _Launch, copies: bool) -> None:
        self.quantize, self.attend = quantize, attend
        self.copies = copies
        """Whether a tensor of a prologue must be copied in each call before it can be read."""
        self.repeat_exact: Repeat | None = None


_known: dict[tuple[Any, ...], _Launches] = {}
_MOST_KNOWN = 4096
"""When there are more, all are forgotten."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    is_causal: bool,
    format: str,
    causal_offset: int = 0,
    q_prologue: Prologue | None = None,
    k_prologue: Prologue | None = None,
) -> None:
    """softmax(scale * q k^T) v into out, with key j visible to query i iff j <= i + causal_offset where causal.

    q, out: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D) with Hq a multiple of Hkv; 1 <= D <= 128; one dtype; any strides.
    A prologue is applied to q or k as they are read; with one, D must be 64, 96 or 128.
    """
    facts = (*map(_facts, (q, k, v, out)), scale, is_causal, format, causal_offset)
    facts += (_prologue_facts(q_prologue), _prologue_facts(k_prologue))
    launches = _known.get(facts)
    if launches is None:
        check(q, k, v, out, format, FORMATS, max_head_dim=128, causal_offset=causal_offset)
        _check_limits(q, k)
    with torch.cuda.device_of(q):
        if launches is None or launches.copies:
            variant = _variant(q.shape[3], q.dtype, format)
            q_prepared, k_prepared = _prepare(q_prologue, q, variant), _prepare(k_prologue, k, variant)
            if launches is None:
                as_is = _addresses(q_prologue), _addresses(k_prologue)
                launches = _Launches(
                    _quantize_launch(k, v, k_prepared, format),
                    _attend_launch(q, k, out, q_prepared, scale, is_causal, causal_offset, format),
                    copies=as_is != (_addresses(q_prepared.prologue), _addresses(k_prepared.prologue)),
                )
            q_prologue, k_prologue = q_prepared.prologue, k_prepared.prologue
        stream = torch.cuda.current_stream(q.device.index).cuda_stream
        q_tables, k_tables = _addresses(q_prologue), _addresses(k_prologue)
        tiles = _quantize(launches.quantize, k, v, k_tables, stream)
        flags = _attend(launches.attend, q, out, tiles, q_tables, stream, overlap=True)
        if launches.repeat_exact is not None:
            addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), flags.data_ptr()
            launches.repeat_exact(addresses, q_tables, k_tables, stream)
        else:
            launches.repeat_exact = _exact(q, k, v, out, flags, scale, is_causal, causal_offset, q_prologue, k_prologue)
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[facts] = launches


def _facts(x: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What a launch depends on, but for the address."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def _prologue_facts(x: Prologue | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.eps, x.rope, _facts(x.weight), _facts(x.cos), _facts(x.sin))


def _addresses(prologue: Prologue | None) -> tuple[int, int, int]:
    """Of weight, cos and sin; 0 where there is none."""
    if prologue is None:
        return 0, 0, 0
    weight, cos, sin = prologue.weight, prologue.cos, prologue.sin
    return (
        0 if weight is None else weight.data_ptr(),
        0 if cos is None else cos.data_ptr(),
        0 if sin is None else sin.data_ptr(),
    )


def quantize(k: torch.Tensor, v: torch.Tensor, *, format: str) -> torch.Tensor:
    """The tiles of k and v (B, Hkv, Nk, D) that `attend` reads: (B * Hkv, tiles, bytes) uint8."""
    with torch.cuda.device_of(k):
        stream = torch.cuda.current_stream(k.device.index).cuda_stream
        return _quantize(_quantize_launch(k, v, _NOTHING, format), k, v, _addresses(None), stream)


def _quantize_launch(k: torch.Tensor, v: torch.Tensor, prepared: _Prepared, format: str) -> _Launch:
    _, heads, length, head_dim = k.shape
    variant = _variant(head_dim, k.dtype, format)
    shape = _tiles_shape(k, variant)
    count = shape[0] * shape[1]
    index = k.device.index
    kernel = _quantize_kernel(variant, prepared.defines, index)
    blocks = 2 * _multiprocessors(index)
    k_blocks = min(count, round(blocks * (_K_SHARE if prepared.prologue is None else _K_SHARE_WITH_PROLOGUE)))
    parameters = QuantizeParameters(
        _tensor(k, variant), _tensor(v, variant), prepared.parameters, 0,
        heads, length, head_dim, shape[1], count, k_blocks,
    )  # fmt: skip
    return _Launch(kernel, k_blocks + min(count, blocks - k_blocks), parameters, shape)


def _quantize(
    launch: _Launch, k: torch.Tensor, v: torch.Tensor, tables: tuple[int, int, int], stream: int
) -> torch.Tensor:
    tiles = torch.empty(launch.made, dtype=torch.uint8, device=k.device)
    parameters = QuantizeParameters.from_buffer_copy(launch.parameters)
    parameters.k.data, parameters.v.data, parameters.tiles = k.data_ptr(), v.data_ptr(), tiles.data_ptr()
    prologue = parameters.prologue
    prologue.weight, prologue.cos, prologue.sin = tables
    launch.kernel(launch.blocks, parameters, stream)
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
        launch = _attend_launch(q, k, out, _NOTHING, scale, is_causal, 0, format)
        stream = torch.cuda.current_stream(q.device.index).cuda_stream
        flags = _attend(launch, q, out, quantized, _addresses(None), stream, overlap=False)
        _exact(q, k, v, out, flags, scale, is_causal, 0, None, None)


def _attend_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    out: torch.Tensor,
    prepared: _Prepared,
    scale: float,
    is_causal: bool,
    causal_offset: int,
    format: str,
) -> _Launch:
    batch, heads, q_len, head_dim = q.shape
    variant = _variant(head_dim, q.dtype, format)
    index = q.device.index
    consumers, processors = variant.schedule.consumers, _multiprocessors(index)
    cut = even(q_len, consumers) if is_causal else cut_rows(q_len, batch * heads, consumers, processors)
    parameters = AttendParameters(
        _tensor(q, variant), _tensor(out, variant), prepared.parameters, 0, 0,
        batch, heads, heads // k.shape[1], q_len, k.shape[2], head_dim, min(causal_offset, k.shape[2]),
        *cut, _tiles_shape(k, variant)[1], scale * LOG2E, 0,
    )  # fmt: skip
    blocks = min(batch * heads * cut.tiles, processors)
    kernel = _attend_kernel(variant, is_causal, prepared.defines, index)
    return _Launch(kernel, blocks, parameters, (batch * heads, -(-q_len // FLAG_ROWS)))


def _attend(
    launch: _Launch,
    q: torch.Tensor,
    out: torch.Tensor,
    tiles: torch.Tensor,
    tables: tuple[int, int, int],
    stream: int,
    *,
    overlap: bool,
) -> torch.Tensor:
    """The flags. overlap: the stream's launch just before is `quantize`; what it does not write may be read at once."""
    flags = torch.empty(launch.made, dtype=torch.int32, device=q.device)
    parameters = AttendParameters.from_buffer_copy(launch.parameters)
    parameters.q.data, parameters.out.data = q.data_ptr(), out.data_ptr()
    parameters.tiles, parameters.flags = tiles.data_ptr(), flags.data_ptr()
    prologue = parameters.prologue
    prologue.weight, prologue.cos, prologue.sin = tables
    launch.kernel(launch.blocks, parameters, stream, overlap=overlap)
    return flags


def _exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    flags: torch.Tensor,
    scale: float,
    is_causal: bool,
    causal_offset: int,
    q_prologue: Prologue | None,
    k_prologue: Prologue | None,
) -> Repeat | None:
    from sagecompile.kernels.triton.exact import recompute_flagged  # late: `quantize` and the types need no Triton

    return recompute_flagged(
        q, k, v, out, flags, flag_rows=FLAG_ROWS, scale=scale, is_causal=is_causal,
        causal_offset=min(causal_offset, k.shape[2]), q_prologue=q_prologue, k_prologue=k_prologue, overlap=True,
    )  # fmt: skip


def _prepare(prologue: Prologue | None, x: torch.Tensor, variant: Variant) -> _Prepared:
    """As the kernels that read x take it; ValueError where they cannot. Before any launch: it may copy."""
    if prologue is None:
        return _NOTHING
    batch, _, length, head_dim = x.shape
    weight = None if prologue.eps is None else prologue.weight
    cos, sin = (prologue.cos, prologue.sin) if prologue.rope != "none" else (None, None)
    if head_dim != variant.head_dim:
        raise ValueError(f"head_dim {head_dim}: a prologue needs 64, 96 or 128")
    if weight is not None and weight.shape != (head_dim,):
        raise ValueError(f"weight {tuple(weight.shape)}: needs ({head_dim},)")
    for table in (cos, sin):
        if table is not None and table.shape not in ((1, length, head_dim), (batch, length, head_dim)):
            raise ValueError(f"cos or sin {tuple(table.shape)}: needs (1 or {batch}, {length}, {head_dim})")
    weight, cos, sin = (None if tensor is None else _readable(tensor) for tensor in (weight, cos, sin))
    strides: tuple[int, ...] = (0, 0)
    if cos is not None and sin is not None:
        if cos.shape != sin.shape or cos.dtype != sin.dtype:
            raise ValueError(f"cos {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}: need them alike")
        if table_strides(cos) != table_strides(sin):
            cos, sin = cos.contiguous(), sin.contiguous()
        strides = tuple(stride * cos.element_size() for stride in table_strides(cos))
    defines = (
        ("NORM", prologue.eps is not None),
        ("NO_WEIGHT", _NO_WEIGHT),
        ("WEIGHT", _NO_WEIGHT if weight is None else _DTYPES[weight.dtype]),
        ("ROPE", ROPES.index(prologue.rope)),
        ("TABLE", 0 if cos is None else _DTYPES[cos.dtype]),
    )
    prepared = replace(prologue, weight=weight, cos=cos, sin=sin)
    parameters = PrologueParameters(*_addresses(prepared), *strides, prologue.eps or 0.0)
    return _Prepared(parameters, defines, prepared)


_NOTHING = _prepare(Prologue(), torch.empty(1, 1, 1, 64), Variant(64, torch.float16, True))._replace(prologue=None)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy in a dtype of the kernels in which every row starts at a multiple of 16 bytes, channels adjacent."""
    x = x if x.dtype in _DTYPES else x.float()
    size = x.element_size()
    strides = [stride * size for length, stride in zip(x.shape[:-1], x.stride(), strict=False) if length > 1]
    fine = x.stride(-1) == 1 and all(byte % 16 == 0 for byte in (x.data_ptr(), *strides))
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def _check_limits(q: torch.Tensor, k: torch.Tensor) -> None:
    """What the kernels count in 32 bits, and that the tensors are where they can be read."""
    if q.device.type != "cuda":
        raise ValueError(f"q on {q.device}: hopper needs a CUDA device")
    if q.shape[2] + k.shape[2] > 2**31 - 256 or q.shape[0] * q.shape[1] * (q.shape[2] // 64 + 1) >= 2**31:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: need fewer than 2^31 tokens in both, and blocks of 64 queries"
        )


def _tiles_shape(k: torch.Tensor, variant: Variant) -> tuple[int, int, int]:
    return k.shape[0] * k.shape[1], -(-k.shape[2] // TILE), variant.k_bytes + variant.v_bytes


@cache
def _variant(head_dim: int, dtype: torch.dtype, format: str) -> Variant:
    return Variant(next(width for width in (64, 96, 128) if head_dim <= width), dtype, format == "qk_int8_pv_fp8")


def _tensor(x: torch.Tensor, variant: Variant) -> Tensor:
    *strides, rows_aligned = _layout(x.shape, x.stride(), x.element_size(), variant.head_dim)
    address = x.data_ptr()
    return Tensor(address, *strides, rows_aligned and address % 16 == 0)


@lru_cache(4096)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], size: int, width: int) -> tuple[int, int, int, int, bool]:
    """Strides in bytes, 0 where there is one entry; whether rows are of `width` elements, aligned to 16 bytes."""
    batch, head, token = (
        stride * size if length > 1 else 0 for length, stride in zip(shape[:3], strides, strict=False)
    )
    channel = strides[3] * size
    return batch, head, token, channel, shape[3] == width and channel == size and (batch | head | token) % 16 == 0


@cache
def _quantize_kernel(variant: Variant, prologue: Defines, device: int) -> Kernel:
    shared_bytes = max(variant.k_bytes - 128, variant.v_bytes)
    shared_bytes += _QUANTIZE_STAGES * _QUANTIZE_THREADS * 32 * variant.dtype.itemsize
    sizes = {"PARAMETER_BYTES": ctypes.sizeof(QuantizeParameters), "SHARED_BYTES": shared_bytes}
    return kernel(
        "quantize.cu", "quantize_kv", defines=(*variant.defines(), *prologue, *sizes.items()),
        threads=_QUANTIZE_THREADS, shared_bytes=shared_bytes, device=device,
    )  # fmt: skip


@cache
def _attend_kernel(variant: Variant, is_causal: bool, prologue: Defines, device: int) -> Kernel:
    consumers, overlap, lag = variant.schedule
    own = 64 * ((variant.head_dim + 8) * 4 if variant.fp8 else variant.head_dim * variant.dtype.itemsize)
    fixed = consumers * (own + variant.head_dim // 16 * (64 * 16 + 16)) + _TURNS * 32
    stage = variant.k_bytes + variant.v_bytes + 32
    stages = min(_MOST_STAGES, (_SHARED_LIMIT - fixed) // stage)
    shared_bytes = fixed + stages * stage
    settings = {"CAUSAL": is_causal, "CONSUMERS": consumers, "STAGES": stages, "OVERLAP": overlap, "LAG": lag}
    settings |= {"PARAMETER_BYTES": ctypes.sizeof(AttendParameters), "SHARED_BYTES": shared_bytes}
    settings |= {"FLAG_ROWS": FLAG_ROWS}
    return kernel(
        "attention.cu", "attend", defines=(*variant.defines(), *prologue, *settings.items()),
        threads=128 * (consumers + 1), shared_bytes=shared_bytes, device=device,
    )  # fmt: skip


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
