"""Match F.scaled_dot_product_attention, in every way it can be called.

In: a call node. Out: a Match. K and V are taken from before a `repeat_kv`; a mask that the graph shows to be causal
becomes `is_causal`; operands that autocast would cast are cast.
"""

from __future__ import annotations

from torch import fx

from . import masks
from .graph import Builder, argument, tensor
from .operand import standard, undo_repeats
from .pattern import Attend, Match, make_site, result_obstacle, shape_obstacle, squeeze_to, tokens_first


def match_sdpa(node: fx.Node, live: set[fx.Node]) -> Match | None:
    """F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, *, scale, enable_gqa)."""
    out = tensor(node)
    nodes = [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
    if out is None or any(tensor(item) is None for item in nodes):
        return None
    q, k, v = (standard(item) for item in nodes)
    obstacle = shape_obstacle(q, k, v) or result_obstacle(out, q, v, tuple(range(out.dim())))
    k, v = undo_repeats(k, v, node)
    is_causal, scale = argument(node, 5, "is_causal", False), argument(node, 6, "scale")
    dropout_p = argument(node, 4, "dropout_p", 0.0)
    for what, given in (("is_causal", is_causal), ("scale", scale), ("dropout_p", dropout_p)):
        if isinstance(given, fx.Node):
            obstacle = obstacle or f"{what} computed in the graph: needs a constant"
    mask_node = argument(node, 3, "attn_mask")
    mask = None
    if mask_node is not None:
        seen = masks.recognise(mask_node, q.shape[2], k.shape[2])
        if seen == masks.CAUSAL and not is_causal:
            is_causal = True
        elif seen != masks.NOTHING_MASKED:
            mask = masks.describe(mask_node)
    site = make_site(
        node,
        "sdpa",
        q,
        k,
        v,
        out.dtype,
        is_causal=is_causal is True,
        mask=mask,
        scale=scale if isinstance(scale, (int, float)) else None,
        dropout_p=float(dropout_p) if isinstance(dropout_p, (int, float)) else 0.0,
        needs_grad=out.requires_grad,
        obstacle=obstacle,
    )

    def emit(build: Builder, attend: Attend) -> fx.Node:
        result = attend(build, *(item.emit(build, out.dtype) for item in (q, k, v)))
        return squeeze_to(build, result, out.dim())

    return Match(site, node, emit, tokens_first(out), q, k)
