"""Keep Inductor's own attention fusion (torch 2.13) from what it misreads, by transposes that it does not expect.

In: an FX graph. Out: the same graph with the same values, where
- softmax(x, d) with d not the last dim reads softmax(x^T, -1)^T: the fusion does not look at the dim, and
  softmax(QK^T, dim=-2) V compiles to the result of dim=-1, a relative error of 0.23;
- QK^T / t with a tensor t reads ((QK^T)^T / t^T)^T: with a mask behind it the fusion takes t for a number, and raises
  (pytorch issue 191203).
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import Builder, argument, calls, mutates, tensor
from .unfused import QUOTIENTS, leads_to_scores


def shield(graph: fx.Graph) -> int:
    """Rewrite every such softmax and quotient of a product's result; return how many."""
    shielded = 0
    for node in list(graph.nodes):
        if node.kwargs.get("out") is not None:  # Inductor's fusion does not take these for attention
            continue
        if calls(node, "softmax", "_softmax"):
            result = _inner_softmax(node)
        elif calls(node, *QUOTIENTS):
            result = _tensor_quotient(node)
        else:
            continue
        if result is not None:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            shielded += 1
    return shielded


def _inner_softmax(node: fx.Node) -> fx.Node | None:
    """softmax(x^T, -1)^T, over another dim than the last."""
    dim, source = argument(node, 1, "dim"), argument(node, 0, "input")
    found, out = tensor(source), tensor(node)
    if not isinstance(dim, int) or found is None or out is None or found.dim() < 2:
        return None
    if dim % found.dim() == found.dim() - 1 or not leads_to_scores(source):
        return None
    build = Builder(node)
    weights = build.call(torch.softmax, build.call(torch.transpose, source, dim, -1), -1, dtype=out.dtype)
    return build.call(torch.transpose, weights, dim, -1)


def _tensor_quotient(node: fx.Node) -> fx.Node | None:
    """(x^T / t^T)^T, in place if it was."""
    source, divisor = argument(node, 0, "input"), argument(node, 1, "other")
    found, out, given = tensor(source), tensor(node), tensor(divisor)
    if found is None or out is None or given is None or found.dim() < 2:
        return None
    if [str(size) for size in out.shape] != [str(size) for size in found.shape]:
        return None
    if node.kwargs.get("rounding_mode") or not leads_to_scores(source):
        return None
    build = Builder(node)
    if given.dim() == 1:
        divisor = build.call(torch.unsqueeze, divisor, -1)
    elif given.dim() > 1:
        divisor = build.call(torch.transpose, divisor, -2, -1)
    divide = torch.Tensor.div_ if mutates(node) else torch.div
    quotient = build.call(divide, build.call(torch.transpose, source, -2, -1), divisor)
    return build.call(torch.transpose, quotient, -2, -1)
