"""The fingerprint of this package, for every cache that outlives a process.

In: the source files as installed. Out: one hash of all, so that nothing compiled or measured with others is served.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")


@cache
def source_hash() -> str:
    """Of every source file, those of `passes` too, which an editable install has elsewhere."""
    digest = hashlib.sha256()
    passes = find_spec("sagecompile.passes")
    assert passes is not None and passes.submodule_search_locations is not None
    for root in (Path(__file__).parent, *map(Path, passes.submodule_search_locations)):
        for file in sorted(file for file in root.rglob("*") if file.suffix in SUFFIXES):
            digest.update(file.read_bytes())
    return f"sagecompile-{digest.hexdigest()}"
