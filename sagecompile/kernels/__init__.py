"""The kernels behind the op: one module a provider, imported when first asked for.

In: a provider's name. Out: its launcher. Who is there and can run what is found out in `available`, in that one place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module


@cache
def launcher(provider: str) -> Callable[..., None]:
    """`attention(q, k, v, out, *, scale, is_causal, format, site="")` of a provider that has kernels of its own.

    One that knows how many rows it computes exactly counts them under the name `site`, see counts.py.

    One that says `prologues` in `formats.py` also takes `q_prologue` and `k_prologue`, each a `Prologue` or None; one
    that says `causal_offset` also takes that.
    """
    launch: Callable[..., None] = import_module(f"{__name__}.{provider}").attention
    return launch
