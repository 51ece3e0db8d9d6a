"""What the kernels are told: the structs of the .cu files and what is fixed when they are compiled.

In: tensors and prologues. Out: ctypes structures of their addresses and strides, defines, and the size of tiles.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from sagecompile.kernels.prologue import ROPES, Prologue, table_strides

from .runtime import Defines

TILE = 128
"""Tokens of K and V in one tile."""
FLAG_ROWS = 16
"""Rows of the output that share one flag."""
LOG2E = math.log2(math.e)

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
        *((name, c_void_p) for name in ("basis", "tiles")),
        *((name, c_int) for name in ("heads", "length", "head_dim", "count", "all", "k_blocks")),
    )


class AttendParameters(ctypes.Structure):
    """As in attention.cu."""

    _fields_ = (
        *((name, Tensor) for name in ("q", "out")),
        ("prologue", PrologueParameters),
        *((name, c_void_p) for name in ("basis", "tiles", "flags")),
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


Tables = tuple[str | None, str | None, str | None]
"""Weight, cos and sin of a prologue by the ops' names of these tensors."""


class Prepared(NamedTuple):
    """A prologue as the kernels take it."""

    parameters: PrologueParameters
    defines: Defines
    prologue: Prologue | None
    """The same, of the tensors that `parameters` points to."""
    copied: bool
    """Whether one of these is a copy, which every call must make again."""


def addresses_of(prologue: Prologue | None) -> tuple[int, int, int]:
    """Of weight, cos and sin; 0 where there is none."""
    if prologue is None:
        return 0, 0, 0
    weight, cos, sin = prologue.weight, prologue.cos, prologue.sin
    return (
        0 if weight is None else weight.data_ptr(),
        0 if cos is None else cos.data_ptr(),
        0 if sin is None else sin.data_ptr(),
    )


def tables_of(name: str, prologue: Prologue | None) -> Tables:
    """Of what `addresses_of` has an address; name: q or k."""
    weight, cos, sin = addresses_of(prologue)
    return f"{name}_weight" if weight else None, "cos" if cos else None, "sin" if sin else None


def places(parameters: ctypes.Structure, tables: Tables) -> dict[int, str]:
    """Where the addresses of tensors are, by the byte."""
    kind, found = type(parameters), {}
    for name, type_, *_ in kind._fields_:
        byte = getattr(kind, name).offset
        if type_ is Tensor:
            found[byte + Tensor.data.offset] = name
        elif type_ is c_void_p:
            found[byte] = name
        elif type_ is PrologueParameters:
            fields = (PrologueParameters.weight, PrologueParameters.cos, PrologueParameters.sin)
            found |= {byte + field.offset: table for field, table in zip(fields, tables, strict=True) if table}
    return found


def prepare(prologue: Prologue | None, x: torch.Tensor, variant: Variant) -> Prepared:
    """As the kernels that read x take it; ValueError where they cannot. Before any launch: it may copy."""
    if prologue is None:
        return NOTHING
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
    parameters = PrologueParameters(*addresses_of(prepared), *strides, prologue.eps or 0.0)
    return Prepared(parameters, defines, prepared, addresses_of(prepared) != addresses_of(prologue))


NOTHING = prepare(Prologue(), torch.empty(1, 1, 1, 64), Variant(64, torch.float16, True))._replace(prologue=None)
"""No prologue."""


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy in a dtype of the kernels in which every row starts at a multiple of 16 bytes, channels adjacent."""
    x = x if x.dtype in _DTYPES else x.float()
    size = x.element_size()
    strides = [stride * size for length, stride in zip(x.shape[:-1], x.stride(), strict=False) if length > 1]
    fine = x.stride(-1) == 1 and all(byte % 16 == 0 for byte in (x.data_ptr(), *strides))
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def tiles_shape(k: torch.Tensor, variant: Variant) -> tuple[int, int, int]:
    """(B * Hkv, tiles, bytes)."""
    return k.shape[0] * k.shape[1], -(-k.shape[2] // TILE), variant.k_bytes + variant.v_bytes


@cache
def variant_of(head_dim: int, dtype: torch.dtype, format: str) -> Variant:
    return Variant(next(width for width in (64, 96, 128) if head_dim <= width), dtype, format == "qk_int8_pv_fp8")


def tensor_of(x: torch.Tensor, variant: Variant) -> Tensor:
    """x (B, H, N, D) as the kernels take it."""
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
