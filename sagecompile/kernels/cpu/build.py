"""Build the C++ kernel with the user's own compiler, once for each source and kind of CPU, and the ops that call it.

In: the compiler that Inductor would use, and what /proc/cpuinfo says of this CPU. Out: the library's one function, or
the reason why there is none. It is plain C++ without torch's headers, so that it builds in seconds; the ops have them.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache, partial
from pathlib import Path
from typing import Any

from sagecompile.errors import UnsupportedError
from sagecompile.kernels import compiler, counts
from sagecompile.kernels.counts import Counts

SOURCE, OPS = (Path(__file__).with_name(name) for name in ("attention.cpp", "ops.cpp"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("masks.h", "tensors.h"))
"""Of SOURCE."""
CPUINFO = Path("/proc/cpuinfo")

NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma")
"""What the kernel is written for, by Linux's names: Intel since Cascade Lake and Ice Lake, AMD since Zen 4."""
USED_WHERE_THERE = ("avx512_bf16",)
"""Without it PV is computed in float32."""

FLAGS = ("-O3", "-fopenmp")


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
    return compiler.why_none()


@cache
def function(*extra_flags: str, bf16: bool = True) -> Any:
    """The kernel as a ctypes function, which releases the GIL; UnsupportedError where it cannot be had.

    It counts exact rows by itself, where `counts` reads them.
    """
    reason = why_not()
    if reason is not None:
        raise UnsupportedError(reason)
    used = [*NEEDED, *(name for name in USED_WHERE_THERE if bf16 and name in features())]
    machine = [f"-m{name.replace('_', '')}" for name in used]
    built = compiler.library(SOURCE, "the CPU attention kernel", [*FLAGS, *machine, *extra_flags], HEADERS)
    library = ctypes.CDLL(str(built))
    attention: Any = library.sagecompile_attention
    attention.argtypes = (*[ctypes.c_void_p] * 2, ctypes.c_float, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64)
    counts.of_libraries[str(built)] = partial(_counted, library)
    return attention


_EACH = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_int64] * 3)


def _counted(library: ctypes.CDLL) -> dict[str, Counts]:
    found: dict[str, Counts] = {}

    def each(site: bytes, *numbers: int) -> None:
        found[site.decode()] = Counts(*numbers)

    library.sagecompile_counts(_EACH(each))
    return found


def _register_ops(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.sagecompile_kernel.argtypes = (ctypes.c_void_p,)
    library.sagecompile_kernel(ctypes.cast(function(), ctypes.c_void_p))
    return library


OPS_LIBRARY = compiler.Background(
    lambda: compiler.library(OPS, "the CPU's ops", compiler.WITH_TORCH),
    _register_ops,
    "each attention of a CPU takes 35 to 85 us longer, as Python calls its kernel",
)
"""Once it is loaded torch's ops call the kernel themselves."""
