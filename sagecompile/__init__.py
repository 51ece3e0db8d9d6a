"""Faster attention for PyTorch models, nothing else changed: `torch.compile(model, backend="sage_inductor")`.

Importing this loads no torch: the backend is found by torch through an entry point, and `explain` is loaded when used.
`vllm_pass` stands here by its name because vLLM looks for it in this module's dict.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .vllm.lazy_pass import vllm_pass

if TYPE_CHECKING:
    from .backend import explain, sage_inductor
    from .counters import exact_rows
    from .errors import OptionError, SageCompileError, UnsupportedError
    from .report import Report

__all__ = [
    "OptionError",
    "Report",
    "SageCompileError",
    "UnsupportedError",
    "__version__",
    "exact_rows",
    "explain",
    "sage_inductor",
    "vllm_pass",
]

__version__ = "0.1.0"

_HOMES = {
    "OptionError": "errors",
    "Report": "report",
    "SageCompileError": "errors",
    "UnsupportedError": "errors",
    "exact_rows": "counters",
    "explain": "backend",
    "sage_inductor": "backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
