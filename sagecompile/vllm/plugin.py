"""vLLM's plugin, which it runs in each of its processes: after it, vLLM knows our backend as CUSTOM.

In: nothing. Out: nothing. A server that does not ask for us runs as without us, and so does one of a version that is
not known, which the log says in one line.
"""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("vllm.sagecompile")
BACKEND = "sagecompile.vllm.backend.Backend"
"""By its name: what it is built on is imported when vLLM chooses a backend, and not before."""


@cache
def register() -> None:
    """Once a process."""
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        if AttentionBackendEnum.CUSTOM.is_overridden():
            logger.warning("sagecompile: CUSTOM is %s already, and stays it", AttentionBackendEnum.CUSTOM.get_path())
        else:
            register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
        if current_platform.is_cpu():  # where vLLM takes its own whatever is chosen: so ours is in its place
            from . import backend  # noqa: F401  (what fails, fails here)

            take_place()
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        logger.warning("sagecompile: this version of vLLM is not known (%s); 0.20.2 and 0.32 are", what)


@cache
def take_place() -> None:
    """Register our backend in the place of the platform's own, for the pass. Raises UnsupportedError if it has none."""
    from vllm.v1.attention.backends.registry import register_backend

    from .versions import own_backend

    register_backend(own_backend(), BACKEND)
