"""What was measured on this machine, kept between processes.

In: a key, plain JSON values that say what was measured on what. Out: what was found then, or nothing. One small file a
key, so that any number of processes may read and write at the same time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sagecompile import files
from sagecompile.errors import UnsupportedError

T = TypeVar("T")

SCHEMA = 4
_known: dict[str, dict[str, Any]] = {}
"""Of this process, by file: a folder that cannot be used costs one measurement a process, not one a compilation."""


def forget() -> None:
    """Everything that any process remembered."""
    _known.clear()
    for file in files.of_kind("measured"):
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
    text = files.read(file)
    if text is None:
        return None
    try:
        stored = json.loads(text)
        if not isinstance(stored, dict) or not isinstance(stored["found"], dict):
            raise ValueError("no measurement in it")
        if stored.get("schema") != SCHEMA:
            raise ValueError(f"schema {stored.get('schema')}: this version reads {SCHEMA}")
        if stored.get("key") != dict(key):
            raise ValueError("it is of something else")
        found = read(stored["found"])
    except (ValueError, KeyError, TypeError) as error:
        files.set_aside(file, f"no measurement ({error})")
        return None
    _known[str(file)] = stored["found"]
    return found


def remember(key: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Keep what was found, for this process in any case."""
    file = _file(key)
    _known[str(file)] = found
    text = json.dumps({"schema": SCHEMA, "key": dict(key), "found": found}, indent=1)
    try:
        files.write(file, text.encode())
    except (OSError, UnsupportedError) as error:
        why = getattr(error, "strerror", None) or error
        files.warn_once(f"measurements cannot be kept in {file.parent} ({why}): every process measures again")


def count(facts: Mapping[str, Any], without: Collection[str] = ()) -> int:
    """How many measurements hold for these facts, which are parts of their keys; `without`: what no part may be."""
    found = 0
    for file in files.of_kind("measured"):
        try:
            stored = json.loads(files.read(file) or b"")
            key = stored["key"] if stored["schema"] == SCHEMA else {}
            is_of = all(name in key and key[name] == value for name, value in facts.items())
            found += is_of and not any(name in key for name in without)
        except (ValueError, KeyError, TypeError):  # it is set aside when it is asked for
            continue
    return found


def _file(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return files.folder("measured") / f"{digest[:24]}.json"
