"""Read a tensor that is made of positions as a formula over its own indices, true for every length at once.

In: a node. Out: an Affine such as `i1 - i0 + 3`, a Split such as `0 where i1 - i0 <= 0, else -inf`, or None (unknown).
Nothing is computed and no guard is added: a comparison is decided only where the known ranges of the sizes prove it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as known

from .graph import argument, calls, mutates, name_of, tensor, value

LARGEST = 1 << 31
"""Constants are below it, so that no sum of a few overflows."""


@dataclass(frozen=True, eq=False)
class Affine:
    """`constant + sum of step * index`, one step for each dim; integers, unless there are no steps."""

    constant: Any
    """An int, a size (SymInt) or, in a floating tensor, a float. Compare it with `known` only: else it adds guards."""
    steps: tuple[int, ...]

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.constant + other.constant, tuple(map(operator.add, self.steps, other.steps)))

    def __sub__(self, other: Affine) -> Affine:
        return self + other.times(-1)

    def plus(self, number: Any) -> Affine:
        return Affine(self.constant + number, self.steps)

    def times(self, factor: Any) -> Affine:
        return Affine(self.constant * factor, tuple(step * factor for step in self.steps))

    def negated(self) -> Affine:
        """`not (a <= 0)` is `1 - a <= 0`."""
        return self.times(-1).plus(1)

    def at(self, indices: Sequence[Affine], rank: int) -> Affine:
        """The formula with another one in place of each index."""
        total = number(self.constant, rank)
        for step, index in zip(self.steps, indices, strict=True):
            total = total + index.times(step) if step else total
        return total


@dataclass(frozen=True, eq=False)
class Split:
    """`then` where `below <= 0`, else `other`. A boolean tensor holds 1 and 0."""

    below: Affine
    then: Affine
    other: Affine

    def at(self, indices: Sequence[Affine], rank: int) -> Split:
        return Split(*(part.at(indices, rank) for part in (self.below, self.then, self.other)))


Formula = Affine | Split
Shape = Sequence[Any]


def number(constant: Any, rank: int) -> Affine:
    return Affine(constant, (0,) * rank)


def index(dim: int, rank: int, step: int = 1, start: Any = 0) -> Affine:
    """`start + step * i_dim`."""
    return Affine(start, tuple(step if d == dim else 0 for d in range(rank)))


def formulas(node: fx.Node) -> dict[fx.Node, Formula | None]:
    """The formula of the node, and those of all that it was read from."""
    found: dict[fx.Node, Formula | None] = {}
    waiting = [node]
    while waiting:
        item = waiting[-1]
        rule = RULES.get(name_of(item.target)) if tensor(item) is not None else None
        if rule is None or not calls(item, name_of(item.target)) or mutates(item):
            found[item] = None
        missing = [source for source in item.all_input_nodes if source not in found] if item not in found else []
        if missing:
            waiting.extend(missing)
            continue
        if item not in found:
            assert rule is not None
            found[item] = _settled(rule(_Call(item, found)), tensor(item))
        waiting.pop()
    return found


# What is proved, for all indices of a shape and all sizes that its symbols admit.


def agree(a: Any, b: Any) -> bool:
    both = isinstance(a, Affine) and isinstance(b, Affine)
    return both and a.steps == b.steps and known(a.constant == b.constant)


def _never_positive(a: Affine, shape: Shape) -> bool:
    largest = a.constant
    for step, size in zip(a.steps, shape, strict=True):
        largest = largest + step * (size - 1) if step > 0 else largest
    return known(largest <= 0)


def _implies(a: Affine, b: Affine, shape: Shape) -> bool:
    """`a <= 0` only where `b <= 0`: certain if b is nowhere larger than a."""
    return _never_positive(b - a, shape)


def _restricted(formula: Formula, below: Affine, shape: Shape) -> Formula:
    """What is left of a formula where `below <= 0`."""
    if isinstance(formula, Split):
        if _implies(below, formula.below, shape):
            return formula.then
        if _implies(below, formula.below.negated(), shape):
            return formula.other
    return formula


def _select(below: Affine, then: Formula | None, other: Formula | None, shape: Shape) -> Formula | None:
    """`then` where `below <= 0`, else `other`, if one Split can say it."""
    if then is None or other is None:
        return None
    above = below.negated()
    if _never_positive(below, shape) or agree(_restricted(then, above, shape), other):
        return then
    if _never_positive(above, shape) or agree(_restricted(other, below, shape), then):
        return other
    then, other = _restricted(then, below, shape), _restricted(other, above, shape)
    return Split(below, then, other) if isinstance(then, Affine) and isinstance(other, Affine) else None


def _settled(formula: Formula | None, found: torch.Tensor | None) -> Formula | None:
    """The formula in its simplest form, or None where the tensor's dtype cannot hold it exactly."""
    if formula is None or found is None:
        return None
    ones = [0 if known(size == 1) else 1 for size in found.shape]
    if isinstance(formula, Split):
        below = _without_ones(formula.below, ones)
        then, other = (_settled(part, found) for part in (formula.then, formula.other))
        return _select(below, then, other, found.shape)
    formula = _without_ones(formula, ones)
    steps, constant = any(formula.steps), formula.constant
    if found.dtype in (torch.int32, torch.int64):
        fits = isinstance(constant, torch.SymInt) or (isinstance(constant, int) and abs(constant) < LARGEST)
    elif found.dtype == torch.bool:
        fits = not steps and isinstance(constant, int) and constant in (0, 1)
    else:
        fits = not steps and isinstance(constant, (int, float)) and found.dtype.is_floating_point
    return formula if fits else None


