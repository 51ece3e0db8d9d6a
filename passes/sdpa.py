"""Match F.scaled_dot_product_attention, in every way it can be called, and the kernels of torch's that it stands for.

In: a call node. Out: a Match. K and V are taken from before a `repeat_kv`; of a mask the site has what
the graph shows it to be; operands that autocast would cast are cast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import masks
from .graph import Builder, argument, autocast_is_on, name_of, tensor
from .operand import standard, undo_repeats
from .pattern import Attend, Match, first_result, make_site, result_obstacle, shape_obstacle, tokens_first

FUSED = {
    f"_scaled_dot_product_{name}": mask
    for name, mask in (
        ("flash_attention", None),
        ("flash_attention_for_cpu", "attn_mask"),
        ("efficient_attention", "attn_bias"),
        ("cudnn_attention", "attn_bias"),
        ("fused_attention_overrideable", "attn_bias"),
        ("attention_math", "attn_mask"),
    )
}
"""torch's own kernels, as make_fx and export's decompositions write them, and what each calls its mask."""


def match_sdpa(node: fx.Node, live: set[fx.Node]) -> Match | None:
    """F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, *, scale, enable_gqa)."""
    nodes = [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
    mask, dropout_p = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    is_causal, scale = argument(node, 5, "is_causal", False), argument(node, 6, "scale")
    return _match(node, nodes, mask, dropout_p, is_causal, scale)


def match_fused(node: fx.Node, live: set[fx.Node]) -> Match | None:
    """One of FUSED, each with arguments in an order of its own; what else they return is for a gradient."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    anchor, obstacle = first_result(node, live, "log-sum-exp")
    if anchor is None:
        return None
    order = {item.name: (i, item.default_value) for i, item in enumerate(node.target._schema.arguments)}

    def given(name: str | None) -> Any:
        return argument(node, order[name][0], name, order[name][1]) if name in order else None

    nodes = [given(name) for name in ("query", "key", "value")]
    mask = given(FUSED[name_of(node.target)])
    return _match(anchor, nodes, mask, given("dropout_p"), given("is_causal"), given("scale"), obstacle)


def _match(
    node: fx.Node, nodes: list[Any], mask_node: Any, dropout_p: Any, is_causal: Any, scale: Any, obstacle: Any = None
) -> Match | None:
    """`node`: what has the result; the others are what the call was given."""
    out = tensor(node)
    if out is None or any(tensor(item) is None for item in nodes):
        return None
    q, k, v = (standard(item) for item in nodes)
    ranks = [len(operand.order) for operand in (q, k, v)]
    if len(set(ranks)) > 1:
        obstacle = obstacle or f"{', '.join(map(str, ranks))} dims of q, k and v: needs as many of each"
    expected = [*q.sizes[:-1], v.sizes[-1]]
    obstacle = obstacle or shape_obstacle(q, k, v) or result_obstacle(out, expected, range(out.dim()))
    k, v = undo_repeats(k, v, node)
    for what, given in (("is_causal", is_causal), ("scale", scale), ("dropout_p", dropout_p)):
        if isinstance(given, fx.Node):
            obstacle = obstacle or f"{what} computed in the graph: needs a constant"
    given = [masks.Given(mask_node)] if isinstance(mask_node, fx.Node) else []
    cast = autocast_is_on(node, out.device.type)
    seen = masks.read(
        given, masks.Place.standard(q), q.shape[2], k.shape[2], dtype=out.dtype, is_causal=is_causal is True, cast=cast
    )
    site = make_site(
        node,
        "sdpa",
        q,
        k,
        v,
        out.dtype,
        mask=seen.facts,
        scale=scale if isinstance(scale, (int, float)) else None,
        dropout_p=float(dropout_p) if isinstance(dropout_p, (int, float)) else 0.0,
        needs_grad=out.requires_grad,
        obstacle=obstacle,
    )

    def emit(build: Builder, attend: Attend) -> fx.Node:
        tensors = [item.emit(build, out.dtype) for item in (q, k, v)]
        return q.split(build, attend(build, *tensors, **seen.emit(build)))

    return Match(site, node, emit, tokens_first(out), q, k)
