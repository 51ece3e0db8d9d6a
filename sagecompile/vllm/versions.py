"""What differs between platforms and versions of vLLM: 0.20.2 (CUDA) and 0.32 (CPU) were tried.

In: vLLM as it is installed. Out: the platform's backend to build on, the pages of a KV cache as (pages, tokens a page,
KV heads, head_dim), names that only some versions have, and the error where one is missing that we need. Importing this
imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sagecompile.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

TRIED = "0.20.2 and 0.32"


class Index(NamedTuple):
    """The same indices for tensors on the host and on the device, so that neither waits for the other."""

    host: torch.Tensor
    device: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, device: torch.device) -> Index:
        """Copied without waiting: from pinned memory, to a GPU."""
        on_gpu = device.type == "cuda"
        return cls(values, (values.pin_memory() if on_gpu else values).to(device, non_blocking=True))


PER_REQUEST = (
    "seq_lens",
    "block_table_tensor",
    "seq_lens_cpu_upper_bound",
    "is_prefilling",
    "_seq_lens_cpu",
    "_num_computed_tokens_cpu",
)
PER_TOKEN = ("slot_mapping", "positions")
CACHES = ("_num_computed_tokens_cache", "_token_to_req_indices_cache")
UNKNOWN = ("encoder_seq_lens", "dcp_local_seq_lens", "rswa_prefix_lens", "mm_req_doc_ranges")
"""Of CommonAttentionMetadata: what a batch with any of these is made of we do not know."""


@contextmanager
def known_names() -> Iterator[None]:
    """Around vLLM's names as they are imported, and nothing of ours: UnsupportedError where vLLM has others."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            raise  # there is none
        what = f"{type(error).__name__}: {error}"
        raise UnsupportedError(f"this version of vLLM is not known ({what}); {TRIED} are") from error


def eager_break_during_capture(function: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's decorator of that name; before 0.3x there are no CUDA graphs with breaks in them."""
    try:
        from vllm.compilation.breakable_cudagraph import eager_break_during_capture as vllms
    except ImportError:
        return function
    decorated: Callable[..., Any] = vllms(function)
    return decorated


def own_backend() -> AttentionBackendEnum:
    """The one that this platform uses by itself and that ours is built on."""
    with known_names():
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    if current_platform.is_cpu():
        return AttentionBackendEnum.CPU_ATTN
    if current_platform.is_cuda():
        return AttentionBackendEnum.FLASH_ATTN
    raise UnsupportedError(f"{current_platform.device_name}: sagecompile needs CUDA or a CPU; leave its pass out")


def pages(layer: Any, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the cached K and V, each (pages, tokens a page, KV heads, head_dim)."""
    if kv_cache.dim() == 5:  # 0.20.2 on CUDA: (2, pages, tokens, heads, head_dim)
        keys, values = kv_cache.unbind(0)
        return keys, values
    if not hasattr(layer, "isa"):  # 0.32 on CUDA: (pages, heads, tokens, 2 * head_dim)
        keys, values = kv_cache.transpose(1, 2).split(layer.head_size, -1)
        return keys, values
    # 0.32 on a CPU: (pages, heads, 2 * tokens * head_dim), a page of K transposed, then one of V.
    tokens = kv_cache.shape[2]
    keys, values = kv_cache.flatten(2).chunk(2, 2)
    return keys.unflatten(2, (-1, tokens)).permute(0, 3, 1, 2), values.unflatten(2, (tokens, -1)).transpose(1, 2)


def why_not_pages(layer: Any) -> str | None:
    """Why the KV cache of a layer cannot be read as `pages` says, or None. Known once its backend has begun."""
    isa = getattr(layer, "isa", None)
    return None if isa in (None, "vec", "vec16") else f"KV cache laid out for {isa}: needs vec or vec16"


def is_dummy(common: Any) -> bool:
    """Whether a batch looks like vLLM's warm-up: nobody's prompt, yet the first request has no context."""
    kv_lens, prefills = common.seq_lens_cpu_upper_bound, common.is_prefilling
    if kv_lens is None or prefills is None or bool(prefills.any()):
        return False
    return bool(kv_lens[:1].tolist() == [common.max_query_len])


def is_known(common: Any) -> bool:
    """Whether CommonAttentionMetadata holds nothing that `split_fields` would lose."""
    return all(getattr(common, name, None) is None for name in UNKNOWN)


def split_fields(common: Any, rows: Index, tokens: Index) -> dict[str, Any]:
    """The fields of CommonAttentionMetadata that have a value for each request or token, for some of them."""
    found: dict[str, Any] = {name: None for name in CACHES if hasattr(common, name)}
    for names, index in ((PER_REQUEST, rows), (PER_TOKEN, tokens)):
        for name in names:
            if (whole := getattr(common, name, None)) is not None:
                found[name] = whole[index.host if whole.is_cpu else index.device]
    return found