def _without_ones(a: Affine, ones: list[int]) -> Affine:
    return Affine(a.constant, tuple(map(operator.mul, a.steps, ones)))


# The calls that have a formula if their arguments have one.


@dataclass(frozen=True)
class _Call:
    """A call, with the formulas of what it is given."""

    node: fx.Node
    found: dict[fx.Node, Formula | None]

    @property
    def shape(self) -> Shape:
        result = tensor(self.node)
        assert result is not None
        return result.shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    def given(self, position: int, name: str, default: Any = None) -> Any:
        return value(argument(self.node, position, name, default))

    def read(self, item: Any) -> Formula | None:
        """The formula of an argument: a tensor, or a number."""
        if tensor(item) is not None:
            return self.found.get(item)
        item = value(item)
        if isinstance(item, (bool, int, float, torch.SymInt)):
            return number(int(item) if isinstance(item, bool) else item, 0)
        return None

    def operand(self, item: Any) -> Formula | None:
        """The formula of an argument that is broadcast to the shape of the result."""
        formula, source = self.read(item), tensor(item)
        indices = _broadcast(source.shape if source is not None else (), self.shape, 0, self.rank)
        return None if formula is None or indices is None else formula.at(indices, self.rank)


def _broadcast(have: Shape, want: Shape, first: int, rank: int) -> list[Affine] | None:
    """Indices of a tensor of shape `have` that is broadcast to `want`: the dims from `first` on, of `rank`."""
    indices = []
    skipped = len(want) - len(have)
    for dim, size in enumerate(have):
        if known(size == 1):
            indices.append(number(0, rank))
        elif skipped >= 0 and known(size == want[skipped + dim]):
            indices.append(index(first + skipped + dim, rank))
        else:
            return None
    return indices


def _elementwise(function: Callable[..., Formula | None], names: Sequence[str]) -> Callable[[_Call], Formula | None]:
    """A rule that applies `function(shape, *operands)` to every combination of the branches of its operands."""

    def rule(call: _Call) -> Formula | None:
        known_arguments = len(call.node.args) <= len(names) and set(call.node.kwargs) <= set(names)
        if not known_arguments:  # alpha, rounding_mode
            return None
        return _branches(function, [call.operand(argument(call.node, *item)) for item in enumerate(names)], call.shape)

    return rule


def _branches(function: Callable[..., Formula | None], operands: list[Any], shape: Shape) -> Formula | None:
    if None in operands:
        return None
    for i, operand in enumerate(operands):
        if isinstance(operand, Split):
            then, other = (
                _branches(function, [*operands[:i], part, *operands[i + 1 :]], shape)
                for part in (operand.then, operand.other)
            )
            return _select(operand.below, then, other, shape)
    return function(shape, *operands)


