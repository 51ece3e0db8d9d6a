"""Match softmax(QK^T * s + mask) V, spelled out with matmul or einsum.

In: a softmax node. Out: a Match whose anchor is the product with V, or None where it is no attention. From the softmax
the walk goes up to the scores (casts, views, scale, mask) and down to the product with V (casts, views, dropout).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from . import contraction, masks
from .contraction import Contraction, Roles
from .graph import CASTS, RESHAPES, Builder, argument, calls, is_computed, mutates, name_of, said, tensor
from .layout import ONE, Layout
from .operand import changed_between, permutation_of, undo_repeats
from .pattern import Attend, Match, make_site, result_obstacle, shape_obstacle, tokens_first

PRODUCTS = ("mul", "multiply", "imul", "mul_")
QUOTIENTS = ("div", "divide", "truediv", "true_divide", "itruediv", "div_")
SUMS = ("add", "iadd", "add_")
DIFFERENCES = ("sub", "subtract", "isub", "sub_")
FILLS = ("masked_fill", "masked_fill_")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
JOINS = ("cat", "concat", "concatenate")
MAX_STEPS = 16
"""Calls between the scores and the softmax, or the softmax and the product with V; real models have up to five."""


@dataclass
class _Walk:
    """What the walk gathered."""

    scale: float = 1.0
    masks: list[_Mask] = field(default_factory=list)
    path: list[fx.Node] = field(default_factory=list)
    """The calls between the scores and the softmax, the last first."""
    dropout_p: float = 0.0
    obstacle: str | None = None
    sink: str | None = None
    """A call that adds columns to the scores, which the softmax sees and V does not."""

    def blocked(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle


@dataclass(frozen=True)
class _Mask:
    """A mask, and the call that masks with it."""

    mask: Any
    call: fx.Node
    factor: float = 1.0
    """Of one that is added."""
    fills: float | None = None
    """What the scores become where it says so; None: it is added."""
    when_true: bool = False
    """It marks what is masked."""


def match_unfused(softmax: fx.Node, live: set[fx.Node]) -> Match | None:
    """The attention around a softmax."""
    found, dim = tensor(softmax), argument(softmax, 1, "dim")
    if found is None or not isinstance(dim, int) or found.dim() == 0:
        return None
    walk = _Walk()
    down = _to_weighted(softmax, walk, live)
    scores = _to_scores(softmax, walk, live)
    if down is None or scores is None:
        return None
    way, weighted = down
    raw = tensor(scores.node)
    assert raw is not None
    layout: Layout | None = Layout(dict(zip(scores.out_labels, map(str, raw.shape), strict=True)), scores.out_labels)
    layouts = {}
    for node in [scores.node, *reversed(walk.path), softmax, *way]:
        layout = None if layout is None else layout if node is scores.node else layout.through(node)
        layouts[node] = layout
    at_softmax = layouts[softmax]
    if layout is None or at_softmax is None:
        return None
    key = at_softmax.dims[dim]
    weights = way[-1] if way else softmax
    roles = contraction.assign_roles(scores, weighted, weights, layout, key)
    return None if roles is None or _is_gate(roles) else _match(scores, weighted, roles, walk, layouts, key)


def _is_gate(roles: Roles) -> bool:
    """Whether the keys are one matrix of parameters: a gate over experts, or a memory."""
    matrix = all(dim is None for dim in roles.k.order[:-2]) and len(roles.q.order) > 2
    return matrix and not is_computed(roles.k.node)


def _match(
    scores: Contraction,
    weighted: Contraction,
    roles: Roles,
    walk: _Walk,
    layouts: dict[fx.Node, Layout | None],
    key: str,
) -> Match:
    out, raw = tensor(weighted.node), tensor(scores.node)
    assert out is not None and raw is not None
    q, k, v = roles.q, roles.k, roles.v
    if walk.sink is not None:
        walk.obstacle = f"attention sinks ({walk.sink} on the scores): needs none"
    for obstacle in (shape_obstacle(q, k, v), _result_obstacle(out, roles)):
        if obstacle:
            walk.blocked(obstacle)
    k, v = undo_repeats(k, v, weighted.node)
    if raw.dtype != out.dtype:
        walk.blocked(f"scores in {raw.dtype}, result in {out.dtype}: needs one dtype".replace("torch.", ""))
    for operand in (q, k):  # read at the scores by the model, at the result by the op
        changed = changed_between(scores.node, weighted.node, operand.node)
        if changed is not None:
            walk.blocked(f"in-place {said(changed)}: needs q and k unchanged between the scores and the result")
    seen = _read_masks(walk, layouts, roles, f"{contraction.query_of(scores, key)}{key}", weighted.node)
    site = make_site(
        weighted.node,
        scores.spelling,
        q,
        k,
        v,
        out.dtype,
        mask=seen.facts,
        scale=walk.scale,
        dropout_p=walk.dropout_p,
        needs_grad=out.requires_grad,
        obstacle=walk.obstacle,
    )

    def emit(build: Builder, attend: Attend) -> fx.Node:
        tensors = [item.emit(build, out.dtype) for item in (q, k, v)]
        result = roles.leading.split(build, attend(build, *tensors, **seen.emit(build)))
        if roles.out_order != tuple(range(out.dim())):
            result = build.call(torch.permute, result, roles.out_order)
        return result

    return Match(site, weighted.node, emit, tokens_first(out, roles.out_order), q, k)


def _result_obstacle(out: torch.Tensor, roles: Roles) -> str | None:
    expected = [*roles.leading.sizes[:-2], roles.q.sizes[-2], roles.v.sizes[-1]]
    return result_obstacle(out, expected, roles.out_order)


def _read_masks(
    walk: _Walk, layouts: dict[fx.Node, Layout | None], roles: Roles, query_and_key: str, weighted: fx.Node
) -> masks.Reading:
    """What they let through together, the one nearest to the product first, of scores with these two dims."""
    q_len, kv_len = roles.q.sizes[-2], roles.k.sizes[-2]
    out = tensor(weighted)
    assert out is not None
    given, place = [], masks.Place.standard(roles.q)
    for item in reversed(walk.masks):
        where, found = layouts[item.call], tensor(item.mask)
        assert where is not None
        order = where.as_regrouped(roles.shared + roles.groups)
        if order is None or found is None or sorted(where.dims.replace(ONE, "")) != sorted(order + query_and_key):
            walk.blocked(f"mask in {said(item.call)}: needs the scores as the product gives them")
            continue
        if (found.dtype == torch.bool) == (item.fills is None) or found.dim() > len(where.dims):
            walk.blocked(f"mask {found.dtype} in {said(item.call)}: needs numbers to add, or booleans to fill by")
            continue
        if changed_between(item.call, weighted, item.mask) is not None:
            walk.blocked(f"mask in {said(item.call)}: written before the result, needs to stay as it is")
        heads = roles.q.batch_and_heads[1]
        batch = len(order) - heads
        here = masks.Place(roles.q, tuple(where.dims), (*order, *query_and_key), (batch, heads))
        if where.dims[-2:] != query_and_key or ONE in where.dims:
            here = replace(here, labels=tuple(f"{i}{label}" if label == ONE else label for i, label in enumerate(where.dims)))
        if given and here != place:
            walk.blocked(f"masks on scores in two shapes (in {said(item.call)}): needs one")
            continue
        place = here
        given.append(masks.Given(item.mask, item.when_true, item.factor, item.fills))
    return masks.read(given, place, q_len, kv_len, dtype=out.dtype)


def _to_weighted(softmax: fx.Node, walk: _Walk, live: set[fx.Node]) -> tuple[list[fx.Node], Contraction] | None:
    """Down from the softmax: the calls up to what the product with V reads, and that product."""
    way: list[fx.Node] = []
    weights = softmax
    for _ in range(MAX_STEPS):
        users = [user for user in weights.users if user in live]
        products = [user for user in users if contraction.read(user) is not None]
        onward = products or [user for user in users if _passes_on(user) or _indexes(user, weights)]
        if not onward:
            return None
        if len(users) > 1:
            others = ", ".join(said(_writer(user) or user) for user in users if user is not onward[0])
            walk.blocked(f"attention weights: used elsewhere (by {others})")
        user = onward[0]
        if products:
            found = contraction.read(user)
            assert found is not None
            return (way, found) if found.added is None and found.factor == 1 else None
        if calls(user, "dropout", "dropout_") and argument(user, 2, "training", user.kwargs.get("train", True)):
            walk.dropout_p = float(argument(user, 1, "p", 0.5))
        if _indexes(user, weights):
            walk.blocked(f"attention weights: cut or reordered by {said(user)}, needs them as they are")
        if not _is_floating(user):
            return None
        weights = user
        way.append(user)
    return None


def _passes_on(node: fx.Node) -> bool:
    """Whether the call holds what it reads, in another dtype, order or shape, or without what dropout takes out."""
    return calls(node, "dropout", "dropout_", *CASTS, *RESHAPES) or permutation_of(node) is not None or _is_same(node)


def _is_same(node: fx.Node) -> bool:
    """`expand` to the shape that it has, as torch's own decompositions write it."""
    return calls(node, "expand") and _same_shape(tensor(argument(node, 0, "input")), tensor(node))


