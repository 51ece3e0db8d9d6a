"""Quantized attention in CUDA C++ for Hopper GPUs (compute capability 9.0), compiled at run time.

In: q, k, v with any strides, and an output to fill. Out: nothing; `out` is written.
Three launches: `quantize_kv` reads K and V once and writes tiles, `attend` quantizes Q as it goes and multiplies, and
the exact kernel repeats the rows that 8 bits cannot hold; each does the Prologue of what it reads. CUDA C++ because
this needs what Triton does not give: wgmma in flight across a softmax, a loader warp beside warpgroups that drift
apart, operands kept in registers in the order of the accumulators. attention.cu and quantize.cu say how, LOG.md why;
parameters.py has what they are told, runtime.py compiles them with what torch brings, relaunch.py hands to C++ what an
op launches again.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import sagecompile.formats as formats
from sagecompile.kernels.check import check
from sagecompile.kernels.prologue import Prologue

from . import relaunch
from .cut import cut_rows, even
from .parameters import (
    FLAG_ROWS,
    LOG2E,
    NOTHING,
    AttendParameters,
    Prepared,
    QuantizeParameters,
    Variant,
    addresses_of,
    prepare,
    tables_of,
    tensor_of,
    tiles_shape,
    variant_of,
)
from .runtime import Defines, Kernel, kernel

if TYPE_CHECKING:
    from sagecompile.kernels.triton.exact import Repeat

FORMATS = formats.PROVIDERS["hopper"].formats

_QUANTIZE_THREADS, _QUANTIZE_STAGES = 512, 2
# Of the blocks of `quantize`, how many take K: as long as it takes compared with V, as measured on one H200.
_K_SHARE, _K_SHARE_WITH_PROLOGUE = 0.5, 0.62
_SHARED_LIMIT = 227 * 1024
_MOST_STAGES, _TURNS = 4, 8


class _Launch(NamedTuple):
    """One kernel's launch, but for the addresses of the tensors."""

    kernel: Kernel
    blocks: int
    parameters: ctypes.Structure
    made: tuple[int, ...]
    """The shape of what it writes for the next one: tiles, or flags."""


@dataclass
class _Launches:
    """All that `attention` does for tensors of some shapes, strides, dtypes, alignments: found out once, then repeated.

    It takes the host longer to find out what to launch than to launch it.
    """

    quantize: _Launch
    attend: _Launch
    copies: bool
    """Whether a tensor of a prologue must be copied in each call before it can be read."""
    repeat_exact: Repeat | None = None
    plan: relaunch.Plan | None = None
    """The same for C++, if it can."""


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
        relaunch.start()
    ahead = min(causal_offset, k.shape[2])
    with torch.cuda.device_of(q):
        if launches is None or launches.copies:
            variant = variant_of(q.shape[3], q.dtype, format)
            q_prepared, k_prepared = prepare(q_prologue, q, variant), prepare(k_prologue, k, variant)
            if launches is None:
                as_is = addresses_of(q_prologue), addresses_of(k_prologue)
                launches = _Launches(
                    _quantize_launch(k, v, k_prepared, format),
                    _attend_launch(q, k, out, q_prepared, scale, is_causal, ahead, format),
                    copies=as_is != (addresses_of(q_prepared.prologue), addresses_of(k_prepared.prologue)),
                )
            q_prologue, k_prologue = q_prepared.prologue, k_prepared.prologue
        stream = torch.cuda.current_stream(q.device.index).cuda_stream
        q_tables, k_tables = addresses_of(q_prologue), addresses_of(k_prologue)
        tiles = _quantize(launches.quantize, k, v, k_tables, stream)
        flags = _attend(launches.attend, q, out, tiles, q_tables, stream, overlap=True)
        if launches.repeat_exact is not None:
            addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), flags.data_ptr()
            launches.repeat_exact(addresses, q_tables, k_tables, stream)
        else:
            launches.repeat_exact = _exact(q, k, v, out, flags, scale, is_causal, ahead, q_prologue, k_prologue)
            launches.plan = _plan(launches, out, q_prologue, k_prologue)
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[facts] = launches
    if launches.plan:
        launches.plan.leave()


