"""Build the C++ kernel with the user's own compiler, once for each source and kind of CPU.

In: the compiler that Inductor would use, and what /proc/cpuinfo says of this CPU. Out: the library's one function, or
the reason why there is none. It is plain C++ without torch's headers, so that it builds in seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir

from sagecompile.errors import UnsupportedError

logger = logging.getLogger("sagecompile")

SOURCE = Path(__file__).with_name("attention.cpp")
CPUINFO = Path("/proc/cpuinfo")

NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma")
"""What the kernel is written for, by Linux's names: Intel since Cascade Lake and Ice Lake, AMD since Zen 4."""
USED_WHERE_THERE = ("avx512_bf16",)
"""Without it PV is computed in float32."""

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp")


def features() -> frozenset[str]:
    """Of this CPU, as far as the operating system lets programs use them."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


@cache
def why_not() -> str | None:
    """Why this machine cannot run the kernel, or None if it can, as far as can be said without building it."""
    missing = [name for name in NEEDED if name not in features()]
    if missing:
        return f"CPU without {', '.join(missing)} ({platform.machine()} {platform.system()}): needs {', '.join(NEEDED)}"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"no C++ compiler (CXX is {os.environ.get('CXX', 'not set')}): needs g++ or clang++, as Inductor does"
    return None


@cache
def function(*extra_flags: str, bf16: bool = True) -> Any:
    """The kernel as a ctypes function, which releases the GIL; UnsupportedError where it cannot be had."""
    reason = why_not()
    if reason is not None:
        raise UnsupportedError(reason)
    used = [*NEEDED, *(name for name in USED_WHERE_THERE if bf16 and name in features())]
    machine = [f"-m{name.replace('_', '')}" for name in used]
    attention = ctypes.CDLL(str(_library([get_cpp_compiler(), *FLAGS, *machine, *extra_flags]))).sagecompile_attention
    attention.argtypes = (*[ctypes.c_void_p] * 5, ctypes.c_float, ctypes.c_void_p)
    return attention


def _library(command: list[str]) -> Path:
    """Compiled by `command`, or found where an earlier process left it."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, *map(str.encode, command)])).hexdigest()[:20]
    library = Path(cache_dir(), "sagecompile", f"attention_{key}.so")
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    logger.info("building the CPU attention kernel with %s, once and in seconds: %s", command[0], library)
    # Built beside its place and then renamed, so that no process ever sees half a library.
    with tempfile.TemporaryDirectory(dir=library.parent) as beside:
        built = Path(beside, library.name)
        result = subprocess.run([*command, str(SOURCE), "-o", str(built)], capture_output=True, text=True)
        if result.returncode != 0:
            raise UnsupportedError(f"{' '.join(command)} failed: {result.stderr.strip()[-2000:]}")
        built.replace(library)
    return library
