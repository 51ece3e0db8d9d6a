"""Write the graphs before and after the rewrite, and what Dynamo made of the model, as Python that can be read.

In: a folder, for as long as `dumping(folder)` lasts. Out: `graph_0.before.py` and `graph_0.after.py` for each graph,
and depyf's files beside them: the decompiled model with its guards (`full_code_for_*.py`) and each compiler stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import GraphModule

_folder: ContextVar[Path | None] = ContextVar("sagecompile_dump_folder", default=None)


@contextmanager
def dumping(folder: Path) -> Iterator[None]:
    """Dump every graph that is compiled inside the `with`. depyf patches torch's internals for that time."""
    import depyf

    folder.mkdir(parents=True, exist_ok=True)
    token = _folder.set(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*trying to debug `torch.compile`.*")
            with depyf.prepare_debug(str(folder)):
                yield
    finally:
        _folder.reset(token)


def dump(gm: GraphModule, stage: str) -> None:
    """Write `gm` as the next graph's `stage` (`before` or `after`), if a folder is set."""
    folder = _folder.get()
    if folder is not None:
        index = len(list(folder.glob(f"graph_*.{stage}.py")))
        text = gm.print_readable(print_output=False, include_device=True)
        (folder / f"graph_{index}.{stage}.py").write_text(text + "\n")