def _plan(
    launches: _Launches, out: torch.Tensor, q_prologue: Prologue | None, k_prologue: Prologue | None
) -> relaunch.Plan | None:
    """For C++, or None where that cannot do it: without its library, and where tensors must be copied."""
    library, repeat = relaunch.library(), launches.repeat_exact
    quantize, attend = launches.quantize, launches.attend
    if library is None or repeat is None or launches.copies:
        return None
    tables = {"q": tables_of("q", q_prologue), "k": tables_of("k", k_prologue)}
    exact = relaunch.of_triton(repeat.compiled, repeat.blocks, repeat.named(tables["q"], tables["k"]), overlap=True)
    own = (
        relaunch.of_ours(quantize.kernel, quantize.blocks, quantize.parameters, tables["k"], overlap=False),
        relaunch.of_ours(attend.kernel, attend.blocks, attend.parameters, tables["q"], overlap=True),
    )
    return exact and relaunch.Plan(library, out, math.prod(quantize.made), 4 * math.prod(attend.made), (*own, exact))


def _facts(x: torch.Tensor | None) -> tuple[Any, ...] | None:
    """What a launch depends on, but for the address."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def _prologue_facts(x: Prologue | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.eps, x.rope, _facts(x.weight), _facts(x.cos), _facts(x.sin))


def quantize(k: torch.Tensor, v: torch.Tensor, *, format: str) -> torch.Tensor:
    """The tiles of k and v (B, Hkv, Nk, D) that `attend` reads: (B * Hkv, tiles, bytes) uint8."""
    with torch.cuda.device_of(k):
        stream = torch.cuda.current_stream(k.device.index).cuda_stream
        return _quantize(_quantize_launch(k, v, NOTHING, format), k, v, addresses_of(None), stream)


def _quantize_launch(k: torch.Tensor, v: torch.Tensor, prepared: Prepared, format: str) -> _Launch:
    _, heads, length, head_dim = k.shape
    variant = variant_of(head_dim, k.dtype, format)
    shape = tiles_shape(k, variant)
    count = shape[0] * shape[1]
    index = k.device.index
    kernel = _quantize_kernel(variant, prepared.defines, index)
    blocks = 2 * _multiprocessors(index)
    k_blocks = min(count, round(blocks * (_K_SHARE if prepared.prologue is None else _K_SHARE_WITH_PROLOGUE)))
    parameters = QuantizeParameters(
        tensor_of(k, variant), tensor_of(v, variant), prepared.parameters, 0,
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
    shape = tiles_shape(k, variant_of(k.shape[3], k.dtype, format))
    if quantized.shape != shape or not quantized.is_contiguous() or quantized.device != k.device:
        raise ValueError(f"quantized {tuple(quantized.shape)} on {quantized.device}: need what quantize made, {shape}")
    with torch.cuda.device_of(q):
        launch = _attend_launch(q, k, out, NOTHING, scale, is_causal, 0, format)
        stream = torch.cuda.current_stream(q.device.index).cuda_stream
        flags = _attend(launch, q, out, quantized, addresses_of(None), stream, overlap=False)
        _exact(q, k, v, out, flags, scale, is_causal, 0, None, None)


def _attend_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    out: torch.Tensor,
    prepared: Prepared,
    scale: float,
    is_causal: bool,
    ahead: int,
    format: str,
) -> _Launch:
    batch, heads, q_len, head_dim = q.shape
    variant = variant_of(head_dim, q.dtype, format)
    index = q.device.index
    consumers, processors = variant.schedule.consumers, _multiprocessors(index)
    cut = even(q_len, consumers) if is_causal else cut_rows(q_len, batch * heads, consumers, processors)
    parameters = AttendParameters(
        tensor_of(q, variant), tensor_of(out, variant), prepared.parameters, 0, 0,
        batch, heads, heads // k.shape[1], q_len, k.shape[2], head_dim, ahead,
        *cut, tiles_shape(k, variant)[1], scale * LOG2E, 0,
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
    ahead: int,
    q_prologue: Prologue | None,
    k_prologue: Prologue | None,
) -> Repeat | None:
    from sagecompile.kernels.triton.exact import recompute_flagged  # late: `quantize` and the types need no Triton

    return recompute_flagged(
        q, k, v, out, flags, flag_rows=FLAG_ROWS, scale=scale, is_causal=is_causal,
        causal_offset=ahead, q_prologue=q_prologue, k_prologue=k_prologue, overlap=True,
    )  # fmt: skip


def _check_limits(q: torch.Tensor, k: torch.Tensor) -> None:
    """What the kernels count in 32 bits, and that the tensors are where they can be read."""
    if q.device.type != "cuda":
        raise ValueError(f"q on {q.device}: hopper needs a CUDA device")
    if q.shape[2] + k.shape[2] > 2**31 - 256 or q.shape[0] * q.shape[1] * (q.shape[2] // 64 + 1) >= 2**31:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: need fewer than 2^31 tokens in both, and blocks of 64 queries"
        )


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
