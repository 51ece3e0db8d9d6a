"""The user's own C++ compiler, for what of us is C++: each library is built once for each source and command.

In: a source file and flags. Out: the library's path, or UnsupportedError with the reason why there is none. What needs
torch's headers takes 5 to 9 seconds: `Background` has it built while Python does the same job more slowly.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from sagecompile import files
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


def library(source: Path, what: str, flags: Sequence[str], headers: Sequence[Path] = ()) -> Path:
    """Compiled now, or found where an earlier process left it; `what` it is, for the log; headers of our own."""
    reason = why_none()
    if reason is not None:
        raise UnsupportedError(reason)
    command = [get_cpp_compiler(), *FLAGS, str(source), *flags]
    version = _run([command[0], "--version"])
    text = [file.read_bytes() for file in (source, *headers)]
    key = hashlib.sha256(b"\0".join([*text, version, *map(str.encode, command)])).hexdigest()[:20]

    def build() -> bytes:
        logger.info("building %s with %s, once and in seconds", what, command[0])
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, source.stem)
            _run([*command, "-o", str(library)])
            return library.read_bytes()

    return files.built("libraries", f"{source.stem}_{key}.so", build).path


def _run(command: list[str]) -> bytes:
    """What a compiler prints; UnsupportedError with its complaint, or where it takes too long."""
    shown, limit = " ".join(command), files.BUILD_LIMIT_S
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"{shown} was stopped after {limit} s: see whether it ends, or set CXX") from error
    except OSError as error:
        raise UnsupportedError(f"{shown} cannot be run: {error}") from error
    if result.returncode != 0:
        raise UnsupportedError(f"{shown} failed: {result.stderr.decode(errors='replace').strip()[-2000:]}")
    return result.stdout


_threads = ThreadPoolExecutor(8, "sagecompile")
_begun: list[Future[Any]] = []
_libraries: list[Background] = []
T = TypeVar("T")
P = ParamSpec("P")


def in_background(job: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Future[T]:
    """Have a thread do it, as compilers run outside of Python; done at once where there can be no more threads."""
    try:
        begun = _threads.submit(job, *arguments, **named)
    except RuntimeError:  # the interpreter is about to end, or the system has too many
        begun = Future()
        try:
            begun.set_result(job(*arguments, **named))
        except Exception as error:  # kept for whoever asks for the result, as a thread does
            begun.set_exception(error)
    _begun.append(begun)
    return begun


def _after_fork() -> None:
    """A child has none of its parent's threads, and what they were at is begun again."""
    global _threads
    _threads = ThreadPoolExecutor(8, "sagecompile")
    _begun.clear()
    for library in _libraries:
        library.forget_what_is_unfinished()


os.register_at_fork(after_in_child=_after_fork)


def settle() -> None:
    """Wait for all that was begun, so that calls from now on are all alike."""
    wait(_begun)
    for library in _libraries:
        library.load_if_built()


class Background:
    """A library that is built in the background from when it is first asked for, and then loaded, once."""

    def __init__(self, build: Callable[[], Path], load: Callable[[Path], Any], without: str) -> None:
        """`without`: what it is like without it, for the log, in front of the reason why there is none."""
        self._build, self._load, self._without = build, load, without
        self._lock = threading.Lock()
        self._building: Future[Path] | None = None
        self._loaded: Any = None
        self._is_settled = False
        _libraries.append(self)

    def now(self) -> Any:
        """What `load` returned; None while it is being built, and where it cannot be had, which is said."""
        if not self._is_settled:
            with self._lock:
                self._building = self._building or in_background(self._build)
            self.load_if_built()
        return self._loaded

    def forget_what_is_unfinished(self) -> None:
        """In a child of the process that built it."""
        self._lock = threading.Lock()
        if self._building is not None and not self._building.done():
            self._building = None

    def load_if_built(self) -> None:
        """Nothing where nobody has asked for it."""
        with self._lock:
            if self._is_settled or self._building is None or not self._building.done():
                return
            try:
                self._loaded = self._load(self._building.result())
            except (UnsupportedError, OSError, AttributeError) as error:
                logger.warning("%s: %s", self._without, error)
            self._is_settled = True
