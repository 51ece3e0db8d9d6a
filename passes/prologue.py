"""Recognise the RMSNorm and RoPE that make q or k out of its projection, for kernels that do them as they read it.

In: q and k of a site as Operands, of which those of 4 dims may have one. Out: a Prologue each: what memory holds, and
what is still to be done to it. Whatever is not exactly understood is left to the graph, which is always right; so is
what would save no memory traffic, because others read the result too, or because memory does not hold what it is made
of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from sagecompile import site

from .graph import CASTS, Builder, argument, autocast_is_on, calls, holds_tensors, mutates, storage, tensor
from .operand import Operand, changed_between, peel

VIEWS = (
    "view reshape flatten unflatten transpose swapaxes swapdims permute movedim t unsqueeze squeeze narrow select "
    "chunk split tensor_split unbind"
).split()
WRITTEN = (
    "linear matmul __matmul__ mm bmm addmm baddbmm einsum conv1d conv2d conv3d _scaled_mm scaled_mm _int_mm"
).split()
"""Calls whose result Inductor writes to memory, and does not compute where it is read."""
PURE = "cos sin mul multiply add sub neg cat concat concatenate stack repeat_interleave repeat expand getitem".split()
"""Besides VIEWS and CASTS: calls that give the same for the same, under autocast or not."""


@dataclass(frozen=True)
class Prologue:
    """`source`, and what makes q or k of it: x * rsqrt(mean(x^2) + eps) * weight, then x * cos + turned(x) * sin."""

    source: Operand
    eps: float | None = None
    """None: no norm."""
    weight: fx.Node | None = None
    rope: str = "none"
    """As sagecompile/kernels/prologue.py names them."""
    tables: tuple[Operand, ...] = ()
    """cos and sin; `order` is that of their dims once they have 4, by dims of size 1 in front."""

    @property
    def is_empty(self) -> bool:
        return self.eps is None and self.rope == "none"

    @property
    def facts(self) -> site.Prologue:
        """What kernels are compiled for."""
        found = (tensor(self.weight), tensor(self.tables[0].node if self.tables else None))
        weight, table = (None if x is None else str(x.dtype).removeprefix("torch.") for x in found)
        return site.Prologue(self.eps is not None, weight, self.rope, table)


def recognise(
    q: Operand, k: Operand, dtype: str, anchor: fx.Node, others: set[fx.Node]
) -> tuple[Prologue, Prologue] | None:
    """What makes q and k of the call at `anchor`, which computes in `dtype`; None if there is nothing.

    Where only one of them is made so, the other's is empty. Results of `others` are no source: they may be replaced.
    """
    (*_, head_dim), found = q.sizes, tensor(q.node)
    assert found is not None
    if {str(q.dtype), str(k.dtype)} != {f"torch.{dtype}"} or not isinstance(head_dim, int):
        return None
    if autocast_is_on(anchor, found.device.type):
        return None
    q_made, k_made = (_recognise(operand, anchor, others) for operand in (q, k))
    if (
        q_made.tables
        and k_made.tables
        and not all(
            _same_memory(of_q.node, of_k.node) or _same_formula(of_q.node, of_k.node, anchor)
            for of_q, of_k in zip(q_made.tables, k_made.tables, strict=True)
        )
    ):
        k_made = Prologue(peel(k))
    return None if q_made.is_empty and k_made.is_empty else (q_made, k_made)


def emit_table(build: Builder, table: Operand) -> fx.Node:
    """(1 or batch, tokens, head_dim), by views."""
    node, found = table.node, tensor(table.node)
    assert found is not None
    for _ in range(4 - found.dim()):
        node = build.call(torch.unsqueeze, node, 0)
    return build.call(torch.squeeze, build.call(torch.permute, node, table.order), 1)


def _recognise(given: Operand, anchor: fx.Node, others: set[fx.Node]) -> Prologue:
    found = _read(_uncast_operand(given))
    understood = (
        not found.is_empty
        and _in_memory(found.source.node, others)
        and list(map(str, found.source.sizes)) == list(map(str, given.sizes))
        and _keeps_dtypes(given.node, found)
        and not changed_between(found.source.node, anchor, *_reads(found))
        and _is_only_for(_between(given.node, found), anchor)
    )
    return found if understood else Prologue(peel(given))


def _read(given: Operand) -> Prologue:
    """The formula alone: RoPE of a norm, each or both missing."""
    x, rope, tables = _rope(given) or (given, "none", ())
    source, eps, weight = _rms_norm(x) or (x, None, None)
    return Prologue(source, eps, weight, rope, tables)


def _reads(found: Prologue) -> list[fx.Node]:
    """Every node that the kernel reads, the source first."""
    weight = [] if found.weight is None else [found.weight]
    return [found.source.node, *weight, *(table.node for table in found.tables)]


def _between(node: fx.Node, found: Prologue) -> list[fx.Node]:
    """The tensors from `node` up to what the kernel reads, without that."""
    seen = dict.fromkeys(_reads(found))
    between = []
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if item not in seen and holds_tensors(item):
            seen[item] = None
            between.append(item)
            waiting.extend(item.all_input_nodes[:1] if calls(item, *CASTS) else item.all_input_nodes)
    return between


def _keeps_dtypes(node: fx.Node, found: Prologue) -> bool:
    """Whether all between is computed in the site's dtype or in float32, from a source in the site's dtype.

    A kernel computes in float32 without rounding in between, which is at least as exact as either.
    """
    given, source = tensor(node), tensor(found.source.node)
    assert given is not None and source is not None
    inner = [tensor(item) for item in [*_between(node, found), *_reads(found)]]
    return source.dtype == given.dtype and all(
        item is None or (item.dtype in (given.dtype, torch.float32) and item.device == given.device) for item in inner
    )


def _is_only_for(nodes: list[fx.Node], anchor: fx.Node) -> bool:
    """Whether nothing but the anchor, and what nothing needs, uses these nodes."""
    seen = set(nodes)
    waiting = list(nodes)
    while waiting:
        for user in waiting.pop().users:
            if user is anchor or user in seen:
                continue
            if user.op not in ("call_function", "call_method") or mutates(user) or not holds_tensors(user):
                return False
            seen.add(user)
            waiting.append(user)
    return True


def _in_memory(node: Any, others: set[fx.Node]) -> bool:
    """Whether memory holds this tensor in any case: an input, a product, or a view of one."""
    while calls(node, *VIEWS) or (calls(node, "getitem") and _is_basic(node.args[1])):
        node = argument(node, 0, "input")
    return (isinstance(node, fx.Node) and node not in others) and (
        node.op in ("placeholder", "get_attr") or calls(node, *WRITTEN) or _is_foreign(node)
    )


def _is_basic(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)


def _is_foreign(node: fx.Node) -> bool:
    """Whether it calls a custom op with kernels of its own, such as a quantized linear's, which Inductor only calls."""
    packet = getattr(node.target, "overloadpacket", node.target)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or str(packet._qualified_op_name).startswith("aten::"):
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return not any(getattr(packet, name).has_kernel_for_dispatch_key(composite) for name in packet.overloads())


