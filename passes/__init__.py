"""The way through the graph, in order: match sites, decide each, rewrite those used, shield the rest; then a report.

In: a Dynamo (pre-grad) graph and `decide`. Out: the same GraphModule, changed in place, and the report of what was
done.
"""

if __name__ != "sagecompile.passes":
    raise ImportError(
        "the folder passes/ is the package sagecompile.passes: pip install -e . and import it by that name"
    )

from collections.abc import Callable, Collection

from torch.fx import GraphModule, Node

from sagecompile.decide import Decision, Use
from sagecompile.lengths import long_enough
from sagecompile.report import Entry, Report
from sagecompile.site import AttentionSite

from .graph import with_subgraphs
from .guards import reaches
from .match import find
from .rewrite import rewrite
from .shield import shield

__all__ = ["find", "rewrite", "run", "shield"]


def run(
    gm: GraphModule,
    decide: Callable[[AttentionSite], Decision],
    fusing: Collection[str] = (),
    nodes: list[Node] | None = None,
) -> Report:
    """Rewrite `gm` in place wherever `decide` says Use; return every site with its decision.

    `fusing`: the device types with kernels for what makes q and k, which is looked for on no other. `nodes` gets the
    op of each used site, in the report's order.
    """
    matches = find(gm.graph, fusing)
    decisions = long_enough([(match.site, decide(match.site)) for match in matches], reaches)
    decided = list(zip(matches, decisions, strict=True))
    ops = rewrite([(match, decision) for match, decision in decided if isinstance(decision, Use)])
    if nodes is not None:
        nodes += ops
    for graph in with_subgraphs(gm.graph):
        shield(graph)
        if graph.owning_module is not None:
            graph.owning_module.recompile()
    return Report(tuple(Entry(match.site, decision) for match, decision in decided))
