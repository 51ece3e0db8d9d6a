"""Compile CUDA C++ for compute capability 9.0 while the program runs, keep the result on disk, load and launch it.

In: a `Source`, a .cu file of this folder with its defines and the name of an entry point that takes one struct by
value. Out: a `Kernel`, which a call launches. A user needs nothing but torch: its CUDA wheels bring the compiler,
NVRTC, and the NVIDIA driver brings libcuda. Both are called through ctypes, because torch's own wrapper
(torch.cuda._utils) is private and cuda-bindings comes with torch's CUDA 13 wheels alone. NVRTC has no headers, not even
<cstdint> or <cuda_bf16.h>: a .cu file can include the .cuh files beside it and nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from ctypes import addressof, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sagecompile import files
from sagecompile.errors import SageCompileError, UnsupportedError
from sagecompile.kernels.compiler import in_background

logger = logging.getLogger("sagecompile")

FOLDER = Path(__file__).parent
DRIVER = "libcuda.so.1"
OPTIONS = (
    "--gpu-architecture=sm_90a",
    "-std=c++17",
    "-default-device",
    "--generate-line-info",  # source lines in ncu; the machine code stays the same
    "--ptxas-options=-v",  # registers and spills of each entry point, into the log
)

Defines = tuple[tuple[str, int], ...]


class CudaError(SageCompileError, RuntimeError):
    """The driver could not load or launch a kernel; the message names it and gives the driver's reason."""


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: which attribute, and a union of 64 bytes of which an int is used here."""

    _fields_ = (("id", c_int), ("pad", c_char * 4), ("value", c_int), ("rest", c_char * 60))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((name, c_uint) for name in ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ")),
        ("sharedMemBytes", c_uint),
        ("hStream", c_void_p),
        ("attrs", c_void_p),
        ("numAttrs", c_uint),
    )


class Kernel:
    """One entry point, loaded on one device. Loading is not for a CUDA graph's capture; launching is."""

    registers: int
    """Of each thread."""
    local_bytes: int
    """Of each thread, in the device's memory: what spilled, and arrays that are not in registers."""
    shared_bytes: int
    """Of each block, static and dynamic."""
    threads: int
    """Of each block."""
    dynamic_shared_bytes: int

    def __init__(self, cubin: bytes, entry: str, *, threads: int, shared_bytes: int, device: int) -> None:
        """A block has this many threads and bytes of dynamic shared memory; CudaError where the driver refuses."""
        driver, module = _driver(), c_void_p()
        self._arguments = _Arguments(threads, shared_bytes, device)
        self.threads, self.dynamic_shared_bytes = threads, shared_bytes
        self._function = c_void_p()
        self._launch = driver.cuLaunchKernelEx
        self._name = f"kernel {entry} on cuda:{device}, {threads} threads, {shared_bytes} bytes of shared memory"
        _check(driver.cuModuleLoadData(byref(module), cubin), self._name)
        _check(driver.cuModuleGetFunction(byref(self._function), module, entry.encode()), self._name)
        # 8: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 48 KiB unless set
        _check(driver.cuFuncSetAttribute(self._function, 8, shared_bytes), self._name)
        self.shared_bytes = self._attribute(1) + shared_bytes
        self.local_bytes = self._attribute(3)
        self.registers = self._attribute(4)

    @property
    def function(self) -> int:
        """CUDA's handle."""
        assert self._function.value is not None
        return self._function.value

    def _attribute(self, number: int) -> int:
        """By its number in CUfunction_attribute of cuda.h."""
        value = c_int()
        _check(_driver().cuFuncGetAttribute(byref(value), number, self._function), self._name)
        return value.value

    def __call__(
        self,
        grid: int | tuple[int, int, int],
        parameters: ctypes.Structure,
        stream: int,
        *,
        overlap: bool = False,
    ) -> None:
        """Launch this many blocks on a stream's handle, with the kernel's device current; no blocks is no launch.

        overlap: start while the stream's kernel before is still running (programmatic dependent launch). The kernel
        must then wait by `griddepcontrol.wait` before it reads what the one before writes, or writes what it uses.
        """
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
        if x == 0 or y == 0 or z == 0:
            return
        arguments = self._arguments
        config = arguments.config
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
        config.hStream, config.numAttrs = stream, overlap
        arguments.pointers[0] = addressof(parameters)
        result = self._launch(arguments.config_address, self._function, arguments.pointers_address, None)
        if result != 0:
            _check(result, f"{self._name}, grid {(x, y, z)}")


