"""Quantized attention in CUDA C++ for Hopper GPUs (compute capability 9.0), compiled at run time.

In: a call, and an output to fill. Out: nothing; `out` is written.
Three launches: `quantize_kv` reads K and V once and writes tiles, `attend` quantizes Q as it goes and multiplies, and
the exact kernel repeats the rows that 8 bits cannot hold; each does the Prologue of what it reads. CUDA C++ because
this needs what Triton does not give: wgmma in flight across a softmax, a loader warp beside warpgroups that drift
apart, operands kept in registers in the order of the accumulators. attention.cu and quantize.cu say how, LOG.md why;
parameters.py has what they are told, runtime.py compiles them with what torch brings, relaunch.py hands to C++ what an
op launches again.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import sagecompile.formats as formats
from sagecompile.kernels import counts
from sagecompile.kernels.call import Call
from sagecompile.kernels.check import check

from . import relaunch
from .cut import cut_rows, even
from .parameters import (
    FLAG_ROWS,
    LOG2E,
    NOTHING,
    AttendParameters,
    Prepared,
    QuantizeParameters,
    Tables,
    Variant,
    prepare,
    tables_of,
    tensor_of,
    tiles_shape,
    variant_of,
)
from .runtime import Defines, Kernel, Source, begin, kernel

if TYPE_CHECKING:
    from sagecompile.kernels.triton.exact import Repeated

FORMATS = formats.PROVIDERS["hopper"].formats

_QUANTIZE_THREADS, _QUANTIZE_STAGES = 512, 2
# Of the blocks of `quantize`, how many take K, by head dim: as long as it takes compared with V, measured on one H200.
_K_SHARE, _K_SHARE_WITH_PROLOGUE = {64: 0.5, 96: 0.52, 128: 0.53}, 0.62
_SHARED_LIMIT = 227 * 1024
_MOST_STAGES, _TURNS = 4, 8


class _Launched(NamedTuple):
    """One kernel's launch, and what it wrote for the next one."""

    kernel: Kernel
    blocks: int
    parameters: ctypes.Structure
    made: torch.Tensor
    """Tiles, or flags."""


def attention(call: Call, out: torch.Tensor, *, format: str) -> None:
    """The call's result into out, (B, Hq, Nq, D) with any strides; 1 <= D <= 128, with a prologue 64, 96 or 128."""
    check(call, out, format, FORMATS, max_head_dim=128)
    q, k, v = call.q, call.k, call.v
    _check_limits(q, k)
    library = relaunch.LIBRARY.now()
    variant = variant_of(q.shape[3], q.dtype, format)
    with torch.cuda.device_of(q):
        q_prepared, k_prepared = prepare(call.q_prologue, q, variant), prepare(call.k_prologue, k, variant)
        ahead = None if call.ahead is None else min(call.ahead, k.shape[2])
        ready = replace(call, ahead=ahead, q_prologue=q_prepared.prologue, k_prologue=k_prepared.prologue)
        building = _begin_all(q.shape[3], q.dtype, call.is_causal, q_prepared.defines, k_prepared.defines)
        if not all(one.done() for one in building):  # meanwhile Triton can build in this thread
            _exact(ready, out, None)
        quantized = _quantize(k, v, k_prepared, format)
        attended = _attend(ready, out, quantized.made, q_prepared, format, overlap=True)
        repeated = _exact(ready, out, attended.made)
        if library is not None and repeated is not None and not (q_prepared.copied or k_prepared.copied):
            tables = tables_of("q", call.q_prologue), tables_of("k", call.k_prologue)
            _leave_plan(library, out, quantized, attended, repeated, *tables)
            relaunch.count_at(library, q.device.index, call.site, counts.slot(q.device, call.site).data_ptr())


def _leave_plan(
    library: Any,
    out: torch.Tensor,
    quantized: _Launched,
    attended: _Launched,
    repeated: Repeated,
    q_tables: Tables,
    k_tables: Tables,
) -> None:
    """For C++, to do the same for tensors alike."""
    values = repeated.arguments(("q", "k", "v", "out", "flags", "counts"), q_tables, k_tables)
    exact = relaunch.of_triton(repeated.compiled, repeated.blocks, values, overlap=True)
    if exact is not None:
        own = (
            relaunch.of_ours(*quantized[:3], k_tables, overlap=False),
            relaunch.of_ours(*attended[:3], q_tables, overlap=True),
        )
        relaunch.Plan(library, out, quantized.made.nbytes, attended.made.nbytes, (*own, exact)).leave()


def quantize(k: torch.Tensor, v: torch.Tensor, *, format: str) -> torch.Tensor:
    """The tiles of k and v (B, Hkv, Nk, D) that `attend` reads: (B * Hkv, tiles, bytes) uint8."""
    with torch.cuda.device_of(k):
        return _quantize(k, v, NOTHING, format).made


def _quantize(k: torch.Tensor, v: torch.Tensor, prepared: Prepared, format: str) -> _Launched:
    _, heads, length, head_dim = k.shape
    variant = variant_of(head_dim, k.dtype, format)
    tiles = torch.empty(tiles_shape(k, variant), dtype=torch.uint8, device=k.device)
    count = tiles.shape[0] * tiles.shape[1]
    index = k.device.index
    loaded = kernel(_quantize_source(variant, prepared.defines), index)
    most = 2 * _multiprocessors(index)
    share = _K_SHARE[variant.head_dim] if prepared.prologue is None else _K_SHARE_WITH_PROLOGUE
    k_blocks = min(count, round(most * share))
    parameters = QuantizeParameters(
        tensor_of(k, variant), tensor_of(v, variant), prepared.parameters, tiles.data_ptr(),
        heads, length, head_dim, tiles.shape[1], count, k_blocks,
    )  # fmt: skip
    blocks = k_blocks + min(count, most - k_blocks)
    loaded(blocks, parameters, torch.cuda.current_stream(index).cuda_stream)
    return _Launched(loaded, blocks, parameters, tiles)


