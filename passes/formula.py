"""A tensor as a formula over its own indices, and what can be proved about it for every length at once.

In: an Affine such as `i1 - i0 + 3`, a Split such as `0 where i1 - i0 <= 0, else -inf`. Out: the simplest form of it.
Nothing is computed and no guard is added: a comparison is decided only where the known ranges of the sizes prove it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true as known

Shape = Sequence[Any]
LARGEST_INT = 1 << 31
"""Constants of an integer tensor are below it, so that the sum of a few does not wrap around."""
LARGEST_EXACT = 256
"""Every floating dtype holds the integers up to it; only those are compared."""


@dataclass(frozen=True, eq=False)
class Affine:
    """`constant + sum of step * index`, with one int step for each dim."""

    constant: Any
    """An int or a size (SymInt); in a floating tensor also a float. Compare it with `known`: `==` would add a guard."""
    steps: tuple[int, ...]

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.constant + other.constant, tuple(map(operator.add, self.steps, other.steps)))

    def __sub__(self, other: Affine) -> Affine:
        return self + other.times(-1)

    def plus(self, constant: Any) -> Affine:
        return Affine(self.constant + constant, self.steps)

    def times(self, factor: Any) -> Affine:
        return Affine(self.constant * factor, tuple(step * factor for step in self.steps))

    def negated(self) -> Affine:
        """`not (a <= 0)` is `1 - a <= 0`."""
        return self.times(-1).plus(1)

    def at(self, indices: Sequence[Affine], rank: int) -> Affine:
        """With another formula, over `rank` dims, in place of each index: every view and every gather is this."""
        total = constant(self.constant, rank)
        for step, other in zip(self.steps, indices, strict=True):
            total = total + other.times(step) if step else total
        return total


@dataclass(frozen=True, eq=False)
class Split:
    """`then` where `below <= 0`, else `other`. Booleans are 1 and 0."""

    below: Affine
    then: Affine
    other: Affine

    def at(self, indices: Sequence[Affine], rank: int) -> Split:
        return Split(*(part.at(indices, rank) for part in (self.below, self.then, self.other)))


Formula = Affine | Split


def constant(value: Any, rank: int) -> Affine:
    """One number everywhere; a float that is a small integer becomes one."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT:
        value = int(value)
    return Affine(value, (0,) * rank)


def index(dim: int, rank: int, step: int = 1) -> Affine:
    """`step` times the index of one dim."""
    return Affine(0, tuple(step if d == dim else 0 for d in range(rank)))


def agree(a: Any, b: Any) -> bool:
    """Whether both are affine and the same."""
    both = isinstance(a, Affine) and isinstance(b, Affine)
    return both and a.steps == b.steps and known(a.constant == b.constant)


def never_positive(a: Affine, shape: Shape) -> bool:
    """Whether `a <= 0` at all indices of the shape, for all sizes that its symbols admit."""
    largest = a.constant
    for step, size in zip(a.steps, shape, strict=True):
        largest = largest + step * (size - 1) if step > 0 else largest
    return known(largest <= 0)


def restrict(formula: Formula, below: Affine, shape: Shape) -> Formula:
    """What is left of a formula where `below <= 0`. That implies `b <= 0` if b is nowhere larger than `below`."""
    if isinstance(formula, Split):
        if never_positive(formula.below - below, shape):
            return formula.then
        if never_positive(formula.below.negated() - below, shape):
            return formula.other
    return formula


def select(below: Affine, then: Formula | None, other: Formula | None, shape: Shape) -> Formula | None:
    """`then` where `below <= 0`, else `other`; None if that takes more than one Split."""
    if then is None or other is None:
        return None
    above = below.negated()
    if never_positive(below, shape) or agree(restrict(then, above, shape), other):
        return then
    if never_positive(above, shape) or agree(restrict(other, below, shape), then):
        return other
    then, other = restrict(then, below, shape), restrict(other, above, shape)
    return Split(below, then, other) if isinstance(then, Affine) and isinstance(other, Affine) else None


def settle(formula: Formula | None, found: torch.Tensor) -> Formula | None:
    """The formula in its simplest form, without the index of any dim of size 1; None if the dtype may not hold it."""
    if formula is None:
        return None
    shown = [0 if known(size == 1) else 1 for size in found.shape]

    def shorten(a: Affine) -> Affine:
        return Affine(constant(a.constant, 0).constant, tuple(map(operator.mul, a.steps, shown)))

    if isinstance(formula, Split):
        then, other = settle(formula.then, found), settle(formula.other, found)
        return select(shorten(formula.below), then, other, found.shape)
    formula = shorten(formula)
    return formula if _fits(formula, found.dtype) else None


def _fits(formula: Affine, dtype: torch.dtype) -> bool:
    value, varies = formula.constant, any(formula.steps)
    if dtype in (torch.int32, torch.int64):
        return isinstance(value, torch.SymInt) or (isinstance(value, int) and abs(value) < LARGEST_INT)
    if dtype == torch.bool:
        return not varies and isinstance(value, int) and value in (0, 1)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or varies:
        return False
    if isinstance(value, int):
        return abs(value) <= LARGEST_EXACT
    return isinstance(value, float) and (abs(value) <= torch.finfo(dtype).max or abs(value) == float("inf"))


# Functions of affine formulas. `branches` applies them to Splits.


def branches(function: Callable[..., Formula | None], operands: Sequence[Any], shape: Shape) -> Formula | None:
    """`function(shape, *operands)` for every combination of the branches of its operands, all of that shape."""
    if any(operand is None for operand in operands):
        return None
    for i, operand in enumerate(operands):
        if isinstance(operand, Split):
            before, after = operands[:i], operands[i + 1 :]
            then = branches(function, [*before, operand.then, *after], shape)
            other = branches(function, [*before, operand.other, *after], shape)
            return select(operand.below, then, other, shape)
    return function(shape, *operands)


def product(shape: Shape, a: Affine, b: Affine) -> Formula | None:
    """With a plain number; of two sizes too, but not of a size and an index."""
    for factor, other in ((a, b), (b, a)):
        if not any(factor.steps) and not (any(other.steps) and isinstance(factor.constant, torch.SymInt)):
            return other.times(factor.constant)
    return None


def at_most(shape: Shape, a: Affine, b: Affine, margin: int = 0) -> Formula | None:
    """`a + margin <= b`, of integers: `a < b` has the margin 1."""
    if isinstance(a.constant, float) or isinstance(b.constant, float):
        return None
    return select((a - b).plus(margin), constant(1, len(shape)), constant(0, len(shape)), shape)


def equal(shape: Shape, a: Affine, b: Affine) -> Formula | None:
    """Known only if it is the same everywhere."""
    sides = at_most(shape, a, b), at_most(shape, b, a)
    for result in (0, 1):
        matching = [agree(side, constant(result, len(shape))) for side in sides]
        if any(matching) if result == 0 else all(matching):
            return constant(result, len(shape))
    return None


def inverse(shape: Shape, a: Affine) -> Formula | None:
    """`a == 0`, which is `not a`."""
    return equal(shape, a, constant(0, len(shape)))


def choice(shape: Shape, condition: Affine, then: Affine, other: Affine) -> Formula | None:
    """Of a condition that is a boolean, 1 or 0."""
    decided = isinstance(condition.constant, int) and condition.constant in (0, 1) and not any(condition.steps)
    return None if not decided else then if condition.constant else other
