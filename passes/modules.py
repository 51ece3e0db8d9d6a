"""Match PyTorch's own attention modules, which Dynamo leaves in the graph as one call each.

In: a call of F.multi_head_attention_forward, torch._native_multi_head_attention (nn.MultiheadAttention's fast path) or
torch._transformer_encoder_layer_fwd (nn.TransformerEncoderLayer's). Out: a Match that, when used, writes the call out
as linear layers around the attention op. A kept one stays the one call it was.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from . import masks
from .graph import Builder, argument, autocast_is_on, tensor
from .operand import Operand
from .pattern import Attend, Match, first_result, make_site

MHA_ARGUMENTS = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight "
    "q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal"
).split()
NATIVE_ARGUMENTS = (
    "query key value embed_dim num_heads qkv_weight qkv_bias proj_weight proj_bias mask need_weights "
    "average_attn_weights mask_type"
).split()
LAYER_ARGUMENTS = (
    "src embed_dim num_heads qkv_weight qkv_bias proj_weight proj_bias use_gelu norm_first eps "
    "norm_weight_1 norm_bias_1 norm_weight_2 norm_bias_2 ffn_weight_1 ffn_bias_1 ffn_weight_2 ffn_bias_2 mask mask_type"
).split()

NATIVE_MASKS = {0: (2, 3), 1: (0, 3), 2: (0, 1, 2, 3)}
"""By the `mask_type` of a native call which dims of (batch, heads, queries, keys) its mask has; None is an error."""


def _bind(node: fx.Node, names: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: argument(node, i, name, defaults.get(name)) for i, name in enumerate(names)}


def _site(anchor: fx.Node, call: fx.Node, spelling: str, args: dict[str, Any], batch_first: bool, **facts: Any) -> Any:
    """The site of a module whose inputs are (batch, tokens, embed), or (tokens, batch, embed), or without batch."""
    query, key = tensor(args["query"]), tensor(args["key"])
    assert query is not None and key is not None
    order = (0, 1) if query.dim() == 2 else (0, 1, 2) if batch_first else (1, 0, 2)
    q, k = Operand(args["query"], order), Operand(args["key"], order)
    out = tensor(anchor)
    assert out is not None
    heads = args["num_heads"]
    site = make_site(call, spelling, q, k, k, out.dtype, needs_grad=out.requires_grad, **facts)
    head_dim = query.shape[-1] // heads
    return replace(site, heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim)


def _autocast_obstacle(node: fx.Node, query: fx.Node) -> str | None:
    """The fast paths compute in the dtype of their inputs; written out under autocast, they would not."""
    found = tensor(query)
    assert found is not None
    return "autocast on a fast path: needs autocast off" if autocast_is_on(node, found.device.type) else None


def _split_heads(build: Builder, x: fx.Node, heads: int, batch_first: bool) -> fx.Node:
    """(batch, tokens, embed) or (tokens, batch, embed) to (batch, heads, tokens, head_dim)."""
    split = build.call(torch.Tensor.unflatten, x, 2, (heads, -1))
    return build.call(torch.permute, split, (0, 2, 1, 3) if batch_first else (1, 2, 0, 3))


def _merge_heads(build: Builder, x: fx.Node, batch_first: bool) -> fx.Node:
    merged = build.call(torch.permute, x, (0, 2, 1, 3) if batch_first else (2, 0, 1, 3))
    return build.call(torch.flatten, merged, 2)


def _project(build: Builder, inputs: list[fx.Node], weight: Any, bias: Any) -> list[fx.Node]:
    """Q, K and V from a packed (3 * embed, embed) weight: one matmul for self-attention, else three."""

    def thirds(packed: fx.Node, dim: int) -> list[fx.Node]:
        parts = build.call(torch.chunk, packed, 3, dim)
        return [build.call(operator.getitem, parts, i) for i in range(3)]

    if all(item is inputs[0] for item in inputs):
        return thirds(build.call(F.linear, inputs[0], weight, bias), -1)
    weights = thirds(weight, 0)
    biases: list[Any] = thirds(bias, 0) if bias is not None else [None] * 3
    return [build.call(F.linear, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def match_functional_mha(node: fx.Node, live: set[fx.Node]) -> Match | None:
    """F.multi_head_attention_forward, which nn.MultiheadAttention calls; query (tokens, batch, embed), or no batch."""
    defaults = {"training": True, "need_weights": True, "is_causal": False, "add_zero_attn": False}
    args = _bind(node, MHA_ARGUMENTS, {**defaults, "use_separate_proj_weight": False})
    anchor, obstacle = first_result(node, live, "attention weights")
    if (
        anchor is None
        or tensor(anchor) is None
        or any(tensor(args[name]) is None for name in ("query", "key", "value"))
    ):
        return None
    query, key = tensor(args["query"]), tensor(args["key"])
    assert query is not None and key is not None
    batched = query.dim() == 3
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if args[name] is not None:
            obstacle = obstacle or f"{name}: needs none"
    if args["add_zero_attn"]:
        obstacle = obstacle or "add_zero_attn: needs False"
    padding, attn_mask = args["key_padding_mask"], args["attn_mask"]
    # The module believes the hint, and does not look at the mask.
    hinted = attn_mask is not None and args["is_causal"] and not args["need_weights"] and padding is None
    given = [] if padding is None else [masks.Given(padding, True, dims=(0, 3)[-_rank(padding) :])]
    if attn_mask is not None and not hinted:
        given.append(masks.Given(attn_mask, True, dims=(2, 3)))
        if _rank(attn_mask) != 2:
            obstacle = obstacle or f"attn_mask {said_sizes(attn_mask)}: needs (queries, keys)"
            given = []
    seen = _read(given, args, query.shape[0], key.shape[0], query.dtype, is_causal=hinted)
    site = _site(
        anchor,
        node,
        "nn.MultiheadAttention",
        args,
        batch_first=False,
        mask=seen.facts,
        dropout_p=args["dropout_p"] if args["training"] else 0.0,
        obstacle=obstacle,
    )

    def emit(build: Builder, attend: Attend) -> fx.Node:
        inputs = [args["query"], args["key"], args["value"]]
        if not batched:
            inputs = [build.call(torch.unsqueeze, item, 1) for item in inputs]
        if args["use_separate_proj_weight"]:
            bias = args["in_proj_bias"]
            parts = build.call(torch.chunk, bias, 3) if bias is not None else None
            projected = []
            for i, (x, name) in enumerate(zip(inputs, ("q", "k", "v"), strict=True)):
                own = build.call(operator.getitem, parts, i) if parts is not None else None
                projected.append(build.call(F.linear, x, args[f"{name}_proj_weight"], own))
        else:
            projected = _project(build, inputs, args["in_proj_weight"], args["in_proj_bias"])
        heads = [_split_heads(build, x, args["num_heads"], batch_first=False) for x in projected]
        merged = _merge_heads(build, attend(build, *heads, **seen.emit(build)), batch_first=False)
        result = build.call(F.linear, merged, args["out_proj_weight"], args["out_proj_bias"])
        return result if batched else build.call(torch.squeeze, result, 1)

    return Match(site, anchor, emit, tokens_first=True)


def match_native_mha(node: fx.Node, live: set[fx.Node]) -> Match | None:
    """torch._native_multi_head_attention; query (batch, tokens, embed)."""
    args = _bind(node, NATIVE_ARGUMENTS, {"need_weights": True})
    anchor, obstacle = first_result(node, live, "attention weights")
    if anchor is None or tensor(anchor) is None or tensor(args["query"]) is None or tensor(args["key"]) is None:
        return None
    seen, refused = _native_mask(args, tensor(args["query"]), tensor(args["key"]))
    obstacle = obstacle or refused or _autocast_obstacle(node, args["query"])
    site = _site(anchor, node, "nn.MultiheadAttention", args, batch_first=True, mask=seen.facts, obstacle=obstacle)

    def emit(build: Builder, attend: Attend) -> fx.Node:
        inputs = [args["query"], args["key"], args["value"]]
        return _attention(build, attend, inputs, args, seen)

    return Match(site, anchor, emit, tokens_first=True)


def _native_mask(
    args: dict[str, Any], query: torch.Tensor | None, key: torch.Tensor | None
) -> tuple[masks.Reading, str | None]:
    """Of torch's native calls, and why it cannot be taken; True is masked, and of numbers what is not 0."""
    assert query is not None and key is not None
    sizes, mask = (query.shape[1], key.shape[1]), args["mask"]
    nothing = _read([], args, *sizes, query.dtype)
    if mask is None:
        return nothing, None
    found, dims = tensor(mask), NATIVE_MASKS.get(args["mask_type"])
    if found is None or dims is None or found.dim() > len(dims):
        return nothing, f"mask {said_sizes(mask)} of type {args['mask_type']}: needs type 0, 1 or 2"
    seen = _read([masks.Given(mask, True, dims=dims[len(dims) - found.dim() :])], args, *sizes, query.dtype)
    if seen.seen.terms:
        return nothing, f"mask {str(found.dtype).removeprefix('torch.')}: needs booleans"
    return seen, None