def _product(shape: Shape, a: Affine, b: Affine) -> Affine | None:
    for factor, other in ((a, b), (b, a)):
        if not any(factor.steps) and not (isinstance(factor.constant, torch.SymInt) and any(other.steps)):
            return other.times(factor.constant)
    return None


def _at_most(shape: Shape, a: Affine, b: Affine, margin: int = 0) -> Formula | None:
    """`a + margin <= b`, as 1 and 0."""
    if isinstance(a.constant, float) or isinstance(b.constant, float):
        return None
    return _select((a - b).plus(margin), number(1, len(shape)), number(0, len(shape)), shape)


def _equal(shape: Shape, a: Affine, b: Affine) -> Formula | None:
    if agree(a, b):
        return number(1, len(shape))
    sides = (_at_most(shape, a, b), _at_most(shape, b, a))
    return number(0, len(shape)) if any(agree(side, number(0, len(shape))) for side in sides) else None


def _not(shape: Shape, a: Affine) -> Formula | None:
    return _equal(shape, a, number(0, len(shape)))


def _and(shape: Shape, a: Affine, b: Affine) -> Formula | None:
    return _choice(shape, a, b, a)


def _or(shape: Shape, a: Affine, b: Affine) -> Formula | None:
    return _choice(shape, a, a, b)


def _choice(shape: Shape, condition: Affine, then: Affine, other: Affine) -> Formula | None:
    """Of a condition that is one of the booleans 1 and 0."""
    constant = condition.constant
    return (then if constant else other) if isinstance(constant, int) and constant in (0, 1) else None


def _where(call: _Call) -> Formula | None:
    args = list(call.node.args)
    if len(args) != 3 or call.node.kwargs:
        return None
    if call.node.op == "call_method":  # then.where(condition, other)
        args[0], args[1] = args[1], args[0]
    return _branches(_choice, [call.operand(item) for item in args], call.shape)


def _masked_fill(call: _Call) -> Formula | None:
    names = enumerate(("input", "mask", "value"))
    source, mask, filled = (call.operand(argument(call.node, i, name)) for i, name in names)
    return _branches(_choice, [mask, filled, source], call.shape)


def _triangle(call: _Call) -> Formula | None:
    """tril and triu: zero above, or below, a diagonal."""
    source, diagonal = call.operand(argument(call.node, 0, "input")), call.given(1, "diagonal", 0)
    row, column = (index(dim, call.rank) for dim in (call.rank - 2, call.rank - 1))
    hidden = (column - row).plus(-diagonal).negated()  # in tril: where column - row > diagonal
    if calls(call.node, "triu"):
        hidden = (column - row).plus(1 - diagonal)
    return _select(hidden, number(0, call.rank), source, call.shape)


def _cast(call: _Call) -> Formula | None:
    source, result = call.operand(argument(call.node, 0, "input")), tensor(call.node)
    if result is not None and result.dtype == torch.bool:
        negated = _branches(_not, [source], call.shape)
        return _branches(_not, [negated], call.shape)
    return source


def _expand(call: _Call) -> Formula | None:
    """Also `repeat`, where it repeats dims of size 1 only."""
    return call.operand(argument(call.node, 0, "input"))


def _reshape(call: _Call) -> Formula | None:
    """Calls that keep the elements in their order, and every dim that is not 1."""
    source = tensor(argument(call.node, 0, "input"))
    formula = call.read(argument(call.node, 0, "input"))
    if source is None or formula is None:
        return None
    old, new = ([d for d, size in enumerate(shape) if not known(size == 1)] for shape in (source.shape, call.shape))
    if len(old) != len(new) or not all(known(source.shape[a] == call.shape[b]) for a, b in zip(old, new, strict=True)):
        return None
    moved = dict(zip(old, new, strict=True))
    zero = number(0, call.rank)
    return formula.at([index(moved[d], call.rank) if d in moved else zero for d in range(source.dim())], call.rank)