def _same_formula(a: fx.Node, b: fx.Node, anchor: fx.Node) -> bool:
    """Whether both are computed alike from the same nodes, and nothing of that is changed before `anchor`.

    Some models take the cosines of the same angles for q and once more for k.
    """
    alike: set[tuple[fx.Node, fx.Node]] = set()
    waiting = [(a, b)]
    while waiting:
        one, other = waiting.pop()
        if one is other or (one, other) in alike:
            continue
        alike.add((one, other))
        calls_alike = (one.op, one.target) == (other.op, other.target) and calls(one, *VIEWS, *CASTS, *PURE)
        arguments, shapes = zip(*(tree_flatten((node.args, node.kwargs)) for node in (one, other)), strict=True)
        if not calls_alike or mutates(one) or shapes[0] != shapes[1]:
            return False
        for mine, theirs in zip(*arguments, strict=True):
            if isinstance(mine, fx.Node) and isinstance(theirs, fx.Node):
                waiting.append((mine, theirs))
            elif type(mine) is not type(theirs) or mine != theirs:
                return False
    computed = set(chain(*alike))
    return not changed_between(min(computed), anchor, *computed, *chain(*(node.all_input_nodes for node in computed)))


def _same_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors are the same elements of the same memory in the same order."""
    one, other = tensor(a), tensor(b)
    assert one is not None and other is not None
    if storage(one) is None or storage(one) != storage(other) or one.dtype != other.dtype:
        return False
    layouts = [(x.shape, x.stride(), x.storage_offset()) for x in (one, other)]
    return str(layouts[0]) == str(layouts[1])


def _uncast(node: Any) -> Any:
    """What a node holds before casts and copies; which dtypes they may go through `_keeps_dtypes` says."""
    while calls(node, *CASTS):
        node = argument(node, 0, "input")
    return node


def _uncast_operand(operand: Operand) -> Operand:
    """The operand in front of all its casts, copies and transposes."""
    while True:
        peeled = peel(operand)
        plain = Operand(_uncast(peeled.node), peeled.order)
        if plain == operand:
            return plain
        operand = plain


def _commuted(node: Any, *names: str) -> Iterator[tuple[Any, Any]]:
    """(a, b) and (b, a) of a + b or a * b."""
    if calls(node, *names) and len(node.args) <= 2 and set(node.kwargs) <= {"input", "other"}:
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        yield a, b
        yield b, a


def _sum(node: Any) -> Iterator[tuple[Any, Any]]:
    return _commuted(_uncast(node), "add")


def _product(node: Any) -> Iterator[tuple[Any, Any]]:
    return _commuted(_uncast(node), "mul", "multiply")


def _is_last(dim: Any, rank: int) -> bool:
    """Whether `dim`, a number or a list of one, is the last of `rank`."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    return isinstance(dim, int) and dim in (-1, rank - 1)


