"""Attention of one layer on one batch, as planned: our kernels for some requests, vLLM's own for the rest.

In: vLLM's packed q, k and v (tokens, heads, head_dim), its KV cache, which the new tokens are already in, and its
metadata with our plan. Out: `output`, written. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sagecompile import ops

from .counters import count
from .plan import Part, Plan
from .versions import pages

PLAN = "sagecompile_plan"
"""The attribute of vLLM's metadata that holds the batch's Plan."""


def forward(
    vllms: Callable[..., Any],
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
) -> Any:
    """What `vllms`, the `forward` of a layer's own implementation, would do with the same arguments."""
    plan: Plan | None = getattr(metadata, PLAN, None)
    scales = {"output_scale": output_scale, "output_block_scale": output_block_scale}
    quantized = output_scale is not None or output_block_scale is not None or query.dtype != layer.dtype
    if plan is None or layer.layer_name not in plan.layers or quantized or is_capturing(query):
        return vllms(layer, query, key, value, kv_cache, metadata, output=output, **scales)
    for part in plan.parts:
        _attend(part, plan.is_causal, layer, query, key, value, kv_cache, metadata.block_table, output)
    if plan.rest is not None:
        tokens = plan.rest.tokens
        rest = output.new_empty((tokens.shape[0], *output.shape[1:]))
        vllms(layer, query[tokens], key[tokens], value[tokens], kv_cache, plan.rest.metadata, output=rest, **scales)
        output.index_copy_(0, tokens, rest)
    return output


def is_capturing(x: torch.Tensor) -> bool:
    """Whether what is launched on a tensor's device goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _attend(
    part: Part,
    is_causal: bool,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """One request: K and V are the batch's own, or where it has a cached context, gathered from the cache."""
    tokens = slice(part.start, part.start + part.q_len)
    if part.kv_len == part.q_len:
        key, value = key[tokens], value[tokens]
    else:
        key, value = (_gathered(x, block_table[part.row], part.kv_len) for x in pages(layer, kv_cache))
    q, k, v, out = (x.transpose(0, 1)[None] for x in (query[tokens], key, value, output[tokens]))
    ops.attention_into.default(
        q, k, v, out, scale=layer.impl.scale, ahead=part.kv_len - part.q_len if is_causal else None,
        format=part.use.format, provider=part.use.provider, site=layer.layer_name,
    )  # fmt: skip
    count(layer.layer_name, part.q_len)


def _gathered(cached: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of a request: (pages, tokens a page, KV heads, head_dim) to (tokens, ...)."""
    used = blocks[: -(-length // cached.shape[1])]
    return cached.index_select(0, used).flatten(0, 1)[:length]
