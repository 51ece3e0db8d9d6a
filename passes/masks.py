"""Read a mask as what the graph shows it to be: an interval of the keys for each query, and what is left as tensors.

In: the mask nodes of a call. Out: a `Seen`: numbers for what is proved from positions alone (causal, windows), bounds
where a position is compared with a tensor, and of the rest the smallest tensors that the graph has, as they are before
they are broadcast and joined. What is proved is never built. Transformers builds its masks in the graph, out of
`arange`: as a formula (positions.py) such a mask is known for every length. What has no formula, such as a mask filled
in place, is computed once, at compile time, if all lengths are known. An input is never known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as known
from torch.utils._python_dispatch import _disable_current_modes

from sagecompile.mask import Mask

from .formula import Affine, Split, index
from .graph import Builder, argument, bare_name, calls, mutates, name_of, number, storage, tensor, value, written
from .operand import Operand
from .positions import formulas

LOWEST = torch.finfo(torch.float32).min
MAX_ELEMENTS = 1 << 28
"""Of the largest tensor that is computed here; a mask above it is not looked at."""

PURE = frozenset(
    (
        "add and arange bitwise_and bitwise_not bitwise_or bool cat clone concat contiguous cumsum detach diff div "
        "eq expand expand_as finfo float full full_like ge getitem gt hstack invert le logical_and logical_not "
        "logical_or lt masked_fill mul ne neg new_full new_ones new_zeros not ones ones_like or permute reshape "
        "rsub scalar_tensor size squeeze stack sub tensor to transpose tril triu truediv type type_as unsqueeze "
        "view where zeros zeros_like"
    ).split()
)
"""Calls whose result depends on their arguments alone."""
PURE_BUT_IN_PLACE = ("fill_", "masked_fill_", "tril_", "triu_")
"""Calls that write to their first argument as well: repeated in order, with all others that write to it."""


@dataclass(frozen=True)
class Part:
    """A tensor of a mask, as the graph has it."""

    node: fx.Node
    dims: tuple[int, ...]
    """Which of the scores' dims its own are, rising; it is broadcast over the others."""
    hides: bool = False
    """Of booleans: whether True is what is not seen."""


@dataclass(frozen=True)
class Bound:
    """`node + plus`, of integers, that the position of a key is compared with."""

    part: Part
    plus: int


@dataclass(frozen=True)
class Term:
    """What is added to the scores, or what they are filled with, in the order in which the model does it."""

    part: Part
    factor: float | None
    """Of what is added; None: where these booleans say so the scores become the lowest number."""


@dataclass(frozen=True)
class Seen:
    """Which keys a query sees: all that is given must let it."""

    ahead: Any = None
    behind: Any = None
    low: tuple[Bound, ...] = ()
    high: tuple[Bound, ...] = ()
    lets: tuple[Part, ...] = ()
    terms: tuple[Term, ...] = ()
    is_soft: bool = False
    """Whether a number hides what an interval says: a row without any other key would average over those."""

    def __and__(self, other: Seen) -> Seen:
        """What both let through, `other` being nearer to the softmax; two symbols must read the same."""
        bounds = {}
        for name in ("ahead", "behind"):
            mine, its = getattr(self, name), getattr(other, name)
            bounds[name] = mine if its is None else its if mine is None else _least(mine, its)
        joined = {name: getattr(self, name) + getattr(other, name) for name in ("low", "high", "lets", "terms")}
        return Seen(**bounds, **joined, is_soft=self.is_soft or other.is_soft)

    @property
    def is_affine(self) -> bool:
        """Whether nothing of it is a tensor."""
        return not (self.low or self.high or self.lets or self.terms)

    def leaves_a_key(self, q_len: Any, kv_len: Any) -> bool:
        """Whether every query is sure to see its own position."""
        return self.is_affine and (self.behind is None or known(q_len <= kv_len))


