"""Once Python has launched an op for some tensors, C++ does so for all alike: relaunch.cpp, which says what that is.

In: the launches of a call that Python made. Out: a `Plan`, which Python leaves for the op whose call is under way.
Why: to find out what to launch takes the host 350 us in Python, and to launch it again 23 in C++, where SDPA takes 24
(an H200's host, calls in a row; LOG.md).
Until that is built, and where there is no C++ compiler, or the driver is older than CUDA 12.4, Python launches
everything; so it does where tables of a prologue must be copied.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sagecompile.kernels import compiler

from .parameters import Tables, places
from .runtime import DRIVER, Kernel, parameter_sizes, tells_parameters

logger = logging.getLogger("sagecompile")

SOURCE = Path(__file__).with_name("relaunch.cpp")
TENSORS = ("q", "k", "v", "q_weight", "k_weight", "cos", "sin", "out", "basis", "tiles", "flags", "counts")
"""By their number in relaunch.cpp: the ops' arguments, then what a call makes, and its site's counts."""

_kept: dict[int, Any] = {}
"""Kernels of Triton by CUDA's handle, as it unloads one that nobody has."""
_BY_PYTHON = "each attention takes the host fifteen times as long, as Python launches it"
_PACKED = {"i32": "i", "i64": "q", "fp32": "f"}
"""Triton's types in Python's letters."""


class Launch(NamedTuple):
    """One kernel, as CUDA takes it; `parameters` with anything where addresses go."""

    function: int
    blocks: int
    threads: int
    shared_bytes: int
    overlap: bool
    parameters: Sequence[bytes]
    addresses: Mapping[tuple[int, int], str]
    """By parameter and byte in it, which of TENSORS."""


def of_ours(kernel: Kernel, blocks: int, parameters: ctypes.Structure, tables: Tables, *, overlap: bool) -> Launch:
    """Of a .cu file's kernel; `tables`: of its prologue."""
    addresses = {(0, byte): tensor for byte, tensor in places(parameters, tables).items()}
    shared_bytes = kernel.dynamic_shared_bytes
    return Launch(kernel.function, blocks, kernel.threads, shared_bytes, overlap, [bytes(parameters)], addresses)


def of_triton(compiled: Any, blocks: int, values: Sequence[float | str | None], *, overlap: bool) -> Launch | None:
    """Of a kernel that Triton compiled and loaded. None if it does not take what CUDA says that it takes.

    values: its arguments in their order, constants too, a tensor by one of TENSORS, None for no address. Those that
    Triton made constants are gone, and two addresses of scratch memory, of which it needs none, come last, as in
    torch._inductor.runtime.static_triton_launcher.
    """
    parameters: list[bytes] = []
    addresses: dict[tuple[int, int], str] = {}
    try:
        for name, value in zip(compiled.src.fn.arg_names, values, strict=True):
            kind = compiled.src.signature[name]
            if kind.startswith("*"):
                addresses |= {(len(parameters), 0): value} if isinstance(value, str) else {}
                parameters.append(bytes(8))
            elif kind != "constexpr":
                parameters.append(struct.pack(_PACKED[kind], value))
        metadata = compiled.metadata
        parameters += [bytes(8)] * 2
        is_plain = not (metadata.global_scratch_size or metadata.profile_scratch_size) and metadata.num_ctas == 1
        if is_plain and parameter_sizes(compiled.function) == [len(parameter) for parameter in parameters]:
            threads = 32 * metadata.num_warps
            _kept[compiled.function] = compiled
            return Launch(compiled.function, blocks, threads, metadata.shared, overlap, parameters, addresses)
    except (AttributeError, KeyError, struct.error, OverflowError) as error:
        logger.debug("Triton's %s: %r", compiled, error)
    _say_that_python_launches("Triton's kernels take other arguments than expected, or this driver does not say which")
    return None


class Plan:
    """Launches in a row, and the tensors that they write."""

    def __init__(self, library: Any, out: torch.Tensor, made: tuple[int, int, int], launches: Sequence[Launch]):
        """`out` as the op returns it; made: bytes of the basis, the tiles and the flags."""
        self._library, self._plan = library, None
        sizes, strides = (c_int64 * out.dim())(*out.shape), (c_int64 * out.dim())(*out.stride())
        self._plan = library.sagecompile_plan(sizes, strides, out.dim(), (c_int64 * 3)(*made))
        for launch in launches:
            padded = [parameter.ljust(-(-len(parameter) // 8) * 8, b"\0") for parameter in launch.parameters]
            *begins, size = accumulate(map(len, padded), initial=0)
            to = [(begins[at] + byte, TENSORS.index(tensor)) for (at, byte), tensor in launch.addresses.items()]
            library.sagecompile_add(
                self._plan, launch.function, launch.blocks, launch.threads, launch.shared_bytes, launch.overlap,
                b"".join(padded), size,
                (c_uint32 * len(begins))(*begins), len(begins), (c_uint32 * (2 * len(to)))(*sum(to, ())), len(to),
            )  # fmt: skip

    def leave(self) -> None:
        """For the op's call that is under way on this thread, and those like it."""
        self._library.sagecompile_leave(self._plan)

    def __del__(self) -> None:
        self._library.sagecompile_forget(self._plan)


def count_at(library: Any, device: int, site: str, address: int) -> None:
    """From now on C++ launches calls of this site, which differ from those of others in the address of the counts."""
    library.sagecompile_count_at(device, site.encode(), address)


def _load(path: Path) -> Any:
    cuda = ctypes.CDLL(str(compiler.TORCH / "lib" / "libtorch_cuda.so"))
    return load(path, ctypes.CDLL(DRIVER), cuda.aoti_torch_get_current_cuda_stream)


def load(path: Path, driver: Any, current_stream: Any) -> Any:
    """relaunch.cpp's functions, given the driver's and torch's; from now on it has its ops' kernels."""
    functions = (driver.cuLaunchKernelEx, driver.cuCtxGetCurrent, current_stream)
    library = ctypes.CDLL(str(path))
    library.sagecompile_functions.argtypes = (c_void_p,) * 3
    library.sagecompile_plan.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
    library.sagecompile_plan.restype = c_void_p
    library.sagecompile_add.argtypes = (
        c_void_p, c_void_p, *(c_uint32,) * 3, c_int, c_char_p, c_uint32, *(c_void_p, c_uint32) * 2,
    )  # fmt: skip
    library.sagecompile_count_at.argtypes = (c_int, c_char_p, c_void_p)
    library.sagecompile_leave.argtypes = library.sagecompile_forget.argtypes = (c_void_p,)
    library.sagecompile_functions(*(ctypes.cast(function, c_void_p) for function in functions))
    return library


@cache
def _say_that_python_launches(why: str) -> None:
    logger.warning("%s: %s", _BY_PYTHON, why)


@cache
def why_not() -> str | None:
    """Why Python will launch everything, or None if C++ can, as far as can be said without building it."""
    return compiler.why_none() or (None if tells_parameters() else "the NVIDIA driver is older than CUDA 12.4's")


def build(*flags: str) -> Path:
    """The library; UnsupportedError where the compiler says no."""
    return compiler.library(SOURCE, "what launches Hopper's kernels", [*compiler.WITH_TORCH, *flags])


LIBRARY = compiler.Background(build, _load, _BY_PYTHON)
