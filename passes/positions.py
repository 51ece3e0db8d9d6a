"""Which calls make a tensor out of positions, and what formula each has: `arange`, `<=`, views, gathers, `where`...

In: a node. Out: the formula of its value (see formula.py), and of all that it was read from; None for what is unknown.
Shapes are taken from the example values, so that `view`, `expand` or `repeat` need no reading of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as known

from .formula import (
    Affine,
    Formula,
    Shape,
    agree,
    at_most,
    branches,
    choice,
    constant,
    equal,
    index,
    inverse,
    never_positive,
    product,
    select,
    settle,
)
from .graph import argument, bare_name, calls, mutates, name_of, tensor, value


def formulas(node: fx.Node) -> dict[fx.Node, Formula]:
    """The formula of the node, and those of all that it was read from, as far as they are known."""
    found: dict[fx.Node, Formula | None] = {}
    waiting = [node]
    while waiting:
        item = waiting[-1]
        rule, result = RULES.get(bare_name(item)), tensor(item)
        readable = rule is not None and result is not None and calls(item, name_of(item.target)) and not mutates(item)
        missing = [source for source in item.all_input_nodes if source not in found] if readable else []
        if missing and item not in found:
            waiting.extend(missing)
            continue
        if item not in found:
            found[item] = settle(rule(Call(item, found)), result) if readable else None  # type: ignore[misc, arg-type]
        waiting.pop()
    return {item: formula for item, formula in found.items() if formula is not None}


@dataclass(frozen=True)
class Call:
    """A call, with the formulas of what it is given."""

    node: fx.Node
    found: dict[fx.Node, Formula | None]

    @property
    def result(self) -> torch.Tensor:
        found = tensor(self.node)
        assert found is not None
        return found

    @property
    def shape(self) -> Shape:
        return self.result.shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    def given(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that is no tensor."""
        return value(argument(self.node, position, name, default))

    def read(self, item: Any) -> Formula | None:
        """The formula of an argument: a tensor, or a number."""
        if isinstance(item, fx.Node) and tensor(item) is not None:
            return self.found[item]
        item = value(item)
        if isinstance(item, (int, float, torch.SymInt)):
            return constant(int(item) if isinstance(item, bool) else item, 0)
        return None

    def operand(self, item: Any) -> Formula | None:
        """The formula of an argument that is broadcast to the shape of the result."""
        formula, source = self.read(item), tensor(item)
        indices = broadcast(source.shape if source is not None else (), self.shape, 0, self.rank)
        return None if formula is None or indices is None else formula.at(indices, self.rank)


Rule = Callable[[Call], Formula | None]


def broadcast(have: Shape, want: Shape, first: int, rank: int) -> list[Affine] | None:
    """The indices of a tensor that is broadcast to the sizes `want`, which are the dims from `first` on, of `rank`."""
    added = len(want) - len(have)
    indices = []
    for dim, size in enumerate(have):
        if known(size == 1):
            indices.append(constant(0, rank))
        elif added >= 0 and known(size == want[added + dim]):
            indices.append(index(first + added + dim, rank))
        else:
            return None
    return indices


def _elementwise(function: Callable[..., Formula | None], names: tuple[str, ...] = ("input", "other")) -> Rule:
    def rule(call: Call) -> Formula | None:
        if len(call.node.args) > len(names) or not set(call.node.kwargs) <= set(names):  # alpha
            return None
        operands = [call.operand(argument(call.node, i, name)) for i, name in enumerate(names)]
        return branches(function, operands, call.shape)

    return rule


def _of_booleans(rule: Rule) -> Rule:
    """`~` and `&` of integers work on their bits."""
    return lambda call: rule(call) if call.result.dtype == torch.bool else None


def _filled(given: Any = None, position: int = 0, name: str = "") -> Rule:
    """One number everywhere: a given one, or an argument."""
    return lambda call: call.operand(call.given(position, name) if given is None else given)


