"""Keep Inductor from turning a softmax over another dim into one over the last.

In: an FX graph. Out: the same graph, where softmax(x, d) with d not the last dim reads softmax(x^T, -1)^T: the same
values. Inductor's own attention fusion (torch 2.13) does not look at the dim: softmax(QK^T, dim=-2) V compiles to
the result of dim=-1, a relative error of 0.23. Behind the transposes it does not take it for attention.
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import Builder, argument, calls, erase_dead, tensor


def shield_softmax(graph: fx.Graph) -> int:
    """Rewrite every softmax over an inner dim that a matmul reads; return how many."""
    replaced = []
    for node in list(graph.nodes):
        dim, source = argument(node, 1, "dim"), node.args[0] if node.args else None
        found = tensor(source)
        if not calls(node, "softmax") or not isinstance(dim, int) or found is None or found.dim() < 2:
            continue
        if dim % found.dim() == found.dim() - 1:
            continue
        build = Builder(graph, node)
        turned = build.call(torch.transpose, source, dim, -1)
        weights = build.call(torch.softmax, turned, -1, dtype=node.kwargs.get("dtype"))
        node.replace_all_uses_with(build.call(torch.transpose, weights, dim, -1))
        replaced.append(node)
    erase_dead(graph, replaced)
    return len(replaced)