def _sizes(node: Any) -> list[str]:
    found = tensor(node)
    return [] if found is None else [str(size) for size in found.shape]


def _rms_norm(given: Operand) -> tuple[Operand, float, fx.Node | None] | None:
    """(x, eps, weight) of an RMSNorm over the head dim; x in front of its transposes."""
    if given.order[-1] != 3:
        return None
    found = _functional_norm(given.node) or _bare_norm(given.node) or _weighted_norm(given.node)
    if found is None:
        return None
    x, eps, weight = found
    return _uncast_operand(Operand(x, given.order)), eps, weight


def _functional_norm(node: fx.Node) -> tuple[fx.Node, float, fx.Node | None] | None:
    """F.rms_norm(input, normalized_shape, weight, eps), whose own eps is float32's for the dtypes here."""
    if not calls(node, "rms_norm"):
        return None
    shape, weight = argument(node, 1, "normalized_shape"), argument(node, 2, "weight")
    eps = argument(node, 3, "eps")
    if not isinstance(shape, (tuple, list)) or [str(size) for size in shape] != _sizes(node)[-1:]:
        return None
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return (_uncast(argument(node, 0, "input")), eps, weight) if _is_number(eps) else None


def _weighted_norm(node: fx.Node) -> tuple[fx.Node, float, fx.Node | None] | None:
    """`weight * x * rsqrt(...)`, a weight for each channel."""
    for weight, rest in _product(node):
        bare = _bare_norm(rest)
        if bare is not None and _sizes(weight) == _sizes(node)[-1:]:
            return bare[0], bare[1], weight
    return None


def _bare_norm(node: Any) -> tuple[fx.Node, float, None] | None:
    """`x * rsqrt(mean(x^2) + eps)`."""
    for x, root in _product(node):
        root = _uncast(root)
        for mean, eps in _sum(argument(root, 0, "input")) if calls(root, "rsqrt") else ():
            if _is_number(eps) and isinstance(x, fx.Node) and _mean_square(mean) is _uncast(x):
                return _uncast(x), eps, None
    return None


def _mean_square(node: Any) -> Any:
    """x of `x.pow(2).mean(-1, keepdim=True)`."""
    node = _uncast(node)
    if not calls(node, "mean") or argument(node, 2, "keepdim") is not True:
        return None
    square = _uncast(argument(node, 0, "input"))
    if not _is_last(argument(node, 1, "dim"), len(_sizes(square))):
        return None
    if calls(square, "square") or (calls(square, "pow") and argument(square, 1, "exponent") == 2):
        return _uncast(argument(square, 0, "input"))
    return next((_uncast(a) for a, b in _product(square) if _uncast(a) is _uncast(b)), None)


def _rope(given: Operand) -> tuple[Operand, str, tuple[Operand, ...]] | None:
    """(x, rope, (cos, sin)) of `x * cos + turned(x) * sin`; x in front of its transposes."""
    if given.order[-1] != 3:
        return None
    for straight, crossed in _sum(given.node):
        for (same, cos), (partner, sin) in product(_product(straight), _product(crossed)):
            turned = _turned(_uncast(partner))
            if turned is not None and turned[0] is _uncast(same):
                x = Operand(turned[0], given.order)
                return (_uncast_operand(x), turned[1], tables) if (tables := _tables(cos, sin, x)) else None
    return None


