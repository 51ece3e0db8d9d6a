"""Who asked for our backend, by vLLM's config, and what vLLM's CPU_ATTN is then.

In: the config of a server. Out: whether it says CUSTOM, and `CpuAttention`, the class that vLLM finds as CPU_ATTN. On a
CPU vLLM takes CPU_ATTN whatever is chosen, so CUSTOM can be honoured there only where that name is looked up: with
CUSTOM in the config it is our backend, and otherwise vLLM's own class, with nothing of ours in between or imported.
"""

from __future__ import annotations

from typing import Any

from .plugin import BACKEND
from .versions import known_names

with known_names():
    from vllm.config import VllmConfig, get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    CUSTOM, CPU_ATTN = AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN


def is_custom(config: VllmConfig | None) -> bool:
    """Whether the server was started with --attention-backend CUSTOM, and it is ours."""
    attention = getattr(config, "attention_config", None)
    return bool(getattr(attention, "backend", None) == CUSTOM and CUSTOM.get_path() == BACKEND)


def __getattr__(name: str) -> Any:
    """`CpuAttention`, which is chosen anew for each config that vLLM builds a model with."""
    if name != "CpuAttention":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if is_custom(get_current_vllm_config_or_none()):
        from .backend import Backend

        return Backend
    return resolve_obj_by_qualname(CPU_ATTN.value)