def _least(a: Any, b: Any) -> Any:
    if known(a <= b):
        return a
    if known(b <= a):
        return b
    raise _Unknown


class _Unknown(Exception):
    """What cannot be said as a Seen in this way."""


@dataclass(frozen=True)
class Given:
    """A mask as a call has it, of scores of `rank` dims of which the last two are the queries and the keys."""

    node: fx.Node
    hides: bool = False
    """Of booleans: whether True is what is not seen."""
    factor: float = 1.0
    """What it is multiplied by before it is added."""
    fills: float | None = None
    """What the scores are filled with where it hides; None: it is added, or as SDPA takes it."""
    dims: tuple[int, ...] | None = None
    """As of a Part; None: its dims are the last ones."""


@dataclass(frozen=True)
class Reading:
    """The masks of one call, in the order in which they are applied; `place` brings a part to (B, H, Nq, Nk)."""

    seen: Seen
    place: Place
    dtype: torch.dtype
    """Of the op's q."""
    cast: bool = False
    """Whether autocast rounds what is added to that."""
    steady: bool = False
    """Whether nothing writes to what was read: it may be read anywhere."""

    @property
    def facts(self) -> Mask:
        seen = self.seen
        parts = [*seen.lets, *(term.part for term in seen.terms)]
        bounds = {
            name: " and ".join(self.place.described(bound.part) for bound in getattr(seen, name)) or None
            for name in ("low", "high")
        }
        said = " and ".join(dict.fromkeys(self.place.described(part) for part in parts)) or None
        return Mask(seen.ahead, seen.behind, **bounds, tensor=said)

    def emit(self, build: Builder) -> dict[str, Any]:
        """The op's arguments that say which keys are seen; built once for all calls that read the same."""
        seen = self.seen
        found = {name: number(build, getattr(seen, name)) for name in ("ahead", "behind")}
        found = {name: bound for name, bound in found.items() if name == "ahead" or bound is not None}
        if seen.is_affine:
            return found
        if not (self.steady and self.place.is_fixed):
            return found | self._emit_tensors(build)
        nodes = self.nodes()
        memory = nodes[0].meta.setdefault("sagecompile_made", {})  # all layers have the same mask
        key = (build.graph, str(seen), self.place.key, self.dtype, self.cast)
        if key not in memory:
            memory[key] = self._emit_tensors(_builder_after(build, nodes))
        return found | memory[key]

    def nodes(self) -> list[fx.Node]:
        seen = self.seen
        bounds = [bound.part.node for bound in (*seen.low, *seen.high)]
        return [*bounds, *(part.node for part in seen.lets), *(term.part.node for term in seen.terms)]

    def _emit_tensors(self, build: Builder) -> dict[str, Any]:
        seen, found = self.seen, {}
        for name, nearest in (("low", torch.maximum), ("high", torch.minimum)):
            for bound in getattr(seen, name):
                node = self._emit_bound(build, bound)
                found[name] = build.call(nearest, found[name], node) if name in found else node
        lets = None
        for part in seen.lets:
            node = self.place.emit(build, part)
            node = build.call(torch.logical_not, node) if part.hides else node
            lets = node if lets is None else build.call(torch.logical_and, lets, node)
        bias = None
        for term in seen.terms:
            node = self.place.emit(build, term.part)
            if term.factor is None:
                hidden = build.call(torch.logical_not, node) if not term.part.hides else node
                before = 0.0 if bias is None else build.call(torch.Tensor.to, bias, torch.float32)
                bias = build.call(torch.where, hidden, LOWEST, before)
                continue
            node = build.call(torch.mul, node, term.factor) if term.factor != 1 else node
            bias = node if bias is None else build.call(torch.add, bias, node)
        if bias is not None:
            have = tensor(bias)
            assert have is not None
            if have.dtype != self.dtype and (self.cast or have.dtype != torch.float32):
                bias = build.call(torch.Tensor.to, bias, self.dtype if self.cast else torch.float32)
            if lets is not None:
                bias = build.call(torch.where, lets, bias, -math.inf)
        mask = lets if bias is None else bias
        return found if mask is None else found | {"mask": mask}

    def _emit_bound(self, build: Builder, bound: Bound) -> fx.Node:
        """(B or 1, Nq or 1) of int32."""
        node = self.place.emit(build, bound.part, whole=True)
        node = build.call(torch.Tensor.select, build.call(torch.Tensor.select, node, 3, 0), 1, 0)
        node = build.call(torch.add, node, bound.plus) if bound.plus else node
        return build.call(torch.Tensor.to, build.call(torch.clamp, node, 0, 2**31 - 1), torch.int32)


