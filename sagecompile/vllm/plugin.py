"""vLLM's plugin, which it runs in each of its processes: after it, vLLM knows our backend as CUSTOM, by its name.

In: nothing. Out: nothing. A server that does not ask for us runs as without us, with vLLM's own classes and not a line
in its log, and so does one whose vLLM has other names than we know. Nothing that does attention is imported here.
"""

from __future__ import annotations

import logging
from functools import cache

from sagecompile.errors import UnsupportedError

from .versions import known_names, own_backend

logger = logging.getLogger("vllm.sagecompile")
BACKEND = "sagecompile.vllm.backend.Backend"
CPU_ATTENTION = "sagecompile.vllm.asked.CpuAttention"
"""Looked up by vLLM when it chooses a backend, and imported then."""


@cache
def register() -> None:
    """Once a process."""
    try:
        _register()
    except UnsupportedError as error:  # whoever asks for us in such a vLLM gets it as an error
        logger.debug("sagecompile: %s", error)


def _register() -> None:
    with known_names():
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        custom, cpu_attn = AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN
    if custom.is_overridden():
        logger.debug("sagecompile: CUSTOM is %s already, and stays it", custom.get_path())
        return
    register_backend(custom, BACKEND)
    if current_platform.is_cpu() and not cpu_attn.is_overridden():
        from . import asked  # noqa: F401  (what it needs of vLLM is there, or nothing is registered)

        register_backend(cpu_attn, CPU_ATTENTION)


@cache
def take_place() -> None:
    """Register our backend in the place of the platform's own, for the pass. Raises UnsupportedError if it has none."""
    with known_names():
        from vllm.v1.attention.backends.registry import register_backend
    register_backend(own_backend(), BACKEND)
