"""The kernels behind the op: one module a provider, which its row in formats.py names, imported when first asked for.

In: a provider's name. Out: its module, its launcher. Who is there and can run what is found out in `available`, in that
one place.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from sagecompile.formats import PROVIDERS


def module(provider: str) -> ModuleType:
    """Raises ImportError where a package is missing that it needs."""
    return import_module(PROVIDERS[provider].module)


def launcher(provider: str) -> Callable[..., None]:
    """`attention(call, out, *, format)` of a provider: writes all of `out`, which is like the call's q.

    It gets no prologue and no `ahead` but 0 where its row in formats.py does not say that it has them. One that knows
    how many rows it computes exactly counts them under the name of the call's site, see counts.py.
    """
    launch: Callable[..., None] = module(provider).attention
    return launch
