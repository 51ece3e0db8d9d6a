"""`torch.ops.sagecompile.unified_attention_with_output`: what the pass puts where vLLM's op of that name was.

In: the very arguments of vLLM's op in its running version. Out: nothing; `output` is written, as planned. It is marked
as unsafe for CUDA graphs, so that Inductor ends a partition at it, as it does at vLLM's splitting ops.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .attention import forward, is_capturing
from .versions import eager_break_during_capture, known_names

with known_names():
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.attention.attention import (
        get_attention_context,
        unified_attention_with_output,
    )
    from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
    from vllm.utils.torch_utils import _resolve_layer_name, direct_register_custom_op

    THEIRS = torch.ops.vllm.unified_attention_with_output.default

NAME = "unified_attention_with_output"
library = torch.library.Library("sagecompile", "FRAGMENT")


@eager_break_during_capture
@maybe_transfer_kv_layer
@functools.wraps(unified_attention_with_output)  # its signature too, from which the schema is made
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: Any,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
    kv_cache_dummy_dep: torch.Tensor | None = None,
) -> None:
    """`kv_cache_dummy_dep` is there for its order alone: after the KV cache's update."""
    piece = get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
    assert not (piece and is_capturing(query)), "Inductor put attention into a CUDA graph of a piece"
    metadata, layer, kv_cache, _ = get_attention_context(_resolve_layer_name(layer_name))
    tensors = query, key, value, kv_cache, metadata, output, output_scale, output_block_scale
    forward(layer.impl.forward, layer, *tensors)


def _fake(*args: Any, **kwargs: Any) -> None:
    pass


direct_register_custom_op(
    NAME,
    attend,
    mutates_args=["output", "output_block_scale"],
    fake_impl=_fake,
    target_lib=library,
    tags=(torch.Tag.cudagraph_unsafe,),
)
OURS = torch.ops.sagecompile.unified_attention_with_output.default