def _indexes(node: fx.Node, weights: fx.Node) -> bool:
    """Whether the call may cut the keys, as `weights[..., :-1]` does; one that reorders looks the same, and is kept."""
    found, whole = tensor(node), tensor(weights)
    if found is None or whole is None or not calls(node, "getitem", "narrow", "slice"):
        return False
    return found.dim() == whole.dim() and [*map(str, found.shape[:-1])] == [*map(str, whole.shape[:-1])]


def _to_scores(softmax: fx.Node, walk: _Walk, live: set[fx.Node]) -> Contraction | None:
    """Up from the softmax: the product of Q and K."""
    reader, node = softmax, argument(softmax, 0, "input")
    for _ in range(MAX_STEPS):
        found = contraction.read(node)
        if not isinstance(node, fx.Node) or tensor(node) is None:
            return None
        users = [user for user in node.users if user in live and user is not reader]
        if users:
            written = next(filter(None, map(_writer, users)), None)
            if written is not None:
                walk.blocked(f"scores: changed in place by {said(written)}: needs a new tensor")
            walk.blocked(f"scores: used elsewhere (by {', '.join(dict.fromkeys(map(said, users)))})")
        if found is not None:
            if found.added is not None:
                _masked(walk, found.added, node, found.added_factor)
            _times(walk, found.factor)
            return found
        if not _is_floating(node):
            return None
        upward = _step(node, walk)
        if upward is None:
            return None
        walk.path.append(node)
        reader, node = node, upward
    return None