def _tables(cos: Any, sin: Any, x: Operand) -> tuple[Operand, ...]:
    """cos and sin, alike and the same for all heads; else ()."""
    seen, other = tensor(cos), tensor(sin)
    if seen is None or other is None or _sizes(cos) != _sizes(sin) or seen.dtype != other.dtype:
        return ()
    sizes = [*["1"] * (4 - seen.dim()), *_sizes(cos)]
    _, heads, *rest = (sizes[dim] for dim in x.order)
    alike = heads == "1" and rest == [str(size) for size in x.sizes[2:]]
    return (Operand(cos, x.order), Operand(sin, x.order)) if alike else ()


def _turned(node: Any) -> tuple[fx.Node, str] | None:
    """(x, rope) of x with each channel in its partner's place, negated in the first of the two."""
    rank = len(_sizes(node))
    if calls(node, "cat", "concat", "concatenate"):
        rope, kinds, joined = "half", ("second", "first"), node
    elif calls(node, "flatten", "reshape", "view"):
        rope, kinds, joined, rank = "interleaved", ("odd", "even"), _uncast(argument(node, 0, "input")), rank + 1
        if not calls(joined, "stack"):
            return None
    else:
        return None
    parts = argument(joined, 0, "tensors")
    if not _is_last(argument(joined, 1, "dim"), rank) or not isinstance(parts, (tuple, list)) or len(parts) != 2:
        return None
    negated = _uncast(parts[0])
    if not calls(negated, "neg", "negative"):
        return None
    found = [_part(_uncast(part)) for part in (argument(negated, 0, "input"), parts[1])]
    x = found[0][0]
    whole = isinstance(x, fx.Node) and _sizes(x) == _sizes(node)
    return (x, rope) if whole and found == [(x, kinds[0]), (x, kinds[1])] else None


def _part(node: Any) -> tuple[Any, str]:
    """(x, which half of x's channels a node is): `first` or `second`, `even` or `odd`; (None, "") if none."""
    if not calls(node, "getitem"):
        return None, ""
    given, index = node.args
    if isinstance(index, int):
        return _unbound_part(given, index) if calls(given, "unbind") else _chunked_part(given, index)
    *rest, last = index if isinstance(index, tuple) else (index,)
    reaches = Ellipsis in rest or len(rest) + 1 == len(_sizes(given))
    whole = all(item is Ellipsis or item == slice(None) for item in rest)
    if not (_half(given) and reaches and whole and isinstance(last, slice)):
        return None, ""
    if not all(item is None or isinstance(item, int) for item in (last.start, last.stop, last.step)):
        return None, ""
    half = int(_half(given))
    kinds = {(0, half, 1): "first", (half, 2 * half, 1): "second", (0, 2 * half, 2): "even", (1, 2 * half, 2): "odd"}
    return _uncast(given), kinds.get(last.indices(2 * half), "")


def _chunked_part(chunks: Any, index: int) -> tuple[Any, str]:
    """Of `x.chunk(2, -1)[index]` or `x.split(half, -1)[index]`."""
    if not calls(chunks, "chunk", "split") or index not in (0, 1):
        return None, ""
    x, size = argument(chunks, 0, "input"), str(argument(chunks, 1, "chunks"))
    halves = ["2"] if calls(chunks, "chunk") else [_half(x), f"[{_half(x)}, {_half(x)}]"]
    if not _half(x) or size not in halves or not _is_last(argument(chunks, 2, "dim"), len(_sizes(x))):
        return None, ""
    return _uncast(x), ("first", "second")[index]


def _unbound_part(unbound: fx.Node, index: int) -> tuple[Any, str]:
    """Of `x.reshape(..., half, 2).unbind(-1)[index]` or `x.reshape(..., 2, half).unbind(-2)[index]`."""
    shaped, dim = _uncast(argument(unbound, 0, "input")), argument(unbound, 1, "dim")
    if not calls(shaped, "reshape", "view", "unflatten") or index not in (0, 1):
        return None, ""
    x = argument(shaped, 0, "input")
    outer, rank = _sizes(x)[:-1], len(_sizes(shaped))
    if _is_last(dim, rank) and _sizes(shaped) == [*outer, _half(x), "2"]:
        return _uncast(x), ("even", "odd")[index]
    if dim in (-2, rank - 2) and _sizes(shaped) == [*outer, "2", _half(x)]:
        return _uncast(x), ("first", "second")[index]
    return None, ""


def _half(node: Any) -> str:
    """Half of the last size, "" if that is no even number."""
    size = (_sizes(node) or [""])[-1]
    return str(int(size) // 2) if size.isdigit() and int(size) % 2 == 0 else ""


def _is_number(given: Any) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)
