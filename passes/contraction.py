"""Read matmul, bmm, baddbmm and einsum as one thing: two operands and the labels of their dims.

In: a call node. Out: a Contraction such as `bhid, bhjd -> bhij`, in which roles (query, key, value) can be looked up
whatever the order of the dims; None for any other call.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .graph import argument, calls, tensor
from .operand import Operand, peel


@dataclass(frozen=True)
class Contraction:
    """factor * (`left_labels, right_labels -> out_labels`) + added_factor * added; one letter a dim."""

    node: fx.Node
    spelling: str
    left: fx.Node
    right: fx.Node
    left_labels: str
    right_labels: str
    out_labels: str
    factor: Any = 1.0
    added: fx.Node | None = None
    added_factor: Any = 1.0


def read(node: Any) -> Contraction | None:
    """The contraction that a node computes."""
    if calls(node, "matmul", "bmm", "mm", "__matmul__"):
        return _product(node, argument(node, 0, "input"), argument(node, 1, "mat2", node.kwargs.get("other")))
    if calls(node, "baddbmm"):
        product = _product(node, argument(node, 1, "batch1"), argument(node, 2, "batch2"))
        if product is None:
            return None
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if beta == 0:  # the added tensor is not even read
            return replace(product, factor=alpha)
        return replace(product, factor=alpha, added=argument(node, 0, "input"), added_factor=beta)
    if calls(node, "einsum"):
        return _einsum(node)
    return None


def _product(node: fx.Node, left: Any, right: Any) -> Contraction | None:
    a, b = tensor(left), tensor(right)
    if a is None or b is None or a.dim() != b.dim() or a.dim() < 2:
        return None
    batch = string.ascii_uppercase[: a.dim() - 2]
    if [str(size) for size in a.shape[:-2]] != [str(size) for size in b.shape[:-2]]:
        return None
    return Contraction(node, "matmul", left, right, f"{batch}ik", f"{batch}kj", f"{batch}ij")


def _einsum(node: fx.Node) -> Contraction | None:
    equation = argument(node, 0, "equation")
    operands: list[Any] = list(node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    tensors = [tensor(operand) for operand in operands]
    if any(found is None for found in tensors):
        return None
    equation = equation.replace(" ", "")
    inputs, out = equation.split("->")
    labels = inputs.split(",")
    if "..." in equation:  # the same leading dims on both, named by digits
        hidden = {found.dim() - len(text) + 3 for text, found in zip(labels, tensors, strict=True)}  # type: ignore[union-attr]
        if len(hidden) != 1 or equation.count("...") != 3:
            return None
        batch = string.digits[: hidden.pop()]
        inputs, out = inputs.replace("...", batch), out.replace("...", batch)
        labels = inputs.split(",")
    if any(len(set(text)) != len(text) for text in (*labels, out)):
        return None
    sizes: dict[str, str] = {}
    for text, found in zip(labels, tensors, strict=True):
        for label, size in zip(text, found.shape, strict=True):  # type: ignore[union-attr]
            if sizes.setdefault(label, str(size)) != str(size):
                return None
    return Contraction(node, "einsum", operands[0], operands[1], labels[0], labels[1], out)


@dataclass(frozen=True)
class Roles:
    """Q, K and V of scores = contract(Q, K), result = contract(softmax(scores), V), and the result's own dim order."""

    q: Operand
    k: Operand
    v: Operand
    out_order: tuple[int, ...]
    """Dim i of the result is dim out_order[i] of (batch..., tokens, head_dim)."""


def assign_roles(scores: Contraction, weighted: Contraction, weights: fx.Node) -> Roles | None:
    """Who is who, if the two contractions are an attention; `weights` is what the second one reads of the first."""
    labels = scores.out_labels
    key = labels[-1:]  # the softmax runs over the last dim of the scores
    q_first = key in scores.right_labels
    q_node, q_labels = (scores.left, scores.left_labels) if q_first else (scores.right, scores.right_labels)
    k_node, k_labels = (scores.right, scores.right_labels) if q_first else (scores.left, scores.left_labels)
    batch = [label for label in labels if label in q_labels and label in k_labels]
    query = [label for label in labels if label in q_labels and label not in k_labels]
    inner = [label for label in q_labels if label in k_labels and label not in labels]
    if len(query) != 1 or len(inner) != 1 or len(batch) + 2 != len(labels) or key in q_labels:
        return None
    if len(q_labels) != len(labels) or len(k_labels) != len(labels):
        return None

    if weighted.left is weights:
        own, v_node, v_labels = weighted.left_labels, weighted.right, weighted.right_labels
    else:
        own, v_node, v_labels = weighted.right_labels, weighted.left, weighted.left_labels
    if len(own) != len(labels) or weighted.left is weighted.right:
        return None
    to_weighted = dict(zip(labels, own, strict=True))  # a letter of the scores to the letter of the same dim there
    value = [label for label in v_labels if label not in own]
    v_batch, v_key, v_query = [to_weighted[b] for b in batch], to_weighted[key], to_weighted[query[0]]
    if len(value) != 1 or set(v_labels) != {*v_batch, v_key, value[0]} or len(v_labels) != len(labels):
        return None
    if set(weighted.out_labels) != {*v_batch, v_query, value[0]}:
        return None
    result = [*v_batch, v_query, value[0]]
    return Roles(
        q=_operand(q_node, q_labels, [*batch, query[0], inner[0]]),
        k=_operand(k_node, k_labels, [*batch, key, inner[0]]),
        v=_operand(v_node, v_labels, [*v_batch, v_key, value[0]]),
        out_order=tuple(result.index(label) for label in weighted.out_labels),
    )


def _operand(node: fx.Node, labels: str, wanted: list[str]) -> Operand:
    return peel(Operand(node, tuple(labels.index(label) for label in wanted)))