def _writer(node: fx.Node) -> fx.Node | None:
    """The call, if it writes to what it reads, or the one that writes through the view that it is."""
    if mutates(node):
        return node
    is_view = calls(node, "getitem", "select", "narrow", *RESHAPES) or permutation_of(node) is not None
    return next((user for user in node.users if mutates(user)), None) if is_view else None


def _step(node: fx.Node, walk: _Walk) -> fx.Node | None:
    """One call up, noting what it does to the scores; None where this cannot be a score any more."""
    first, second = argument(node, 0, "input"), argument(node, 1, "other")
    if calls(node, *CASTS, *RESHAPES) or permutation_of(node) is not None or _is_same(node):
        return first  # type: ignore[no-any-return]
    if calls(node, *PRODUCTS, *QUOTIENTS) and not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        scores, factor = (first, second) if isinstance(first, fx.Node) else (second, first)
        if calls(node, *QUOTIENTS):
            if scores is second or node.kwargs.get("rounding_mode"):
                return None
            factor = 1 / factor if factor else None
        _times(walk, factor)
        return scores
    if calls(node, *SUMS, *DIFFERENCES) and isinstance(first, fx.Node) and isinstance(second, fx.Node):
        factor = node.kwargs.get("alpha", 1)
        scores, mask = (first, second) if leads_to_scores(first) else (second, first)
        if calls(node, *DIFFERENCES):
            if scores is second:
                return None
            factor = -factor
        elif scores is second and factor != 1:
            walk.blocked(f"alpha {factor} on the scores: needs 1")
        _masked(walk, mask, node, factor)
        return scores
    if calls(node, *FILLS):
        fill = _filled_with(argument(node, 2, "value"), node)
        if fill is not None:
            _masked(walk, second if second is not None else node.kwargs.get("mask"), node, fills=fill, when_true=True)
            return first  # type: ignore[no-any-return]
    if calls(node, "where") and len(node.args) == 3:
        condition, chosen, other = node.args
        if node.op == "call_method":  # scores.where(condition, other)
            condition, chosen = chosen, condition
        fill = _filled_with(other, node)
        if fill is not None:
            _masked(walk, condition, node, fills=fill)
            return chosen  # type: ignore[return-value]
        fill = _filled_with(chosen, node)
        if fill is not None:
            _masked(walk, condition, node, fills=fill, when_true=True)
            return other  # type: ignore[return-value]
    operands = [item for item in node.all_input_nodes if leads_to_scores(item)]
    if len(operands) != 1:
        return None
    if calls(node, *JOINS):
        walk.sink = said(node)
    walk.blocked(f"{name_of(node.target)} on the scores: needs scale and mask only")
    return operands[0]


