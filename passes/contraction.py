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
from .layout import Layout
from .operand import Operand, peel

HIDDEN_LABELS = "αβγδεζηθ"


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
    """Of two matrices, or of as many as the dims in front of them say, broadcast like torch.matmul's."""
    a, b = tensor(left), tensor(right)
    if a is None or b is None or min(a.dim(), b.dim()) < 2:
        return None
    batch = string.ascii_uppercase[: max(a.dim(), b.dim()) - 2]
    left_batch, right_batch = (batch[len(batch) - found.dim() + 2 :] for found in (a, b))
    return Contraction(node, "matmul", left, right, f"{left_batch}ik", f"{right_batch}kj", f"{batch}ij")


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
    if "..." in equation:  # the same leading dims on both, named by letters that no equation has
        hidden = {found.dim() - len(text) + 3 for text, found in zip(labels, tensors, strict=True)}  # type: ignore[union-attr]
        if len(hidden) != 1 or equation.count("...") != 3:
            return None
        batch = HIDDEN_LABELS[: hidden.pop()]
        inputs, out = inputs.replace("...", batch), out.replace("...", batch)
        labels = inputs.split(",")
    if any(len(set(text)) != len(text) for text in (*labels, out)):
        return None
    sizes: dict[str, str] = {}
    for text, found in zip(labels, tensors, strict=True):
        for label, size in zip(text, found.shape, strict=True):  # type: ignore[union-attr]
            held = sizes.setdefault(label, str(size))
            if held != str(size) and not (label in out and "1" in (held, str(size))):
                return None
    return Contraction(node, "einsum", operands[0], operands[1], labels[0], labels[1], out)


@dataclass(frozen=True)
class Roles:
    """Q, K and V of scores = contract(Q, K), result = contract(softmax(scores), V), and the result's own dim order."""

    q: Operand
    k: Operand
    v: Operand
    out_order: tuple[int, ...]
    """Dim i of the result is dim out_order[i] of (batch..., heads..., tokens, head_dim)."""
    leading: Operand
    """The one of them whose batch and heads the result has."""
    shared: str
    """Of the scores, the dims that K has as well, as they stand in (batch..., heads...)."""
    groups: str
    """Those that it lacks: heads that share one of K's."""


def query_of(scores: Contraction, key: str) -> str | None:
    """Which dim of the scores are the queries, where the softmax runs over `key`; None if there is none.

    It is the last one that K does not have: those before are heads that share one KV head.
    """
    sides = _sides(scores, key)
    if sides is None:
        return None
    (_, q_labels), (_, k_labels) = sides
    return next((label for label in reversed(scores.out_labels) if label in q_labels and label not in k_labels), None)


Side = tuple[fx.Node, str]
"""One operand of a contraction, with its labels."""


def _sides(scores: Contraction, key: str) -> tuple[Side, Side] | None:
    """Q and K: the operand without `key`, and the one with it."""
    left, right = (scores.left, scores.left_labels), (scores.right, scores.right_labels)
    if (key in left[1]) == (key in right[1]):
        return None
    return (left, right) if key in right[1] else (right, left)


def assign_roles(
    scores: Contraction, weighted: Contraction, weights: fx.Node, layout: Layout, key: str
) -> Roles | None:
    """Who is who, if the two contractions are an attention over the dim `key` of the scores.

    `weights` is what the second one reads of the first, `layout` says which of its dims are which of the scores'. Of
    scores `ABid,ABjd->ABij` with the key j and a result `ABij,ABje->ABie`: leading A and B, query i, inner d, value e.
    """
    sides, query = _sides(scores, key), query_of(scores, key)
    if sides is None or query is None:
        return None
    (q_node, q_labels), (k_node, k_labels) = sides
    leading = [label for label in scores.out_labels if label not in (key, query)]
    inner = [label for label in q_labels if label in k_labels and label not in scores.out_labels]
    if len(inner) != 1 or not set(q_labels) <= {*leading, query, inner[0]}:
        return None
    if not set(k_labels) <= {*leading, key, inner[0]}:
        return None

    if weighted.left is weighted.right or weights not in (weighted.left, weighted.right):
        return None
    w_first = weighted.left is weights
    w_labels, v_labels = weighted.left_labels, weighted.right_labels
    if not w_first:
        w_labels, v_labels = v_labels, w_labels
    v_node = weighted.right if w_first else weighted.left
    v_leading = layout.as_regrouped("".join(leading))
    if v_leading is None or sorted(layout.dims) != sorted([key, query, *v_leading]):
        return None
    there = dict(zip(layout.dims, w_labels, strict=True))  # the label of the same dim in the second contraction
    value = [label for label in v_labels if label not in w_labels]
    if len(value) != 1 or there[query] in v_labels:
        return None
    if there[key] not in v_labels or there[key] in weighted.out_labels:
        return None
    result = [*(there[label] for label in v_leading), there[query], value[0]]
    if set(weighted.out_labels) != set(result) or len(weighted.out_labels) != len(result):
        return None

    if layout.regrouped:
        shared, groups, head_dims = leading, [], 0  # all of it is the batch, as only the whole is known to be the same
        if not all(label in q_labels and label in k_labels for label in leading):
            return None
    else:
        groups = [label for label in leading if label not in k_labels and there[label] not in v_labels]
        shared = [label for label in leading if label not in groups]
        head_dims = 1 if len(shared) > 1 else 0
    q = _operand(q_node, q_labels, [*shared, *groups, query, inner[0]], head_dims + len(groups))
    k = _operand(k_node, k_labels, [*shared, key, inner[0]], head_dims)
    v_shared = [*v_leading] if layout.regrouped else shared
    v = _operand(v_node, v_labels, [*(there[label] for label in v_shared), there[key], value[0]], head_dims)
    order = [*(there[label] for label in [*v_shared, *groups]), there[query], value[0]]
    out_order = tuple(order.index(label) for label in weighted.out_labels)
    return Roles(q, k, v, out_order, v if layout.regrouped else q, "".join(shared), "".join(groups))


def _operand(node: fx.Node, labels: str, wanted: list[str], head_dims: int) -> Operand:
    order = tuple(labels.index(label) if label in labels else None for label in wanted)
    return peel(Operand(node, order, head_dims))
