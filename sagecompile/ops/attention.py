"""`torch.ops.sagecompile.attention`: one functional op, from q, k and v as the model has them to the attention output.

In: q (B, H, Nq, D), k and v (B, Hkv, Nk, D), any strides, never modified. Out: a new (B, H, Nq, D) tensor, in memory
(B, Nq, H, D) if `tokens_first`, as SDPA's fused kernels return it. It launches on the current stream of the tensors'
own device, asks the device nothing and waits for nothing, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sagecompile import kernels
from sagecompile.errors import UnsupportedError
from sagecompile.formats import FORMATS, PROVIDERS

from . import reference

SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, *, float? scale, bool is_causal, str format, str provider, "
    "bool tokens_first) -> Tensor"
)
library = torch.library.Library("sagecompile", "DEF")
# flexible_layout: any input strides will do, so Inductor need not copy to keep the eager ones.
library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
attention = torch.ops.sagecompile.attention


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, format: str, provider: str) -> None:
    """Raise UnsupportedError for what no rewritten graph contains, but a direct call may."""
    if format not in FORMATS:
        raise UnsupportedError(f"format {format!r}: known are {', '.join(FORMATS)}")
    if provider not in PROVIDERS:
        raise UnsupportedError(f"provider {provider!r}: known are {', '.join(PROVIDERS)}")
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise UnsupportedError(f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dims: each needs 4")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise UnsupportedError(f"q, k and v of {shapes}: need (B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, D)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise UnsupportedError(f"{q.shape[1]} query heads on {k.shape[1]} KV heads: needs a multiple")
    if q.shape[3] > FORMATS[format].max_head_dim:
        raise UnsupportedError(f"head_dim {q.shape[3]}: {format} needs at most {FORMATS[format].max_head_dim}")
    dtypes = FORMATS[format].dtypes
    if not (q.dtype == k.dtype == v.dtype) or str(q.dtype).removeprefix("torch.") not in dtypes:
        raise UnsupportedError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: needs one of {', '.join(dtypes)} on all three")
    if not (q.device == k.device == v.device):
        raise UnsupportedError(f"devices {q.device}, {k.device}, {v.device}: needs one")


def _empty(q: torch.Tensor, tokens_first: bool) -> torch.Tensor:
    """The output, for the op and its fake alike."""
    batch, heads, q_len, head_dim = q.shape
    if tokens_first:
        return q.new_empty((batch, q_len, heads, head_dim)).transpose(1, 2)
    return q.new_empty((batch, heads, q_len, head_dim))


def _launcher(provider: str) -> Callable[..., None]:
    return reference.attention if provider == "reference" else kernels.launcher(provider)


@torch.library.impl(library, "attention", "CompositeExplicitAutograd")
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    is_causal: bool,
    format: str,
    provider: str,
    tokens_first: bool,
) -> torch.Tensor:
    _check(q, k, v, format, provider)
    out = _empty(q, tokens_first)
    scale = scale if scale is not None else 1 / math.sqrt(max(1, q.shape[3]))
    if q.numel() == 0:
        return out
    if k.shape[2] == 0:
        return out.copy_(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True))
    with torch.autocast(q.device.type, enabled=False):  # it would round the exact INT8 products of the reference
        _launcher(provider)(q, k, v, out, scale=scale, is_causal=is_causal, format=format)
    return out


@torch.library.register_fake("sagecompile::attention", lib=library)
def _attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, format: str, provider: str, tokens_first: bool, **_: Any
) -> torch.Tensor:
    return _empty(q, tokens_first)


def _no_backward(ctx: Any, grad: torch.Tensor) -> Any:
    raise UnsupportedError(
        "torch.ops.sagecompile.attention has no backward: call it under torch.no_grad(), "
        "or F.scaled_dot_product_attention where gradients are needed"
    )


torch.library.register_autograd("sagecompile::attention", _no_backward, lib=library)