def _builder_after(build: Builder, nodes: Collection[fx.Node]) -> Builder:
    """Of calls right behind the last of the nodes, ahead of all that may use them."""
    anchor = None
    for item in build.graph.nodes:
        anchor = item if item in nodes else anchor
    assert anchor is not None
    anchor = anchor.next
    while anchor.op in ("placeholder", "get_attr"):
        anchor = anchor.next
    return Builder(anchor, build.replaced, build.metadata)


@dataclass(frozen=True)
class Place:
    """How the dims of the scores as the model has them become (batch, heads, queries, keys)."""

    q: Operand
    """Whose batch and heads are joined as those of the scores."""
    labels: tuple[Any, ...]
    """Of the scores where the mask is applied."""
    order: tuple[Any, ...]
    """The same, as (batch..., heads..., queries, keys); what is not in it has one element."""
    groups: tuple[int, int] = (1, 1)
    """How many of them are joined to the batch, and how many to the heads."""

    @classmethod
    def standard(cls, q: Operand) -> Place:
        """Of scores that are as SDPA has them."""
        labels = tuple(range(len(q.order)))
        return cls(q, labels, labels, q.batch_and_heads)

    @property
    def is_plain(self) -> bool:
        return self.labels == self.order and self.groups == (1, 1)

    @property
    def is_fixed(self) -> bool:
        """Whether it takes no size from the graph."""
        return max(self.groups) < 2 or all(isinstance(size, int) for size in self.q.sizes[:-2])

    @property
    def key(self) -> tuple[Any, ...]:
        """What it depends on."""
        return self.labels, self.order, self.groups, tuple(map(str, self.q.sizes[:-2]))

    def described(self, part: Part) -> str:
        """`bool (2, 1, 1, 40)`: as it is in the graph, of the scores' dims."""
        found = tensor(part.node)
        assert found is not None
        sizes = {dim: size for dim, size in zip(part.dims, found.shape, strict=True)}
        shape = [str(sizes.get(dim, 1)) for dim in range(min(part.dims, default=0), len(self.labels))]
        return f"{str(found.dtype).removeprefix('torch.')} ({', '.join(shape)})"

    def emit(self, build: Builder, part: Part, whole: bool = False) -> fx.Node:
        """`whole`: with all four dims, also where those in front would be 1."""
        node, rank = part.node, len(self.labels)
        in_front = min(part.dims, default=rank) if self.is_plain and not whole else 0
        for dim in range(in_front, rank):
            if dim not in part.dims:
                node = build.call(torch.unsqueeze, node, dim - in_front)
        if self.is_plain:
            return node
        for dim in reversed(range(rank)):
            if self.labels[dim] not in self.order:
                node = build.call(torch.squeeze, node, dim)
        kept = [label for label in self.labels if label in self.order]
        if kept != [*self.order]:
            node = build.call(torch.permute, node, tuple(kept.index(label) for label in self.order))
        batch, heads = self.groups
        for position, first, joined in ((0, 0, batch), (1, batch, heads)):
            if joined == 0:
                node = build.call(torch.unsqueeze, node, position)
            elif joined > 1:
                node = self._join(build, node, position, first, joined)
        return node

    def _join(self, build: Builder, node: fx.Node, position: int, first: int, joined: int) -> fx.Node:
        found = tensor(node)
        assert found is not None
        last = position + joined - 1
        if not all(known(size == 1) for size in found.shape[position : last + 1]):
            sizes = self._sizes(build)[first : first + joined]
            behind = [-1] * (found.dim() - last - 1)
            node = build.call(torch.Tensor.expand, node, *[-1] * position, *sizes, *behind)
        return build.call(torch.flatten, node, position, last)

    def _sizes(self, build: Builder) -> list[Any]:
        """Of (batch..., heads...)."""
        order = self.q.order[:-2]
        return [1 if dim is None else build.size(self.q.node, dim) for dim in order]


