"""vLLM's plugin, which it runs in each of its processes: after it, vLLM knows our backend as CUSTOM.

In: nothing. Out: nothing. A server that does not ask for us runs as without us, and so does one of a version that is
not known, which the log says in one line.
"""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("vllm.sagecompile")
BACKEND = "sagecompile.vllm.backend.Backend"


@cache
def register() -> None:
    """Once a process."""
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        logger.warning("sagecompile: this version of vLLM is not known (%s); 0.20.2 and 0.32 are", error)
        return
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if (
        current_platform.is_cpu()
    ):  # the only platform that does not ask for CUSTOM: it takes its own, whatever is chosen
        take_place()


@cache
def take_place() -> None:
    """Register our backend in the place of the platform's own, which it is built on: for the pass."""
    try:
        from vllm.v1.attention.backends.registry import register_backend

        from .backend import own
    except (ImportError, AttributeError) as error:
        logger.warning("sagecompile: nothing is made faster: this vLLM is not known (%s); 0.20.2 and 0.32 are", error)
        return
    register_backend(own, BACKEND)