def _read(
    given: list[masks.Given], args: dict[str, Any], q_len: Any, kv_len: Any, dtype: torch.dtype, **how: Any
) -> masks.Reading:
    """Of scores (batch, heads, queries, keys)."""
    place = masks.Place(Operand(args["query"], (0, None, None, None)), (0, 1, 2, 3), (0, 1, 2, 3))
    return masks.read(given, place, q_len, kv_len, dtype=dtype, **how)


def _rank(node: Any) -> int:
    found = tensor(node)
    assert found is not None
    return found.dim()


def said_sizes(node: Any) -> str:
    """`(2, 40)`."""
    found = tensor(node)
    return "of unknown shape" if found is None else f"({', '.join(map(str, found.shape))})"


def match_encoder_layer(node: fx.Node, live: set[fx.Node]) -> Match | None:
    """torch._transformer_encoder_layer_fwd; src (batch, tokens, embed)."""
    args = _bind(node, LAYER_ARGUMENTS, {})
    src, out = tensor(args["src"]), tensor(node)
    if src is None or out is None or src.is_nested or src.dim() != 3:
        return None
    args["query"] = args["key"] = args["src"]
    seen, refused = _native_mask(args, src, src)
    obstacle = refused or _autocast_obstacle(node, args["src"])
    site = _site(node, node, "nn.TransformerEncoderLayer", args, batch_first=True, mask=seen.facts, obstacle=obstacle)

    def emit(build: Builder, attend: Attend) -> fx.Node:
        x: fx.Node = args["src"]

        def norm(x: fx.Node, which: int) -> fx.Node:
            weight, bias = args[f"norm_weight_{which}"], args[f"norm_bias_{which}"]
            return build.call(F.layer_norm, x, (args["embed_dim"],), weight, bias, args["eps"])

        def attention(x: fx.Node) -> fx.Node:
            return _attention(build, attend, [x, x, x], args, seen)

        def feed_forward(x: fx.Node) -> fx.Node:
            wide = build.call(F.linear, x, args["ffn_weight_1"], args["ffn_bias_1"])
            wide = build.call(F.gelu if args["use_gelu"] else F.relu, wide)
            return build.call(F.linear, wide, args["ffn_weight_2"], args["ffn_bias_2"])

        for which, block in ((1, attention), (2, feed_forward)):
            if args["norm_first"]:
                x = build.call(torch.add, x, block(norm(x, which)))
            else:
                x = norm(build.call(torch.add, x, block(x)), which)
        return x

    return Match(site, node, emit, tokens_first=True)


def _attention(
    build: Builder, attend: Attend, inputs: list[fx.Node], args: dict[str, Any], seen: masks.Reading
) -> fx.Node:
    """Packed projections, heads, attention, output projection, on (batch, tokens, embed)."""
    projected = _project(build, inputs, args["qkv_weight"], args["qkv_bias"])
    heads = [_split_heads(build, x, args["num_heads"], batch_first=True) for x in projected]
    merged = _merge_heads(build, attend(build, *heads, **seen.emit(build)), batch_first=True)
    return build.call(F.linear, merged, args["proj_weight"], args["proj_bias"])
