"""The user's own C++ compiler, for what of us is C++: each library is built once for each source and command.

In: a source file and flags. Out: the library's path, or UnsupportedError with the reason why there is none. What needs
torch's headers takes several seconds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir

from sagecompile.errors import UnsupportedError

logger = logging.getLogger("sagecompile")

FLAGS = ("-std=c++17", "-fPIC", "-shared")
TORCH = Path(torch.__file__).parent
WITH_TORCH = (
    "-O2",
    "-DNDEBUG",
    f'-DTORCH="{torch.__version__}"',  # another torch needs another library
    f"-I{TORCH / 'include'}",
    f"-L{TORCH / 'lib'}",
    "-ltorch_cpu",
    "-lc10",
)
"""For what uses torch's headers."""


def why_none() -> str | None:
    """Why there is no compiler, or None if there is one: that which Inductor would use."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"no C++ compiler (CXX is {os.environ.get('CXX', 'not set')}): needs g++ or clang++, as Inductor does"
    return None


def library(source: Path, what: str, flags: Sequence[str]) -> Path:
    """Compiled now, or found where an earlier process left it; `what` it is, for the log."""
    reason = why_none()
    if reason is not None:
        raise UnsupportedError(reason)
    command = [get_cpp_compiler(), *FLAGS, str(source), *flags]
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    except subprocess.SubprocessError as error:
        raise UnsupportedError(f"{command[0]} --version failed: {error}") from error
    key = hashlib.sha256(b"\0".join([source.read_bytes(), version, *map(str.encode, command)])).hexdigest()[:20]
    found = Path(cache_dir(), "sagecompile", f"{source.stem}_{key}.so")
    if found.exists():
        return found
    found.parent.mkdir(parents=True, exist_ok=True)
    logger.info("building %s with %s, once and in seconds: %s", what, command[0], found)
    # Built beside its place and then renamed, so that no process ever sees half a library.
    with tempfile.TemporaryDirectory(dir=found.parent) as beside:
        built = Path(beside, found.name)
        result = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if result.returncode != 0:
            raise UnsupportedError(f"{' '.join(command)} failed: {result.stderr.strip()[-2000:]}")
        built.replace(found)
    return found
