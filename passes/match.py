"""Find every attention call of a Dynamo graph, however the model writes it.

In: an FX graph. Out: a list of Match in graph order, also for calls that cannot be rewritten: they carry an obstacle.
One spelling a file: sdpa.py, unfused.py for softmax(QK^T)V, modules.py for PyTorch's own modules; unknown.py for the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import fx

from . import prologue
from .graph import calls, live_nodes, with_subgraphs
from .modules import match_encoder_layer, match_functional_mha, match_native_mha
from .pattern import Match
from .sdpa import FUSED, match_fused, match_sdpa
from .unfused import match_unfused
from .unknown import match_unknown


def match_softmax(node: fx.Node, live: set[fx.Node]) -> Match | None:
    """The attention around a softmax; one that is not understood is found all the same, and kept."""
    return match_unfused(node, live) or match_unknown(node, live)


SPELLINGS: dict[str, Callable[[fx.Node, set[fx.Node]], Match | None]] = {
    "scaled_dot_product_attention": match_sdpa,
    **dict.fromkeys(FUSED, match_fused),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax"), match_softmax),
    "multi_head_attention_forward": match_functional_mha,
    "_native_multi_head_attention": match_native_mha,
    "_transformer_encoder_layer_fwd": match_encoder_layer,
}
"""The call that a spelling is found by, and its matcher, which also gets the nodes that matter."""


def find(graph: fx.Graph, fusing: Collection[str] = ()) -> list[Match]:
    """Every attention call whose result matters, also inside checkpointed blocks and branches.

    What makes q and k is looked for on the device types `fusing`.
    """
    found = []
    for part in with_subgraphs(graph):
        live = live_nodes(part)
        for node in part.nodes:
            for name, matcher in SPELLINGS.items():
                if node in live and calls(node, name):
                    found.append(matcher(node, live))
    matches = [match for match in found if match is not None]
    anchors = {match.anchor for match in matches}
    return [_with_prologues(match, anchors) if match.site.device_type in fusing else match for match in matches]


def _with_prologues(match: Match, anchors: set[fx.Node]) -> Match:
    """The match, with what a kernel could do to its q and k as it reads them; not from what is replaced itself."""
    if match.q is None or match.k is None or match.site.obstacle or match.site.needs_grad:
        return match
    made = prologue.recognise(match.q, match.k, match.site.dtype, match.anchor, anchors)
    if made is None:
        return match
    q_made, k_made = made
    return replace(match, prologues=made, site=replace(match.site, prologues=(q_made.facts, k_made.facts)))