def attend(call: Call, quantized: torch.Tensor, out: torch.Tensor, *, format: str) -> None:
    """`attention` on what `quantize` made of k and v, which are read again only for rows that 8 bits cannot hold.

    The call has no prologues.
    """
    check(call, out, format, FORMATS, max_head_dim=128)
    k = call.k
    _check_limits(call.q, k)
    shape = tiles_shape(k, variant_of(k.shape[3], k.dtype, format))
    if quantized.shape != shape or not quantized.is_contiguous() or quantized.device != k.device:
        raise ValueError(f"quantized {tuple(quantized.shape)} on {quantized.device}: need what quantize made, {shape}")
    with torch.cuda.device_of(out):
        attended = _attend(call, out, quantized, NOTHING, format, overlap=False)
        _exact(call, out, attended.made)


def _attend(
    call: Call, out: torch.Tensor, tiles: torch.Tensor, prepared: Prepared, format: str, *, overlap: bool
) -> _Launched:
    """overlap: the stream's launch just before is `quantize`; what it does not write may be read at once."""
    q, k = call.q, call.k
    batch, heads, q_len, head_dim = q.shape
    variant = variant_of(head_dim, q.dtype, format)
    flags = torch.empty((batch * heads, -(-q_len // FLAG_ROWS)), dtype=torch.int32, device=q.device)
    index = q.device.index
    consumers, processors = variant.schedule.consumers, _multiprocessors(index)
    cut = even(q_len, consumers) if call.is_causal else cut_rows(q_len, batch * heads, consumers, processors)
    parameters = AttendParameters(
        tensor_of(q, variant), tensor_of(out, variant), prepared.parameters, tiles.data_ptr(), flags.data_ptr(),
        batch, heads, heads // k.shape[1], q_len, k.shape[2], head_dim, call.ahead or 0,
        *cut, tiles.shape[1], call.scale * LOG2E, 0,
    )  # fmt: skip
    blocks = min(batch * heads * cut.tiles, processors)
    loaded = kernel(_attend_source(variant, call.is_causal, prepared.defines), index)
    loaded(blocks, parameters, torch.cuda.current_stream(index).cuda_stream, overlap=overlap)
    return _Launched(loaded, blocks, parameters, flags)


def _exact(call: Call, out: torch.Tensor, flags: torch.Tensor | None) -> Repeated | None:
    """Without flags it is only built."""
    from sagecompile.kernels.triton.exact import recompute_flagged  # late: `quantize` and the types need no Triton

    return recompute_flagged(call, out, flags, flag_rows=FLAG_ROWS, overlap=True)


def _check_limits(q: torch.Tensor, k: torch.Tensor) -> None:
    """What the kernels count in 32 bits, and that the tensors are where they can be read."""
    if q.device.type != "cuda":
        raise ValueError(f"q on {q.device}: hopper needs a CUDA device")
    if q.shape[2] + k.shape[2] > 2**31 - 256 or q.shape[0] * q.shape[1] * (q.shape[2] // 64 + 1) >= 2**31:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: need fewer than 2^31 tokens in both, and blocks of 64 queries"
        )


@cache
def _begin_all(
    head_dim: int, dtype: torch.dtype, is_causal: bool, q_defines: Defines, k_defines: Defines
) -> list[Future[bytes]]:
    """Have threads compile what a call needs, in all formats: what may run in one is often raced in the others, too."""
    variants = [variant_of(head_dim, dtype, format) for format in FORMATS]
    sources = [_quantize_source(variant, k_defines) for variant in variants]
    sources += [_attend_source(variant, is_causal, q_defines) for variant in variants]
    return [begin(source) for source in sources]


@cache
def _quantize_source(variant: Variant, prologue: Defines) -> Source:
    shared_bytes = max(variant.k_bytes - 128, variant.v_bytes)
    shared_bytes += _QUANTIZE_STAGES * _QUANTIZE_THREADS * 32 * variant.dtype.itemsize
    sizes = {"PARAMETER_BYTES": ctypes.sizeof(QuantizeParameters), "SHARED_BYTES": shared_bytes}
    defines = (*variant.defines(), *prologue, *sizes.items())
    return Source("quantize.cu", "quantize_kv", defines, _QUANTIZE_THREADS, shared_bytes)


@cache
def _attend_source(variant: Variant, is_causal: bool, prologue: Defines) -> Source:
    consumers, overlap, lag = variant.schedule
    own = 64 * ((variant.head_dim + 8) * 4 if variant.fp8 else variant.head_dim * variant.dtype.itemsize)
    fixed = consumers * (own + variant.head_dim // 16 * (64 * 16 + 16) + 64 * 4) + _TURNS * 32
    stage = variant.k_bytes + variant.v_bytes + 32
    stages = min(_MOST_STAGES, (_SHARED_LIMIT - fixed) // stage)
    shared_bytes = fixed + stages * stage
    settings = {"CAUSAL": is_causal, "CONSUMERS": consumers, "STAGES": stages, "OVERLAP": overlap, "LAG": lag}
    settings |= {"PARAMETER_BYTES": ctypes.sizeof(AttendParameters), "SHARED_BYTES": shared_bytes}
    settings |= {"FLAG_ROWS": FLAG_ROWS}
    defines = (*variant.defines(), *prologue, *settings.items())
    return Source("attention.cu", "attend", defines, 128 * (consumers + 1), shared_bytes)


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