def _getitem(call: _Call) -> Formula | None:
    """None, slices, integers and `...`; tensors of positions where they stand side by side."""
    source, formula = tensor(call.node.args[0]), call.read(call.node.args[0])
    items: Any = call.node.args[1]
    items = list(items) if isinstance(items, (tuple, list)) else [items]
    if source is None or formula is None:
        return None
    missing = [slice(None)] * (source.dim() - sum(item is not None and item is not Ellipsis for item in items))
    dots = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    items[dots : dots + 1] = missing
    tensors = [i for i, item in enumerate(items) if tensor(item) is not None]
    joined = max([len(tensor(items[i]).shape) for i in tensors], default=0)  # type: ignore[union-attr]
    if tensors and (tensors[-1] - tensors[0] >= len(tensors) or any(type(value(item)) is int for item in items)):
        return None
    indices: list[Affine] = []
    dim = 0  # of the result
    for i, item in enumerate(items):
        if item is None:
            dim += 1
            continue
        size = source.shape[len(indices)]
        if i in tensors:
            at = _gathered(call, item, dim, joined)
            dim += joined if i == tensors[-1] else 0
        elif isinstance(item, slice):
            start, step = value(item.start), value(item.step)
            at = _from_start(0 if start is None else start, size, call.rank)
            at = at + index(dim, call.rank, 1 if step is None else step) if at is not None else None
            dim += 1
        else:
            at = _from_start(value(item), size, call.rank)
        if at is None:
            return None
        indices.append(at)
    return formula.at(indices, call.rank) if dim == call.rank else None


def _from_start(start: Any, size: Any, rank: int) -> Affine | None:
    """A start that is not negative, or that counts from the end and does not pass the other one."""
    if not isinstance(start, (int, torch.SymInt)):
        return None
    if known(start >= 0):
        return number(start, rank)
    return number(start + size, rank) if known(start < 0) and known(start + size >= 0) else None


def _gathered(call: _Call, item: Any, first: int, joined: int) -> Affine | None:
    """The index that a tensor gives: no booleans, and none that counts from the end."""
    positions, formula = tensor(item), call.read(item)
    if positions is None or positions.dtype not in (torch.int32, torch.int64) or not isinstance(formula, Affine):
        return None
    indices = _broadcast(positions.shape, call.shape[first : first + joined], first, call.rank)
    at = formula.at(indices, call.rank) if indices is not None else None
    return at if at is not None and _never_positive(at.times(-1), call.shape) else None


def _arange(call: _Call) -> Formula | None:
    node = call.node
    if not set(node.kwargs) <= {"start", "end", "step", "device", "dtype", "requires_grad", "layout", "pin_memory"}:
        return None
    from_zero = len(node.args) + ("end" in node.kwargs) + ("start" in node.kwargs) == 1
    start, step = (0, 1) if from_zero else (call.given(0, "start", 0), call.given(2, "step", 1))
    return index(0, 1, step, start) if isinstance(step, int) and isinstance(start, (int, torch.SymInt)) else None


def _filled(constant: Any = None, position: int = 0, name: str = "") -> Callable[[_Call], Formula | None]:
    """A rule for one number everywhere, given or an argument; whose shape and dtype it takes does not matter."""
    return lambda call: call.operand(call.given(position, name) if constant is None else constant)


def _diff(call: _Call) -> Formula | None:
    """From each position to the next; the first from the one that is put in front."""
    source, before = (argument(call.node, *item) for item in ((0, "input"), (3, "prepend")))
    formula, ahead, in_front = call.read(source), call.read(before), tensor(before)
    dim, more = call.given(2, "dim", -1), call.given(4, "append")
    if not (isinstance(formula, Affine) and isinstance(ahead, Affine) and isinstance(dim, int)) or in_front is None:
        return None
    if call.given(1, "n", 1) != 1 or more is not None or not known(in_front.shape[dim] == 1):
        return None
    slope = number(formula.steps[dim], call.rank)
    start = formula.at([number(0, 1) if d == dim % call.rank else i for d, i in enumerate(_all(call.rank))], call.rank)
    return slope if agree(start - ahead, slope) else None


def _cumsum(call: _Call) -> Formula | None:
    formula, dim = call.read(argument(call.node, 0, "input")), call.given(1, "dim")
    if not isinstance(formula, Affine) or any(formula.steps) or not isinstance(dim, int):
        return None
    c = formula.constant
    return index(dim % call.rank, call.rank, c, c) if isinstance(c, int) and call.rank else None


def _all(rank: int) -> list[Affine]:
    return [index(dim, rank) for dim in range(rank)]


PAIR = ("input", "other")
RULES: dict[str, Callable[[_Call], Formula | None]] = {}