def _arange(call: Call) -> Formula | None:
    bounds = [*call.node.args, *(name for name in ("start", "end", "step") if name in call.node.kwargs)]
    start, step = (0, 1) if len(bounds) == 1 else (call.given(0, "start", 0), call.given(2, "step", 1))
    if not isinstance(step, int) or not isinstance(start, (int, torch.SymInt)):
        return None
    return index(0, 1, step).plus(start)


def _expand(call: Call) -> Formula | None:
    """Also `repeat`, of dims of size 1."""
    return call.operand(argument(call.node, 0, "input"))


def _cast(call: Call) -> Formula | None:
    source = _expand(call)
    if call.result.dtype != torch.bool:
        return source
    return branches(inverse, [branches(inverse, [source], call.shape)], call.shape)


def _reshape(call: Call) -> Formula | None:
    """What keeps the elements in their order, and every dim but those of size 1."""
    source, formula = tensor(argument(call.node, 0, "input")), call.read(argument(call.node, 0, "input"))
    if source is None or formula is None:
        return None
    old, new = ([d for d, size in enumerate(shape) if not known(size == 1)] for shape in (source.shape, call.shape))
    if len(old) != len(new) or not all(known(source.shape[a] == call.shape[b]) for a, b in zip(old, new, strict=True)):
        return None
    moved = {a: index(b, call.rank) for a, b in zip(old, new, strict=True)}
    return formula.at([moved.get(dim, constant(0, call.rank)) for dim in range(source.dim())], call.rank)


def _getitem(call: Call) -> Formula | None:
    """None, slices, numbers, `...`; and tensors that stand side by side, which give the index themselves."""
    source, formula = tensor(call.node.args[0]), call.read(call.node.args[0])
    items: Any = call.node.args[1]
    items = list(items) if isinstance(items, (tuple, list)) else [items]
    if source is None or formula is None:
        return None
    whole = [slice(None)] * (source.dim() - sum(item is not None and item is not Ellipsis for item in items))
    dots = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    items[dots : dots + 1] = whole
    gathered = [i for i, item in enumerate(items) if tensor(item) is not None]
    joined = max([tensor(items[i]).dim() for i in gathered], default=0)  # type: ignore[union-attr]
    indices: list[Affine | None] = []
    dim = 0  # of the result
    for i, item in enumerate(items):
        if i in gathered:
            indices.append(_gathered(call, item, dim, joined))
            dim += joined if i == gathered[-1] else 0
        elif gathered and (gathered[0] < i < gathered[-1] or not (item is None or isinstance(item, slice))):
            return None
        elif item is None:
            dim += 1
        elif isinstance(item, slice):
            step = 1 if item.step is None else value(item.step)
            start = _counted(0 if item.start is None else value(item.start), source.shape[len(indices)], call.rank)
            indices.append(start + index(dim, call.rank, step) if start is not None and isinstance(step, int) else None)
            dim += 1
        else:
            indices.append(_counted(value(item), source.shape[len(indices)], call.rank))
    read = [at for at in indices if at is not None]
    return formula.at(read, call.rank) if len(read) == source.dim() and dim == call.rank else None


def _counted(start: Any, size: Any, rank: int) -> Affine | None:
    """A position that is not negative, or one counted from the end that lies inside."""
    if isinstance(start, bool) or not isinstance(start, (int, torch.SymInt)):
        return None
    if known(start >= 0):
        return constant(start, rank)
    return constant(start + size, rank) if known(start < 0) and known(start + size >= 0) else None


def _gathered(call: Call, item: Any, first: int, joined: int) -> Affine | None:
    """The index that a tensor gives: integers, none of them counted from the end."""
    positions, formula = tensor(item), call.read(item)
    if positions is None or positions.dtype not in (torch.int32, torch.int64) or not isinstance(formula, Affine):
        return None
    indices = broadcast(positions.shape, call.shape[first : first + joined], first, call.rank)
    at = None if indices is None else formula.at(indices, call.rank)
    return at if at is not None and never_positive(at.times(-1), call.shape) else None


def _where(call: Call) -> Formula | None:
    args = list(call.node.args)
    if len(args) != 3 or call.node.kwargs:
        return None
    if call.node.op == "call_method":  # then.where(condition, other)
        args[0], args[1] = args[1], args[0]
    return branches(choice, [call.operand(item) for item in args], call.shape)


