"""vLLM's plugin, which it runs in each of its processes: after it, vLLM knows our backend and our op.

In: nothing. Out: nothing; the backend under CUSTOM and in its parent's place, the op in torch.ops. What is compiled and
cached by one process can so be loaded by the next. A server that does not ask for us runs as without us.
"""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("vllm.sagecompile")


@cache
def register() -> None:
    """Once a process; where vLLM is not as we know it, a line in the log and nothing else."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from . import versions

        own = versions.own_backend()
        if own is None:
            logger.info("sagecompile: nothing for this platform; CUDA and CPU have our kernels")
            return
        from . import backend, op
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning("sagecompile: this version of vLLM is not known (%s); 0.20.2 and 0.32 are", error)
        return
    assert op.OURS is not None
    for name in (AttentionBackendEnum.CUSTOM, own):
        register_backend(name, f"{backend.__name__}.{backend.Backend.__name__}")
