"""Match softmax(QK^T * s + mask) V, spelled out with matmul or einsum.

In: a softmax node. Out: a Match whose anchor is the product with V, or None where it is no attention. From the softmax
the walk goes up to the scores (casts, scale, mask) and down to the product with V (casts, dropout).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import contraction, masks
from .contraction import Contraction, Roles
from .graph import CASTS, Builder, argument, calls, name_of, tensor
from .operand import changed_between, undo_repeats
from .pattern import Attend, Match, make_site, result_obstacle, shape_obstacle, squeeze_to, tokens_first

PRODUCTS = ("mul", "multiply", "imul", "mul_")
QUOTIENTS = ("div", "divide", "truediv", "true_divide", "itruediv", "div_")
SUMS = ("add", "iadd", "add_")
FILLS = ("masked_fill", "masked_fill_")
MAX_STEPS = 16
"""Calls between the scores and the softmax, or the softmax and the product with V; real models have up to five."""


@dataclass
class _Walk:
    """What the walk gathered."""

    scale: float = 1.0
    mask: str | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    obstacle: str | None = None

    def blocked(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle


def match_unfused(softmax: fx.Node, live: set[fx.Node]) -> Match | None:
    """The attention around a softmax; one over another dim than the last is none."""
    found, dim = tensor(softmax), argument(softmax, 1, "dim")
    if found is None or not isinstance(dim, int) or dim % found.dim() != found.dim() - 1:
        return None
    walk = _Walk()
    down = _to_weighted(softmax, walk, live)
    scores = _to_scores(argument(softmax, 0, "input"), walk, live, found)
    if down is None or scores is None:
        return None
    weights, weighted = down
    roles = contraction.assign_roles(scores, weighted, weights)
    return None if roles is None else _match(scores, weighted, roles, walk)


def _match(scores: Contraction, weighted: Contraction, roles: Roles, walk: _Walk) -> Match | None:
    out, raw = tensor(weighted.node), tensor(scores.node)
    assert out is not None and raw is not None
    q, k, v = roles.q, roles.k, roles.v
    for obstacle in (shape_obstacle(q, k, v), result_obstacle(out, q, v, roles.out_order)):
        if obstacle:
            walk.blocked(obstacle)
    k, v = undo_repeats(k, v, weighted.node)
    if raw.dtype != out.dtype:
        walk.blocked(f"scores in {raw.dtype}, result in {out.dtype}: needs one dtype".replace("torch.", ""))
    for operand in (q, k):  # read at the scores by the model, at the result by the op
        changed = changed_between(scores.node, weighted.node, operand.node)
        if changed is not None:
            walk.blocked(f"in-place {changed.name}: needs q and k unchanged between the scores and the result")
    site = make_site(
        weighted.node,
        scores.spelling,
        q,
        k,
        v,
        out.dtype,
        is_causal=walk.is_causal,
        mask=walk.mask,
        scale=walk.scale,
        dropout_p=walk.dropout_p,
        needs_grad=out.requires_grad,
        obstacle=walk.obstacle,
    )
    rank = out.dim()

    def emit(build: Builder, attend: Attend) -> fx.Node:
        result = attend(build, *(item.emit(build, out.dtype) for item in (q, k, v)))
        result = squeeze_to(build, result, rank)
        if roles.out_order != tuple(range(rank)):
            result = build.call(torch.permute, result, roles.out_order)
        return result

    return Match(site, weighted.node, emit, tokens_first(out, roles.out_order), q, k)


def _to_weighted(softmax: fx.Node, walk: _Walk, live: set[fx.Node]) -> tuple[fx.Node, Contraction] | None:
    """Down from the softmax: what the product with V reads, and that product."""
    weights = softmax
    for _ in range(MAX_STEPS):
        users = [user for user in weights.users if user in live]
        products = [user for user in users if contraction.read(user) is not None]
        onward = products or [user for user in users if calls(user, "dropout", "dropout_", *CASTS)]
        if not onward:
            return None
        if len(users) > 1:
            others = ", ".join(user.name for user in users if user is not onward[0])
            walk.blocked(f"attention weights: used elsewhere (by {others})")
        user = onward[0]
        if products:
            found = contraction.read(user)
            assert found is not None
            if found.added is not None or found.factor != 1:
                return None
            return weights, found
        if calls(user, "dropout", "dropout_") and argument(user, 2, "training", user.kwargs.get("train", True)):
            walk.dropout_p = float(argument(user, 1, "p", 0.5))
        if not _is_floating(user):
            return None
        weights = user
    return None


def _to_scores(node: Any, walk: _Walk, live: set[fx.Node], softmax: Any) -> Contraction | None:
    """Up from the softmax: the product of Q and K."""
    for _ in range(MAX_STEPS):
        found = contraction.read(node)
        if not isinstance(node, fx.Node) or tensor(node) is None:
            return None
        if sum(user in live for user in node.users) > 1:
            walk.blocked(f"scores: used elsewhere ({node.name})")
        if found is not None:
            if found.added is not None:
                if found.added_factor != 1:
                    walk.blocked(f"beta {found.added_factor} on the mask: needs 1")
                _masked(walk, found.added, softmax, added=True)
            _times(walk, found.factor)
            return found
        if not _is_floating(node):
            return None
        upward = _step(node, walk, softmax)
        if upward is None:
            return None
        node = upward
    return None


def _step(node: fx.Node, walk: _Walk, softmax: Any) -> fx.Node | None:
    """One call up, noting what it does to the scores; None where this cannot be a score any more."""
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if calls(node, *CASTS):
        return first  # type: ignore[no-any-return]
    if calls(node, *PRODUCTS, *QUOTIENTS) and not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        scores, factor = (first, second) if isinstance(first, fx.Node) else (second, first)
        if calls(node, *QUOTIENTS):
            if scores is second or node.kwargs.get("rounding_mode"):
                return None
            factor = 1 / factor if factor else None
        _times(walk, factor)
        return scores
    if calls(node, *SUMS) and isinstance(first, fx.Node) and isinstance(second, fx.Node):
        if node.kwargs.get("alpha", 1) != 1:
            walk.blocked(f"alpha {node.kwargs['alpha']} on the mask: needs 1")
        scores, mask = (first, second) if leads_to_scores(first) else (second, first)
        _masked(walk, mask, softmax, added=True)
        return scores
    if calls(node, *FILLS) and _is_masking(argument(node, 2, "value"), softmax):
        _masked(walk, second if second is not None else node.kwargs.get("mask"), softmax, added=False, when_true=True)
        return first  # type: ignore[no-any-return]
    if calls(node, "where") and len(node.args) == 3:
        condition, chosen, other = node.args
        if node.op == "call_method":  # scores.where(condition, other)
            condition, chosen = chosen, condition
        if _is_masking(other, softmax):
            _masked(walk, condition, softmax, added=False, when_true=False)
            return chosen  # type: ignore[return-value]
        if _is_masking(chosen, softmax):
            _masked(walk, condition, softmax, added=False, when_true=True)
            return other  # type: ignore[return-value]
    operands = [item for item in node.all_input_nodes if leads_to_scores(item)]
    if len(operands) != 1:
        return None
    walk.blocked(f"{name_of(node.target)} on the scores: needs scale and mask only")
    return operands[0]


def _times(walk: _Walk, factor: Any) -> None:
    if isinstance(factor, (int, float)):
        walk.scale *= factor
    else:
        walk.blocked("scale computed in the graph: needs a constant")


def _masked(walk: _Walk, mask: Any, softmax: Any, added: bool, when_true: bool = False) -> None:
    """Note a mask; `when_true`: a boolean one marks what is masked."""
    if walk.scale != 1:  # minus infinity times a negative scale, or a low value times a small one, masks nothing
        walk.blocked("scale after the mask: needs it before")
    found = tensor(mask)
    seen = None
    if found is not None and found.is_floating_point() == added:
        seen = masks.recognise(mask, softmax.shape[-2], softmax.shape[-1], true_means_masked=when_true)
    if seen == masks.CAUSAL:
        walk.is_causal = True
    elif seen != masks.NOTHING_MASKED:
        walk.mask = masks.describe(mask)


def _is_masking(fill: Any, softmax: Any) -> bool:
    """Whether a fill value makes a weight exactly zero: -inf, or a dtype's lowest value."""
    filled = masks.constant(fill) if isinstance(fill, fx.Node) else fill
    if filled is None or (isinstance(fill, fx.Node) and filled.numel() != 1):
        return False
    return float(filled) <= masks.masking_threshold(softmax.dtype)


def _is_floating(node: fx.Node) -> bool:
    found = tensor(node)
    return found is not None and found.is_floating_point()


def leads_to_scores(node: Any) -> bool:
    """Whether a product of two tensors lies up from here, through calls that keep the shape."""
    for _ in range(MAX_STEPS):
        found = tensor(node)
        if found is None:
            return False
        if contraction.read(node) is not None:
            return True
        same = [item for item in node.all_input_nodes if _same_shape(tensor(item), found)]
        if node.op == "placeholder" or not same:
            return False
        node = same[0]
    return False


def _same_shape(a: Any, b: Any) -> bool:
    return a is not None and [str(size) for size in a.shape] == [str(size) for size in b.shape]