def read(
    given: Sequence[Given],
    place: Place,
    q_len: Any,
    kv_len: Any,
    *,
    dtype: torch.dtype,
    is_causal: bool = False,
    cast: bool = False,
) -> Reading:
    """What they let through together; `is_causal`: SDPA's."""
    rank = len(place.labels)
    axes = _Axes(rank, q_len, kv_len)
    readers = [_Reader(axes, soft) for soft in (True, False)]
    start = Seen(ahead=0) if is_causal else Seen()
    for reader in readers:
        try:
            seen = start
            for item in given:
                seen = seen & _remembered(item, reader)
        except _Unknown:
            continue
        if not seen.is_soft or seen.leaves_a_key(q_len, kv_len):
            steady = not given or _unchanged(reader.read | {*Reading(seen, place, dtype).nodes()})
            if steady or not reader.read - {item.node for item in given}:
                return Reading(seen, place, dtype, cast, steady)
    seen = start
    for item in given:
        seen = seen & _whole(item, _dims(item, rank))
    return Reading(seen, place, dtype, cast)


def _dims(item: Given, rank: int) -> tuple[int, ...]:
    if item.dims is not None:
        return item.dims
    found = tensor(item.node)
    assert found is not None
    return tuple(range(rank - found.dim(), rank))


def _whole(item: Given, dims: tuple[int, ...]) -> Seen:
    """The mask as it is."""
    found, part = tensor(item.node), Part(item.node, dims, item.hides)
    assert found is not None
    if item.fills is not None:
        return Seen(lets=(part,)) if item.fills == -math.inf else Seen(terms=(Term(part, None),))
    return Seen(lets=(part,)) if found.dtype == torch.bool else Seen(terms=(Term(part, item.factor),))


def _remembered(item: Given, reader: _Reader) -> Seen:
    """Of one mask; all layers ask about the same one."""
    memory = item.node.meta.setdefault("sagecompile_seen", {})
    axes, how = reader.axes, (item.hides, item.factor, item.fills, item.dims, reader.soft)
    key = (item.node.graph, axes.rank, str(axes.q_len), str(axes.kv_len), *how)
    if key not in memory:
        own = _Reader(reader.axes, reader.soft)
        try:
            memory[key] = own.mask(item), own.read
        except _Unknown:
            memory[key] = None, own.read
    seen, nodes = memory[key]
    reader.read |= nodes
    if seen is None:
        raise _Unknown
    return seen  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Axes:
    rank: int
    q_len: Any
    kv_len: Any

    @property
    def query(self) -> int:
        return self.rank - 2

    @property
    def key(self) -> int:
        return self.rank - 1


VIEWS = "expand expand_as broadcast_to contiguous clone detach".split()
COMPARED = {"le": (1, 0), "less_equal": (1, 0), "lt": (1, -1), "less": (1, -1)}
COMPARED |= {"ge": (-1, 0), "greater_equal": (-1, 0), "gt": (-1, 1), "greater": (-1, 1)}
"""Comparisons of `a` with `b`: 1 where a may not be larger, and what is added to b for the largest (or least) a."""


