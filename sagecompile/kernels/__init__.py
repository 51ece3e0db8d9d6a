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
    """`attention(q, k, v, out, *, scale, is_causal, format, site="")` of a provider.

    One that knows how many rows it computes exactly counts them under the name `site`, see counts.py.

    One that says `prologues` in `formats.py` also takes `q_prologue` and `k_prologue`, each a `Prologue` or None; one
    that says `causal_offset` also takes that.
    """
    launch: Callable[..., None] = module(provider).attention
    return launch