class _Arguments(threading.local):
    """cuLaunchKernelEx's arguments, each thread's own, because ctypes lets other threads run during the call."""

    def __init__(self, threads: int, shared_bytes: int, device: int) -> None:
        """Python calls it again in each thread that launches; a thread new to CUDA gets the context that torch uses."""
        driver, context, handle = _driver(), c_void_p(), c_int()
        _check(driver.cuCtxGetCurrent(byref(context)), "CUDA's context")
        if context.value is None:
            _check(driver.cuDeviceGet(byref(handle), device), f"cuda:{device}")
            _check(driver.cuDevicePrimaryCtxRetain(byref(context), handle), f"cuda:{device}")
            _check(driver.cuCtxSetCurrent(context), f"cuda:{device}")
        self.overlap = LaunchAttribute(id=6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self.config = LaunchConfig(1, 1, 1, threads, 1, 1, shared_bytes, None, addressof(self.overlap), 0)
        self.config_address = addressof(self.config)
        self.pointers = (c_void_p * 1)()
        self.pointers_address = addressof(self.pointers)


class Source(NamedTuple):
    """What a kernel is made of; the same always makes the same."""

    file: str
    """A .cu file of this folder."""
    entry: str
    defines: Defines
    threads: int
    shared_bytes: int


_compiling: dict[tuple[str, Defines], Future[bytes]] = {}
_lock = threading.Lock()


def begin(source: Source) -> Future[bytes]:
    """Compile in a thread what `kernel` will be asked for, while others are compiled, too, or Triton is at work.

    UnsupportedError without NVRTC.
    """
    _version()
    what = source.file, source.defines
    with _lock:
        known = _compiling.get(what)
        if known is None or (known.done() and known.exception() is not None):  # what failed is tried again
            known = _compiling[what] = in_background(compile_cubin, *what)
        return known


@cache
def kernel(source: Source, device: int) -> Kernel:
    """Compiled and loaded once in each process; errors as its parts'."""
    cubin = begin(source).result()
    return Kernel(cubin, source.entry, threads=source.threads, shared_bytes=source.shared_bytes, device=device)


def compile_cubin(source: str, defines: Defines) -> bytes:
    """A .cu file of this folder as machine code (ELF) for compute capability 9.0, compiled or from disk; needs no GPU.

    UnsupportedError without NVRTC, or with the compiler's first complaint; its whole log goes to the debug log.
    """
    text = (FOLDER / source).read_bytes()
    headers = {file.name: file.read_bytes() for file in sorted(FOLDER.glob("*.cuh"))}
    options = [*OPTIONS, *(f"-D{name}={value:d}" for name, value in defines)]
    key = hashlib.sha256(repr((source, text, headers, options, _version())).encode()).hexdigest()[:20]

    def build() -> bytes:
        logger.info("compiling %s with %s, once and in seconds", source, " ".join(options))
        return _compile(source, text, headers, options)

    return files.built("cubins", f"{Path(source).stem}_{key}.cubin", build).content


def _compile(source: str, text: bytes, headers: dict[str, bytes], options: list[str]) -> bytes:
    """NVRTC's own steps; a step that fails makes the next ones fail, so only compiling is checked."""
    nvrtc, program = _nvrtc(), c_void_p()
    included = _strings(headers.values()), _strings(map(str.encode, headers))
    nvrtc.nvrtcCreateProgram(byref(program), text, source.encode(), len(headers), *included)
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), _strings(map(str.encode, options)))
        # Two C strings, of the front end and of ptxas.
        logs = _output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).split(b"\0")
        log = "\n".join(part.decode(errors="replace") for part in logs).strip()
        logger.debug("NVRTC's log of %s:\n%s", source, log)
        if result != 0:
            complaints = [line.strip() for line in log.splitlines() if "error" in line or "fatal" in line]
            reason = complaints[0] if complaints else f"NVRTC error {result}"
            raise UnsupportedError(f"cannot compile {source}: {reason}")
        return _output(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _strings(values: Iterable[bytes]) -> ctypes.Array[c_char_p]:
    listed = list(values)
    return (c_char_p * len(listed))(*listed)


def _output(size: Callable[..., int], get: Callable[..., int], program: c_void_p) -> bytes:
    """What a pair of NVRTC's functions gives: how long it is, and its bytes."""
    length = c_size_t()
    size(program, byref(length))
    buffer = ctypes.create_string_buffer(length.value)
    get(program, buffer)
    return buffer.raw


@cache
def _version() -> tuple[int, int]:
    major, minor = c_int(), c_int()
    _nvrtc().nvrtcVersion(byref(major), byref(minor))
    return major.value, minor.value


@cache
def _nvrtc() -> Any:
    """Of torch's CUDA: loaded by torch or found by the system, else pip's package, else by NVIDIA's own search."""
    if torch.version.cuda is None:
        raise UnsupportedError(f"torch {torch.__version__} is built without CUDA, whose NVRTC compiles the kernels")
    soname = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    with suppress(OSError):
        return ctypes.CDLL(soname)
    packages = find_spec("nvidia")  # a namespace package: nvidia/cu13/lib, or nvidia/cuda_nvrtc/lib for CUDA 12
    folders = (packages.submodule_search_locations if packages else None) or ()
    found = [str(file) for folder in folders for file in Path(folder).glob(f"*/lib/{soname}")]
    with suppress(ImportError, RuntimeError):  # RuntimeError: it found none
        found = found or [import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc").abs_path]
    if not found:
        raise UnsupportedError(f"no {soname}: pip install the nvidia-cuda-nvrtc of CUDA {torch.version.cuda}")
    for builtins in Path(found[0]).parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC asks for it by its plain name, which finds only what is loaded
    return ctypes.CDLL(found[0])


@cache
def _driver() -> Any:
    """The NVIDIA driver, initialised; where that fails, the calls that follow say so."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        raise UnsupportedError(f"no NVIDIA driver: {error}") from error
    driver.cuLaunchKernelEx.argtypes = (c_void_p,) * 4
    driver.cuInit(0)
    return driver


def tells_parameters() -> bool:
    """Whether there is a driver that has `parameter_sizes`: of CUDA 12.4 or newer."""
    try:
        return hasattr(_driver(), "cuFuncGetParamInfo")
    except UnsupportedError:
        return False


def parameter_sizes(function: int) -> list[int]:
    """In bytes, of what a kernel of anybody's takes, by CUDA's handle of it; AttributeError before CUDA 12.4."""
    sizes: list[int] = []
    offset, size = c_size_t(), c_size_t()
    ask = _driver().cuFuncGetParamInfo
    while ask(c_void_p(function), c_size_t(len(sizes)), byref(offset), byref(size)) == 0:
        sizes.append(size.value)
    return sizes


def _check(result: int, what: str) -> None:
    """CudaError unless the driver's result is 0."""
    if result != 0:
        text = c_char_p()
        _driver().cuGetErrorString(result, byref(text))
        raise CudaError(f"{what}: {(text.value or b'unknown error').decode()} (CUDA error {result})")