@dataclass
class _Reader:
    """Takes masks apart. `soft`: also where a number hides, which is right only if every row keeps a key."""

    axes: _Axes
    soft: bool
    read: set[fx.Node] = field(default_factory=set)
    """All that was looked into."""

    def mask(self, item: Given) -> Seen:
        found, dims = tensor(item.node), _dims(item, self.axes.rank)
        if found is None or any(dim < 0 for dim in dims):
            raise _Unknown
        if item.fills is not None:
            if item.fills == -math.inf:
                return self.condition(item.node, dims, not item.hides)
            seen = self.condition(item.node, dims, not item.hides) if self.soft else Seen(lets=(Part(item.node, dims),))
            return replace(seen, is_soft=True) if seen.is_affine else _whole(item, dims)
        if found.dtype == torch.bool:
            return self.condition(item.node, dims, not item.hides)
        return self.bias(item.node, dims) if item.factor == 1 else _whole(item, dims)

    def condition(self, node: fx.Node, dims: tuple[int, ...], visible: bool) -> Seen:
        """Of booleans, of which `visible` is what is seen."""
        self.read.add(node)
        proved = self._proved(node, dims, visible)
        if proved is not None:
            return proved
        inside = self._inside(node, dims)
        if inside is not None:
            return self.condition(*inside, visible)
        if not mutates(node):
            if calls(node, "logical_not", "bitwise_not", "__invert__", "invert", "not_"):
                return self.condition(argument(node, 0, "input"), dims, not visible)
            names = ("and_", "__and__", "bitwise_and", "logical_and")
            if calls(node, *(names if visible else ("or_", "__or__", "bitwise_or", "logical_or"))):
                sides = [self._operand(item, node, dims) for item in (argument(node, 0, "input"), argument(node, 1, "other"))]
                if all(side is not None and tensor(side[0]).dtype == torch.bool for side in sides):  # type: ignore[union-attr]
                    one, other = (self.condition(*side, visible) for side in sides if side is not None)
                    return one & other
            compared = self._compared(node, dims, visible)
            if compared is not None:
                return compared
        return Seen(lets=(Part(node, dims, not visible),))

    def bias(self, node: fx.Node, dims: tuple[int, ...]) -> Seen:
        """Of numbers that are added."""
        self.read.add(node)
        proved = self._proved(node, dims, True)
        if proved is not None:
            return proved
        inside = self._inside(node, dims)
        if inside is not None:
            return self.bias(*inside)
        whole = Seen(terms=(Term(Part(node, dims), 1.0),))
        if mutates(node):
            return whole
        if calls(node, "add") and node.kwargs.get("alpha", 1) == 1:
            sides = [self._operand(item, node, dims) for item in (argument(node, 0, "input"), argument(node, 1, "other"))]
            result = tensor(node)
            assert result is not None
            if all(side is not None and tensor(side[0]).dtype == result.dtype for side in sides):  # type: ignore[union-attr]
                one, other = (self.bias(*side) for side in sides if side is not None)
                both = one & other
                # Terms alone would only be added again, and what softly hides in one hides less beside another.
                return whole if both.is_soft or (both.ahead is None and both.behind is None and not both.lets) else both
        filled = self._filled(node, dims)
        return whole if filled is None else filled

    def _filled(self, node: fx.Node, dims: tuple[int, ...]) -> Seen | None:
        """A number and -inf, by a condition."""
        if calls(node, "masked_fill"):
            condition, other, hidden = argument(node, 1, "mask"), argument(node, 0, "input"), True
            if _number(argument(node, 2, "value")) != -math.inf:
                return None
        elif calls(node, "where") and len(node.args) == 3:
            condition, then, other = node.args if node.op == "call_function" else (node.args[1], node.args[0], node.args[2])
            hidden = _number(then) == -math.inf
            if not hidden:
                then, other = other, then
                if _number(then) != -math.inf:
                    return None
        else:
            return None
        side = self._operand(condition, node, dims)
        if side is None or tensor(side[0]).dtype != torch.bool:  # type: ignore[union-attr]
            return None
        seen = self.condition(*side, not hidden)
        if _number(other) == 0:
            return seen
        rest = self._operand(other, node, dims)
        return None if rest is None else self.bias(*rest) & seen

    def _operand(self, item: Any, node: fx.Node, dims: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]] | None:
        """A tensor that is broadcast to the call's result, with its dims."""
        found = tensor(item)
        return None if found is None or found.dim() > len(dims) else (item, dims[len(dims) - found.dim() :])

    def _inside(self, node: fx.Node, dims: tuple[int, ...]) -> tuple[fx.Node, tuple[int, ...]] | None:
        """What a call only broadcasts, copies or gives dims of size 1."""
        source = argument(node, 0, "input") if node.op in ("call_function", "call_method") else None
        found, inner = tensor(node), tensor(source)
        if found is None or inner is None or mutates(node) or inner.dtype != found.dtype:
            return None
        if calls(node, *VIEWS) or (calls(node, "to", "bool", "type") and inner.device == found.device):
            return self._operand(source, node, dims)
        added = _added_dims(node, found.dim())
        if added is None or inner.dim() != found.dim() - len(added):
            return None
        return source, tuple(dim for i, dim in enumerate(dims) if i not in added)

    def _proved(self, node: fx.Node, dims: tuple[int, ...], visible: bool) -> Seen | None:
        """From its formula, or from its value."""
        axes, found = self.axes, tensor(node)
        if found is None:
            return None
        fits = all(
            known(found.shape[dims.index(axis)] == 1) or known(found.shape[dims.index(axis)] == length)
            for axis, length in ((axes.query, axes.q_len), (axes.key, axes.kv_len))
            if axis in dims
        )
        if not fits:
            return None
        seen = _from_formula(node, dims, axes, visible) or _from_value(node, dims, axes, visible)
        if seen is None or (seen.is_soft and not self.soft):
            return None
        return seen

    def _compared(self, node: fx.Node, dims: tuple[int, ...], visible: bool) -> Seen | None:
        """A position of the keys, compared with integers that are the same for all keys and heads."""
        name = bare_name(node)
        if name not in COMPARED or not calls(node, name_of(node.target)) or len(node.args) != 2 or node.kwargs:
            return None
        upward, margin = COMPARED[name]
        sides = [self._operand(item, node, dims) for item in node.args]
        for which, (side, other) in enumerate(((sides[0], sides[1]), (sides[1], sides[0]))):
            if side is None or other is None:
                continue
            start = self._position_of_keys(*side)
            if start is None or not self._is_per_row(*other):
                continue
            # side `upward` other, or the other way round; then its opposite where that is what is seen.
            up, plus = (upward, margin) if which == 0 else (-upward, -margin)
            if not visible:
                up, plus = -up, plus + up
            bound = Bound(Part(*other), plus - start + (up > 0))
            return Seen(high=(bound,)) if up > 0 else Seen(low=(bound,))
        return None

    def _position_of_keys(self, node: fx.Node, dims: tuple[int, ...]) -> int | None:
        """c, if it is j + c."""
        found, key = tensor(node), self.axes.key
        if found is None or key not in dims or found.dtype not in (torch.int32, torch.int64):
            return None
        if not known(found.shape[dims.index(key)] == self.axes.kv_len):
            return None
        read = formulas(node)
        formula = read.get(node)
        if not isinstance(formula, Affine) or not isinstance(formula.constant, int) or not _unchanged(read):
            return None
        wanted = tuple(1 if dim == key else 0 for dim in dims)
        return formula.constant if formula.steps == wanted else None

    def _is_per_row(self, node: fx.Node, dims: tuple[int, ...]) -> bool:
        """Whether it has one integer for each query of a sequence, or fewer."""
        found = tensor(node)
        if found is None or found.dtype not in (torch.int32, torch.int64) or self.axes.rank != 4:
            return False
        self.read.add(node)
        one = {1, self.axes.key}
        return all(known(size == 1) for dim, size in zip(dims, found.shape, strict=True) if dim in one)


