"""Keep Inductor from turning a softmax over another dim into one over the last.

In: an FX graph. Out: the same graph, where softmax(x, d) with d not the last dim reads softmax(x^T, -1)^T: the same
values. Inductor's own attention fusion (torch 2.13) does not look at the dim: softmax(QK^T, dim=-2) V compiles to
the result of dim=-1, a relative error of 0.23. Behind the transposes it does not take it for attention.
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import Builder, argument, calls, erase_dead, tensor
from .unfused import leads_to_scores


def shield_softmax(graph: fx.Graph) -> int:
    """Rewrite every softmax of a matmul's result over an inner dim; return how many."""
    replaced = []
    for node in list(graph.nodes):
        if not calls(node, "softmax"):
            continue
        dim, source = argument(node, 1, "dim"), argument(node, 0, "input")
        found, out = tensor(source), tensor(node)
        if not isinstance(dim, int) or found is None or out is None or found.dim() < 2:
            continue
        if dim % found.dim() == found.dim() - 1 or not leads_to_scores(source):
            continue
        build = Builder(node)
        turned = build.call(torch.transpose, source, dim, -1)
        weights = build.call(torch.softmax, turned, -1, dtype=out.dtype)
        node.replace_all_uses_with(build.call(torch.transpose, weights, dim, -1))
        replaced.append(node)
    erase_dead(graph, replaced)
    return len(replaced)