def _times(walk: _Walk, factor: Any) -> None:
    if isinstance(factor, (int, float)):
        walk.scale *= factor
    else:
        walk.blocked("scale computed in the graph: needs a constant")


def _masked(
    walk: _Walk, mask: Any, call: fx.Node, factor: Any = 1.0, *, fills: float | None = None, when_true: bool = False
) -> None:
    if not isinstance(factor, (int, float)) or not isinstance(mask, fx.Node):
        walk.blocked("mask times what is computed in the graph: needs a constant")
        return
    if fills is not None and not walk.scale > 0:  # minus infinity times a negative scale masks nothing
        walk.blocked(f"scale {walk.scale:g} after the mask: needs one above 0")
    if fills is not None and fills != -math.inf and walk.scale < 1:
        walk.blocked(f"scale {walk.scale:g} after the mask: needs it before")
    walk.masks.append(_Mask(mask, call, factor * walk.scale, fills, when_true))


def _filled_with(fill: Any, scores: fx.Node) -> float | None:
    """A fill value that makes a weight exactly zero: -inf, or a dtype's lowest value; None for any other."""
    found = tensor(scores)
    assert found is not None
    filled = masks.constant(fill) if isinstance(fill, fx.Node) else fill
    if filled is None or (isinstance(fill, fx.Node) and filled.numel() != 1):
        return None
    return float(filled) if float(filled) <= masks.masking_threshold(found.dtype) else None


def _is_floating(node: fx.Node) -> bool:
    """In a dtype that attention is computed in: a cast to another, such as float8, is not the same numbers."""
    found = tensor(node)
    return found is not None and found.dtype in FLOATING


def leads_to_scores(node: Any) -> bool:
    """Whether a product of two tensors lies up from here, through calls that keep the elements or the shape."""
    for _ in range(MAX_STEPS):
        found = tensor(node)
        if found is None:
            return False
        if contraction.read(node) is not None:
            return True
        if calls(node, *JOINS):
            return any(leads_to_scores(item) for item in node.all_input_nodes)
        moved = calls(node, *RESHAPES) or permutation_of(node) is not None
        same = [item for item in node.all_input_nodes if moved or _same_shape(tensor(item), found)]
        if node.op == "placeholder" or not same:
            return False
        node = same[0]
    return False


def _same_shape(a: Any, b: Any) -> bool:
    return a is not None and b is not None and [str(size) for size in a.shape] == [str(size) for size in b.shape]
