"""The facts of one of vLLM's attention layers, as a site.

In: a layer. Out: an AttentionSite whose `obstacle` is what our kernels do not do, if there is such a thing; which
head dims, dtypes and devices they do is `decide`'s.
"""

from __future__ import annotations

from typing import Any

from sagecompile.mask import ALL, CAUSAL
from sagecompile.site import AttentionSite

KINDS = {"decoder": CAUSAL, "encoder_only": ALL}
"""vLLM's types of attention that we do, and the mask of a whole request."""

PLAIN = ("Attention", "EncoderOnlyAttention")
"""vLLM's classes of layers that are attention and nothing else; MLA, cross-attention and others have their own."""


def site_of(layer: Any, device: str) -> AttentionSite:
    """Of one request, of n tokens, until a batch says how many; heads are those of this process."""
    head_dim = getattr(layer, "head_size", "?")
    return AttentionSite(
        name=layer.layer_name,
        source=type(layer).__name__,
        spelling="vllm",
        batch=1,
        heads=layer.num_heads,
        kv_heads=getattr(layer, "num_kv_heads", layer.num_heads),
        q_len="n",
        kv_len="n",
        head_dim=head_dim,
        value_dim=getattr(layer, "head_size_v", head_dim),
        dtype=str(getattr(layer, "dtype", "?")).removeprefix("torch."),
        device=device,
        mask=KINDS.get(getattr(layer, "attn_type", "decoder"), ALL),
        scale=getattr(layer.impl, "scale", None),
        obstacle=_obstacle(layer),
    )


def _obstacle(layer: Any) -> str | None:
    if type(layer).__name__ not in PLAIN:
        return f"{type(layer).__name__}: needs one of {', '.join(PLAIN)}"
    impl = layer.impl
    if not getattr(layer.attn_backend, "makes_plans", False):
        return f"attention backend {layer.attn_backend.get_name()}: needs one that ours is built on, or CUSTOM"
    shares = getattr(impl, "dcp_world_size", 1) * getattr(impl, "pcp_world_size", 1)
    found = {
        f"{layer.attn_type} attention: needs one of {', '.join(KINDS)}": layer.attn_type not in KINDS,
        f"sliding window {layer.sliding_window}: needs none": layer.sliding_window is not None,
        "ALiBi: needs none": impl.alibi_slopes is not None,
        f"logits soft cap {impl.logits_soft_cap}: needs none": bool(impl.logits_soft_cap),
        "attention sinks: needs none": getattr(impl, "sinks", None) is not None,
        f"KV cache of {layer.kv_sharing_target_layer_name}: needs its own": bool(layer.kv_sharing_target_layer_name),
        f"kv_cache_dtype {layer.kv_cache_dtype}: needs one that is not quantized": layer.kv_cache_dtype
        not in ("auto", "float16", "bfloat16", "float32"),
        "images that see what follows them: needs causal attention": bool(getattr(layer, "use_mm_prefix", False)),
        f"context in {shares} processes: needs 1": shares > 1,
    }
    return next((reason for reason, is_so in found.items() if is_so), None)
