"""Put the attention op where the model's own attention call was.

In: an FX graph and the matches whose decision is Use. Out: the graph, changed in place, without what nothing needs
any more. The op is a torch.library op with plain arguments, so AOTAutograd's and Inductor's caches keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import sagecompile.ops  # noqa: F401  (registers torch.ops.sagecompile)
from sagecompile.decide import Use

from . import prologue
from .graph import Builder, erase_dead, tensor
from .pattern import Match
from .prologue import Prologue


def rewrite(used: Sequence[tuple[Match, Use]]) -> None:
    """Replace each match's anchor by the op of its decision, in the graph that it is in."""
    for match, use in used:
        _replace(match, use)
    for graph in {match.anchor.graph: None for match, _ in used}:
        erase_dead(graph, [match.anchor for match, _ in used if match.anchor.graph is graph])
        graph.lint()


def _replace(match: Match, use: Use) -> None:
    """One anchor."""
    how = {
        "scale": match.site.scale,
        "is_causal": match.site.is_causal,
        "format": use.format,
        "provider": use.provider,
        "tokens_first": match.tokens_first,
    }

    def attend(build: Builder, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        if use.fused:
            assert match.prologues is not None, match.site
            return _attend_from_projections(build, *match.prologues, v, how)
        return build.call(torch.ops.sagecompile.attention.default, q, k, v, **how)

    result = match.emit(Builder(match.anchor), attend)
    old, new = tensor(match.anchor), tensor(result)
    assert old is not None and new is not None
    assert [str(size) for size in old.shape] == [str(size) for size in new.shape], (match.site, old.shape, new.shape)
    match.anchor.replace_all_uses_with(result)


def _attend_from_projections(build: Builder, q: Prologue, k: Prologue, v: fx.Node, how: dict[str, Any]) -> fx.Node:
    cos, sin = [prologue.emit_table(build, table) for table in q.tables or k.tables] or (None, None)
    return build.call(
        torch.ops.sagecompile.qk_norm_rope_attention.default,
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
