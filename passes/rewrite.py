"""Put the attention op where the model's own attention call was.

In: an FX graph and the matches whose decision is Use. Out: the graph, changed in place, without what nothing needs
any more. The op is a torch.library op with plain arguments, so AOTAutograd's and Inductor's caches keep working.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as known

import sagecompile.ops  # noqa: F401  (registers torch.ops.sagecompile)
from sagecompile.decide import Use

from . import prologue
from .graph import Builder, erase_dead, tensor
from .pattern import Match
from .prologue import Prologue

ATTENTION = torch.ops.sagecompile.attention.default
FUSED_ATTENTION = torch.ops.sagecompile.qk_norm_rope_attention.default
OPS = (ATTENTION, FUSED_ATTENTION)


def rewrite(used: Sequence[tuple[Match, Use]]) -> list[fx.Node]:
    """Replace each match's anchor by the op of its decision, in the graph that it is in; the ops' nodes.

    A site may read another's result: what has been replaced so far is looked up whenever a call is built.
    """
    anchors: dict[fx.Graph, list[fx.Node]] = {}
    for match, _ in used:
        anchors.setdefault(match.anchor.graph, []).append(match.anchor)
    before = {graph: _count(graph) for graph in anchors}
    replaced: dict[fx.Node, fx.Node] = {}
    nodes: list[fx.Node] = []
    for match, use in used:
        replaced[match.anchor] = _replace(match, use, replaced, nodes)
    for graph, here in anchors.items():
        erase_dead(graph, here)
        assert not set(here) & set(graph.nodes), ("still there", set(here) & set(graph.nodes))
        assert _count(graph) - before[graph] == len(here), (before[graph], len(here), str(graph))
        graph.lint()
    return nodes


def _count(graph: fx.Graph) -> int:
    """How many calls of our ops there are."""
    return sum(node.target in OPS for node in graph.nodes)


def _replace(match: Match, use: Use, replaced: Mapping[fx.Node, fx.Node], nodes: list[fx.Node]) -> fx.Node:
    """One anchor, by the node that is returned; that of the op itself is added to `nodes`."""
    how = {
        "scale": match.site.scale,
        "format": use.format,
        "provider": use.provider,
        "tokens_first": match.tokens_first,
        "site": match.site.label,
    }

    def attend(build: Builder, q: fx.Node, k: fx.Node, v: fx.Node, **seen: Any) -> fx.Node:
        how.update(seen)
        if use.fused:
            assert match.prologues is not None, match.site
            node = _attend_from_projections(build, *match.prologues, v, how)
        else:
            node = build.call(ATTENTION, q, k, v, **how)
        nodes.append(node)
        return node

    build = Builder(match.anchor, replaced)
    result = match.emit(build, attend)
    old, new = tensor(match.anchor), tensor(result)
    assert old is not None and new is not None
    assert [str(size) for size in old.shape] == [str(size) for size in new.shape], (match.site, old.shape, new.shape)
    result = _laid_out_as(old, build, result)
    match.anchor.replace_all_uses_with(result)
    return result


def _laid_out_as(old: torch.Tensor, build: Builder, result: fx.Node) -> fx.Node:
    """The result with the strides of `old`: copied where the op cannot write them, as the graph may view it by them."""
    new = tensor(result)
    assert new is not None
    if _same_strides(new, old):
        return result
    for order in permutations(range(old.dim())):
        inverse = tuple(order.index(dim) for dim in range(old.dim()))
        if _same_strides(old.new_empty([old.shape[dim] for dim in order]).permute(inverse), old):
            copied = build.call(torch.Tensor.contiguous, build.call(torch.permute, result, order))
            return build.call(torch.permute, copied, inverse)
    return result  # of no memory of its own, such as an expanded one


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """For all sizes that their symbols admit; a dim of one element may have any."""
    return all(known(size == 1) or known(x == y) for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def _attend_from_projections(build: Builder, q: Prologue, k: Prologue, v: fx.Node, how: dict[str, Any]) -> fx.Node:
    cos, sin = [prologue.emit_table(build, table) for table in q.tables or k.tables] or (None, None)
    return build.call(
        FUSED_ATTENTION,
        q.source.emit(build, q.source.dtype),
        k.source.emit(build, k.source.dtype),
        v,
        q.weight,
        k.weight,
        cos,
        sin,
        q_eps=q.eps,
        k_eps=k.eps,
        q_rope=q.rope,
        k_rope=k.rope,
        **how,
    )
