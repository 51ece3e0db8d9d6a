"""Put the attention op where the model's own attention call was.

In: an FX graph and the matches whose decision is Use. Out: the graph, changed in place, without what nothing needs
any more. The op is a torch.library op with plain arguments, so AOTAutograd's and Inductor's caches keep working.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

import sagecompile.ops  # noqa: F401  (registers torch.ops.sagecompile)
from sagecompile.decide import Use

from .graph import Builder, erase_dead, tensor
from .pattern import Match


def rewrite(used: Sequence[tuple[Match, Use]]) -> None:
    """Replace each match's anchor by the op of its decision, in the graph that it is in."""
    for match, use in used:
        build = Builder(match.anchor)
        result = match.emit(build, _attend(match, use))
        old, new = tensor(match.anchor), tensor(result)
        assert old is not None and new is not None
        assert [str(size) for size in old.shape] == [str(size) for size in new.shape], (
            match.site,
            old.shape,
            new.shape,
        )
        match.anchor.replace_all_uses_with(result)
    for graph in {match.anchor.graph: None for match, _ in used}:
        erase_dead(graph, [match.anchor for match, _ in used if match.anchor.graph is graph])
        graph.lint()


def _attend(match: Match, use: Use):  # type: ignore[no-untyped-def]  # returns match.Attend
    site = match.site

    def attend(build: Builder, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        return build.call(
            torch.ops.sagecompile.attention.default,
            q,
            k,
            v,
            scale=site.scale,
            is_causal=site.is_causal,
            format=use.format,
            provider=use.provider,
            tokens_first=match.tokens_first,
        )

    return attend
