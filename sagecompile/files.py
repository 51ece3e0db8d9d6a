"""Every file we keep on disk: the one folder, who may read it, and the one way to write.

In: what was measured, calibrated, or built, as bytes under a kind and a name. Out: the same in a later process, unless
somebody else could have changed it. A library that is loaded is code that runs, so folders are 0700 and files 0600,
owner and mode are looked at before a file is used, none is ever seen half written, and nothing is unpickled.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
import platformdirs

from sagecompile.errors import UnsupportedError

logger = logging.getLogger("sagecompile")

Kind = Literal["measured", "profiles", "libraries", "cubins"]
"""Each has a folder of its own."""

BUILD_LIMIT_S = 120
"""Of one compiler, and of waiting for another process that builds the same: what needs torch's headers takes 5 to 10 s
alone on two cores, and a machine that is busy ten times over still gets it."""
NO_HOME = "this user has no home, so nothing is kept for later processes: set XDG_CACHE_HOME to a folder of your own"


def folder(kind: Kind) -> Path:
    """Where files of a kind are: `$XDG_CACHE_HOME/sagecompile/measured`, with ~/.cache for the first part.

    It need not be there yet. A user without a home has a folder that ends with the process.
    """
    found = _of_the_user()
    if found is None:
        warn_once(NO_HOME)
        found = _of_this_process(os.getpid())
    return found / kind


def _of_the_user() -> Path | None:
    """None without a home. A relative $XDG_CACHE_HOME is as none, as its specification says."""
    try:
        found = platformdirs.user_cache_path("sagecompile", appauthor=False)
        if not found.is_absolute():  # what platformdirs before 4.12 makes of both
            found = Path.home() / ".cache" / "sagecompile"
    except RuntimeError:
        return None
    return found if found.is_absolute() else None


@cache
def _of_this_process(pid: int) -> Path:
    """With a name that nobody can know beforehand; a forked child makes one of its own."""
    made = Path(tempfile.mkdtemp(prefix="sagecompile-"))
    atexit.register(lambda: shutil.rmtree(made, ignore_errors=True) if os.getpid() == pid else None)
    return made


def why_not_kept(kind: Kind) -> str | None:
    """Why nothing could be kept for later processes, or None; this is tried, and only the folder is left of it."""
    if _of_the_user() is None:
        return NO_HOME
    place = folder(kind)
    try:
        _make(place)
        with tempfile.TemporaryFile(dir=place):
            return None
    except UnsupportedError as error:
        return str(error)
    except OSError as error:
        return f"{place} cannot be written to ({error.strerror}): set XDG_CACHE_HOME to a folder that can be"


def check(file: Path) -> None:
    """UnsupportedError unless the file, its folder and that of all kinds are this user's, and nobody else's to write.

    OSError where it is not there. Folders that others may read, as older versions made them, are closed to them.
    """
    for path in (file.parent.parent, file.parent, file):
        _check(path)


def _check(path: Path) -> None:
    """One of these alone."""
    if not hasattr(os, "getuid"):  # Windows, where a user's folders are the user's alone
        return
    found, user, seen = path.stat(), os.getuid(), ""
    others = {path.lstat().st_uid, found.st_uid} - {user}  # of a link, and of what it leads to
    if others:
        seen = f"belongs to user {others.pop()}, and this is user {user}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        seen = f"can be written to by others (mode {stat.S_IMODE(found.st_mode):04o})"
    if seen:
        raise UnsupportedError(
            f"{path} {seen}, so it is not used: remove it (rm -r {shlex.quote(str(path))}), "
            "or set XDG_CACHE_HOME to a folder that is yours alone"
        )
    if path.is_dir() and stat.S_IMODE(found.st_mode) != 0o700:
        with suppress(OSError):  # what cannot be changed is not written to, either
            path.chmod(0o700)


def _make(folder: Path) -> None:
    """With those above it, where they are not there; checked, all the same."""
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            path.mkdir(0o700, exist_ok=True)
    _check(folder.parent)
    _check(folder)


def read(file: Path) -> bytes | None:
    """What is in it; None where there is none, or where it may not be used, which is said once."""
    try:
        check(file)
        return file.read_bytes()
    except OSError:
        return None
    except UnsupportedError as error:
        warn_once(str(error))
        return None


def of_kind(kind: Kind) -> list[Path]:
    """Those in JSON; none where the folder is not there, or may not be used, which is said once."""
    place = folder(kind)
    try:
        _check(place.parent)
        _check(place)
        return sorted(place.glob("*.json"))
    except OSError:
        return []
    except UnsupportedError as error:
        warn_once(str(error))
        return []


def write(file: Path, content: bytes) -> None:
    """Beside its place and then renamed, so that no process ever sees half of it.

    OSError where it cannot be written, UnsupportedError where others could change it.
    """
    _make(file.parent)
    handle, beside = tempfile.mkstemp(dir=file.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as to:
            to.write(content)
        os.replace(beside, file)
    except BaseException:
        os.unlink(beside)
        raise


def set_aside(file: Path, why: str) -> None:
    """What is broken is seen once, and then out of the way."""
    aside = file.with_suffix(".bad")
    try:
        file.replace(aside)
    except OSError:  # another process was faster, or the folder is read-only
        return
    logger.warning("%s is %s: set aside as %s", file, why, aside.name)


class Built(NamedTuple):
    """A file that whoever loads ELF may be given."""

    path: Path
    """Of the content, and then its digest, where readers of ELF do not look."""
    content: bytes


def built(kind: Kind, name: str, build: Callable[[], bytes]) -> Built:
    """Found whole, or built now, by one process while the others wait for it.

    UnsupportedError where others could change it, or nothing can be written; also what `build` raises.
    """
    file = folder(kind) / name
    content = _whole(file)
    if content is not None:
        return Built(file, content)
    with _alone(file):
        content = _whole(file)  # another process may have been at it
        if content is not None:
            return Built(file, content)
        if file.exists():
            set_aside(file, "not whole")
        content = build()
        signed = content + hashlib.sha256(content).digest()
        try:
            write(file, signed)
        except OSError as error:
            why = f"what is built cannot be kept in {file.parent} ({error.strerror}), so every process builds it again"
            warn_once(f"{why}: set XDG_CACHE_HOME to a folder that can be written to")
            file = _of_this_process(os.getpid()) / kind / name
            try:
                write(file, signed)
            except OSError as error:
                raise UnsupportedError(f"{file} cannot be written ({error.strerror}): set TMPDIR") from error
    return Built(file, content)


def _whole(file: Path) -> bytes | None:
    """What was built; None where there is none, or its digest is not its own."""
    try:
        check(file)
        stored = file.read_bytes()
    except OSError:
        return None
    content, digest = stored[:-32], stored[-32:]
    return content if hashlib.sha256(content).digest() == digest else None


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Of all that build this file. Where that cannot be had each builds it, which takes time and breaks nothing."""
    lock = filelock.FileLock(f"{file}.lock", timeout=BUILD_LIMIT_S, mode=0o600)
    try:
        _make(file.parent)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # read-only, without locks, or another process takes too long
        logger.debug("%s is built without a lock: %s", file, error)
    try:
        yield
    finally:
        lock.release()


@cache
def warn_once(text: str) -> None:
    logger.warning(text)