def _number(item: Any) -> float | None:
    """A number, or a tensor of one that the graph itself makes."""
    if isinstance(item, (int, float)):
        return float(item)
    found = tensor(item)
    if found is None or found.numel() != 1:
        return None
    computed = constant(item)
    return None if computed is None else float(computed)


def _added_dims(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """Dims of size 1 that the call puts in, if it does nothing else."""
    at = argument(node, 1, "dim")
    if calls(node, "unsqueeze") and isinstance(at, int):
        return (at % rank,)
    if not calls(node, "getitem"):
        return None
    items = list(at) if isinstance(at, (tuple, list)) else [at]
    if not all(item is None or item is Ellipsis or item == slice(None) for item in items):
        return None
    if Ellipsis in items:
        dots = items.index(Ellipsis)
        items[dots : dots + 1] = [slice(None)] * (rank - len(items) + 1)
    return tuple(i for i, item in enumerate(items) if item is None)


def _from_formula(node: fx.Node, dims: tuple[int, ...], axes: _Axes, visible: bool) -> Seen | None:
    """Whatever the lengths."""
    found, read = tensor(node), formulas(node)
    formula = read.get(node)
    if found is None or formula is None or not _unchanged(read):
        return None
    parts = (formula.then, formula.other) if isinstance(formula, Split) else (formula,)
    allowed = [_takes_part(part, found.dtype, not visible) for part in parts]
    if None in allowed or not any(allowed):
        return None
    if all(allowed):
        return Seen()
    assert isinstance(formula, Split)
    hidden = formula.other if allowed[0] else formula.then
    below = formula.below if allowed[0] else formula.below.negated()
    if not (axes.query in dims and axes.key in dims):
        return None
    at = dims.index(axes.query), dims.index(axes.key)
    if not all(known(found.shape[i] == size) for i, size in zip(at, (axes.q_len, axes.kv_len), strict=True)):
        return None
    query, key = (index(i, len(dims), 0 if known(found.shape[i] == 1) else 1) for i in at)
    is_soft = found.dtype != torch.bool and hidden.constant != -math.inf
    ahead, behind = below - (key - query), below - (query - key)
    if not any(ahead.steps) and _is_bound(node, -ahead.constant):
        return Seen(ahead=-ahead.constant, is_soft=is_soft)
    if not any(behind.steps) and _is_bound(node, -behind.constant):
        return Seen(behind=-behind.constant, is_soft=is_soft)
    return None


def _is_bound(node: fx.Node, bound: Any) -> bool:
    """Not negative, as a row might see no key then, and one that can be said in the graph."""
    return known(bound >= 0) and number(Builder(node), bound, look=True) is not None


def _from_value(node: fx.Node, dims: tuple[int, ...], axes: _Axes, visible: bool) -> Seen | None:
    """Of what changes in place, or is no formula, with lengths that are known."""
    mask = constant(node)
    if mask is None or mask.numel() == 0:
        return None
    allowed = _allowed(mask, not visible)
    if allowed is None:
        return None
    if bool(allowed.all()):
        return Seen()
    if dims[-2:] != (axes.query, axes.key) or mask.shape[-2:] != (axes.q_len, axes.kv_len):
        return None
    rows = allowed.reshape(-1, *allowed.shape[-2:])
    is_soft = mask.dtype != torch.bool and not bool((mask[~allowed] == -math.inf).all())
    first = rows[0].nonzero()
    if len(first) == 0:
        return None
    apart = first[:, 1] - first[:, 0]
    ahead, behind = int(apart.max()), -int(apart.min())
    full = rows.new_ones(rows.shape)
    for bounds in ({"ahead": ahead}, {"behind": behind}, {"ahead": ahead, "behind": behind}):
        expected = full.tril(bounds.get("ahead", axes.kv_len)).triu(-bounds.get("behind", axes.q_len))
        if min(bounds.values()) >= 0 and torch.equal(rows, expected):
            return Seen(**bounds, is_soft=is_soft)
    return None


def recognise(node: Any, q_len: Any, kv_len: Any, true_means_masked: bool = False) -> Mask | None:
    """What a mask for (..., q_len, kv_len) scores does, None if it takes a tensor to say that."""
    found = tensor(node)
    if not isinstance(node, fx.Node) or found is None or found.dim() < 2:
        return None
    given, reader = Given(node, hides=true_means_masked), _Reader(_Axes(found.dim(), q_len, kv_len), True)
    try:
        seen = _remembered(given, reader)
    except _Unknown:
        return None
    sure = seen.is_affine and _unchanged(reader.read) and (not seen.is_soft or seen.leaves_a_key(q_len, kv_len))
    return Mask(seen.ahead, seen.behind) if sure else None


def _takes_part(part: Affine, dtype: torch.dtype, true_means_masked: bool) -> bool | None:
    value = part.constant
    if any(part.steps) or not isinstance(value, (int, float)):
        return None
    if dtype == torch.bool:
        return bool(value) != true_means_masked
    if not dtype.is_floating_point:
        return None
    return True if value == 0 else False if value <= masking_threshold(dtype) else None


def _allowed(mask: torch.Tensor, true_means_masked: bool) -> torch.Tensor | None:
    if mask.dtype == torch.bool:
        return ~mask if true_means_masked else mask
    if not mask.is_floating_point():
        return None
    allowed, masked = mask == 0, mask <= masking_threshold(mask.dtype)
    return allowed if bool((allowed | masked).all()) else None


def masking_threshold(dtype: torch.dtype) -> float:
    """A score at or below this has a weight of exactly zero: -1e9, or half of float16's lowest value."""
    return max(-1e9, torch.finfo(dtype).min / 2)


def constant(node: Any) -> torch.Tensor | None:
    """The value of a node that depends on no input of the graph, computed for real; None for any other."""
    needed = _subgraph(node)
    if needed is None:
        return None
    values: dict[fx.Node, Any] = {}
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        for item in needed:
            args, kwargs = fx.map_arg((item.args, item.kwargs), values.__getitem__)
            if item.op == "call_method":
                values[item] = getattr(args[0], str(item.target))(*args[1:], **kwargs)
            else:
                values[item] = item.target(*args, **kwargs)  # type: ignore[operator]
    found = values[node]
    return found if isinstance(found, torch.Tensor) else None


def _subgraph(node: Any) -> list[fx.Node] | None:
    """The nodes that `node` is computed from, in order, if all are pure and nothing else writes to them."""
    if not isinstance(node, fx.Node):
        return None
    needed: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if item in needed:
            continue
        found = tensor(item)
        too_large = found is not None and not (_static(found) and found.numel() <= MAX_ELEMENTS)
        pure = bare_name(item) in PURE and calls(item, name_of(item.target)) and not mutates(item)
        if not (pure or calls(item, *PURE_BUT_IN_PLACE)) or too_large:
            return None
        needed.add(item)
        waiting.extend(item.all_input_nodes)
    return [item for item in node.graph.nodes if item in needed] if _unchanged(needed) else None


def _unchanged(needed: Collection[fx.Node]) -> bool:
    """Whether no other call of the graph writes to one of these tensors."""
    graph = next(iter(needed)).graph
    memory = {storage(found) for found in map(tensor, needed) if found is not None}
    others = [item for item in graph.nodes if mutates(item) and item not in needed]
    changed = {storage(found) for item in others for found in written(item)}
    return None not in memory and not memory & changed


def _static(found: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in found.shape)
