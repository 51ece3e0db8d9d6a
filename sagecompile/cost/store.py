"""What was measured on this machine, kept between processes in the user's cache folder.

In: a key, plain JSON values that say what was measured on what. Out: what was found then, or nothing. One small file a
key, written beside its place and then renamed, so that any number of processes may read and write at the same time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger("sagecompile")

T = TypeVar("T")

SCHEMA = 4
_known: dict[str, dict[str, Any]] = {}
"""Of this process, by file: a folder that cannot be used costs one measurement a process, not one a compilation."""


def folder() -> Path:
    """`$XDG_CACHE_HOME/sagecompile/measured`, or ~/.cache for the first part; a temporary one without a home.

    A relative $XDG_CACHE_HOME is as none, as its specification says.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return Path(given if os.path.isabs(given) else Path.home() / ".cache", "sagecompile", "measured")
    except RuntimeError:
        return Path(tempfile.gettempdir(), "sagecompile", "measured")


def files(folder: Path) -> list[Path]:
    """The JSON files in a folder; none where it is not there, or not for us."""
    try:
        return sorted(folder.glob("*.json"))
    except OSError:
        return []


def forget() -> None:
    """Everything that any process remembered."""
    _known.clear()
    for file in files(folder()):
        file.unlink(missing_ok=True)


def positive(number: Any) -> float:
    """As JSON has it; ValueError or TypeError where it is none."""
    found = float(number)
    if not 0 < found < math.inf:
        raise ValueError(f"{found} where a positive number belongs")
    return found


def recall(key: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> T | None:
    """What was remembered under this key, as `read` makes it.

    A file of another schema or with anything else in it, on which that raises ValueError, KeyError or TypeError, is set
    aside and named.
    """
    file = _file(key)
    if str(file) in _known:
        return read(_known[str(file)])
    try:
        stored = json.loads(file.read_text())
        if not isinstance(stored, dict) or not isinstance(stored["found"], dict):
            raise ValueError("no measurement in it")
        if stored.get("schema") != SCHEMA:
            raise ValueError(f"schema {stored.get('schema')}: this version reads {SCHEMA}")
        if stored.get("key") != dict(key):
            raise ValueError("it is of something else")
        found = read(stored["found"])
    except OSError:  # not there, or not for us
        return None
    except (ValueError, KeyError, TypeError) as error:
        _set_aside(file, error)
        return None
    _known[str(file)] = stored["found"]
    return found


def remember(key: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Keep what was found, for this process in any case."""
    file = _file(key)
    _known[str(file)] = found
    text = json.dumps({"schema": SCHEMA, "key": dict(key), "found": found}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as beside:
            Path(beside, file.name).write_text(text)
            Path(beside, file.name).replace(file)
    except OSError as error:
        _warn_once(f"measurements cannot be kept in {file.parent} ({error.strerror}): every process measures again")


def why_not() -> str | None:
    """Why nothing could be kept, as far as permissions tell, or None."""
    place = folder()
    while not os.path.exists(place):  # unlike Path.exists, False where one may not look
        place = place.parent
    return None if place.is_dir() and os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written to"


def count(facts: Mapping[str, Any], without: Collection[str] = ()) -> int:
    """How many measurements hold for these facts, which are parts of their keys; `without`: what no part may be."""
    found = 0
    for file in files(folder()):
        try:
            stored = json.loads(file.read_text())
            key = stored["key"] if stored["schema"] == SCHEMA else {}
            is_of = all(name in key and key[name] == value for name, value in facts.items())
            found += is_of and not any(name in key for name in without)
        except (OSError, ValueError, KeyError, TypeError):  # it is set aside when it is asked for
            continue
    return found


def _file(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return folder() / f"{digest[:24]}.json"


def _set_aside(file: Path, error: Exception) -> None:
    aside = file.with_suffix(".bad")
    try:
        file.replace(aside)
    except OSError:  # another process was faster, or the folder is read-only
        return
    logger.warning("%s is no measurement (%s): set aside as %s", file, error, aside.name)


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)