def _masked_fill(call: Call) -> Formula | None:
    names = enumerate(("input", "mask", "value"))
    source, mask, filled = (call.operand(argument(call.node, i, name)) for i, name in names)
    return branches(choice, [mask, filled, source], call.shape)


def _triangle(call: Call) -> Formula | None:
    """Zero above the diagonal (tril), or below it (triu)."""
    diagonal = call.given(1, "diagonal", 0)
    if call.rank < 2 or not isinstance(diagonal, (int, torch.SymInt)):
        return None
    beyond = (index(call.rank - 1, call.rank) - index(call.rank - 2, call.rank)).plus(-diagonal)
    hidden = beyond.negated() if calls(call.node, "tril") else beyond.plus(1)  # beyond > 0, beyond < 0
    return select(hidden, constant(0, call.rank), _expand(call), call.shape)


def _diff(call: Call) -> Formula | None:
    """Each position minus the one before it, if the first has the same distance from what is put in front."""
    source, front = call.node.args[0], argument(call.node, 3, "prepend")
    formula, before, added, dim = call.read(source), call.read(front), tensor(front), call.given(2, "dim", -1)
    plain = call.given(1, "n", 1) == 1 and call.given(4, "append") is None and isinstance(dim, int)
    if not (plain and isinstance(formula, Affine) and isinstance(before, Affine) and added is not None):
        return None
    slope = constant(formula.steps[dim], call.rank)
    first = formula - index(dim % call.rank, call.rank, formula.steps[dim])
    return slope if known(added.shape[dim] == 1) and agree(first - before, slope) else None


def _cumsum(call: Call) -> Formula | None:
    formula, dim = _expand(call), call.given(1, "dim")
    if not isinstance(formula, Affine) or any(formula.steps) or not isinstance(dim, int) or not call.rank:
        return None
    each = formula.constant
    return index(dim % call.rank, call.rank, each).plus(each) if isinstance(each, int) else None


NAMES: dict[Rule, str] = {
    _elementwise(lambda shape, a, b: a + b): "add radd",
    _elementwise(lambda shape, a, b: a - b): "sub subtract",
    _elementwise(lambda shape, a, b: b - a): "rsub",
    _elementwise(lambda shape, a: a.times(-1), ("input",)): "neg negative",
    _elementwise(product): "mul rmul multiply",
    _elementwise(at_most): "le less_equal",
    _elementwise(lambda shape, a, b: at_most(shape, a, b, 1)): "lt less",
    _elementwise(lambda shape, a, b: at_most(shape, b, a)): "ge greater_equal",
    _elementwise(lambda shape, a, b: at_most(shape, b, a, 1)): "gt greater",
    _elementwise(equal): "eq",
    _elementwise(lambda shape, a, b: branches(inverse, [equal(shape, a, b)], shape)): "ne not_equal",
    _of_booleans(_elementwise(inverse, ("input",))): "invert not bitwise_not logical_not",
    _of_booleans(_elementwise(lambda shape, a, b: choice(shape, a, b, a))): "and bitwise_and logical_and",
    _of_booleans(_elementwise(lambda shape, a, b: choice(shape, a, a, b))): "or bitwise_or logical_or",
    _filled(1): "ones ones_like new_ones",
    _filled(0): "zeros zeros_like new_zeros",
    _filled(None, 0, "data"): "tensor scalar_tensor",
    _filled(None, 1, "fill_value"): "full full_like",
    _filled(None, 2, "fill_value"): "new_full",
    _arange: "arange",
    _cast: "to bool int long float double half bfloat16 type type_as cpu cuda contiguous clone detach",
    _expand: "expand expand_as broadcast_to repeat",
    _reshape: "unsqueeze squeeze view reshape flatten unflatten view_as reshape_as",
    _getitem: "getitem",
    _where: "where",
    _masked_fill: "masked_fill",
    _triangle: "tril triu",
    _diff: "diff",
    _cumsum: "cumsum",
}
RULES = {name: rule for rule, names in NAMES.items() for name in names.split()}
