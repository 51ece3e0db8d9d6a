"""`sagecompile.vllm_pass`, as vLLM finds it: `__import__("sagecompile").__dict__["vllm_pass"]`, so it must be there.

In: vLLM asking whether it is an InductorPass, or using it as one. Out: graph_pass.GraphPass, which only then is
imported, so that `import sagecompile` needs neither torch nor vLLM. Pickled and copied, it is that pass itself.
"""

from __future__ import annotations

from typing import Any


def _load() -> Any:
    from .graph_pass import graph_pass

    return graph_pass()


def _seen_as() -> type[Any]:
    """Tools that look at every object of a module ask where there is no vLLM, too: then it is a LazyPass."""
    try:
        return type(_load())
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "vllm"):
            raise
        return LazyPass


class LazyPass:
    """Stands for `graph_pass.graph_pass()`: of its class, as isinstance sees it, and with its methods."""

    __class__ = property(lambda self: _seen_as())

    def __call__(self, graph: Any) -> None:
        _load()(graph)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what tools ask of any object is no reason to import vLLM
            raise AttributeError(name)
        return getattr(_load(), name)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _load, ()


vllm_pass = LazyPass()
