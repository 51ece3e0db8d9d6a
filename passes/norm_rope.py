"""RMSNorm over the head dim and RoPE, in the spellings that models have for them.

In: q or k as an Operand of 4 dims. Out: what it is the norm of, or what is turned in it and by which cos and sin; both
behind any casts, copies and transposes, of which the caller says through which dtypes they may go. None for anything
else, be it nearly the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import fx

from .graph import CASTS, argument, calls, tensor
from .operand import Operand, peel


def rms_norm(given: Operand) -> tuple[Operand, float, fx.Node | None] | None:
    """(x, eps, weight) of an RMSNorm over the head dim; x in front of its transposes."""
    given = _uncast_operand(given)
    if given.order[-1] != 3:
        return None
    found = _functional_norm(given.node) or _bare_norm(given.node) or _weighted_norm(given.node)
    if found is None:
        return None
    x, eps, weight = found
    return _uncast_operand(Operand(x, given.order)), eps, weight


def rope(given: Operand) -> tuple[Operand, str, tuple[Operand, ...]] | None:
    """(x, rope, (cos, sin)) of `x * cos + turned(x) * sin`; x in front of its transposes."""
    given = _uncast_operand(given)
    if given.order[-1] != 3:
        return None
    for straight, crossed in _sum(given.node):
        for (same, cos), (partner, sin) in product(_product(straight), _product(crossed)):
            turned = _turned(_uncast(partner))
            if turned is not None and turned[0] is _uncast(same):
                x = Operand(turned[0], given.order)
                return (_uncast_operand(x), turned[1], tables) if (tables := _tables(cos, sin, x)) else None
    return None


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


def _tables(cos: Any, sin: Any, x: Operand) -> tuple[Operand, ...]:
    """cos and sin, alike and the same for all heads; else ()."""
    seen, other = tensor(cos), tensor(sin)
    if seen is None or other is None or _sizes(cos) != _sizes(sin) or seen.dtype != other.dtype:
        return ()
    sizes = [*["1"] * (4 - seen.dim()), *_sizes(cos)]
    _, heads, *rest = ("1" if dim is None else sizes[dim] for dim in x.order)
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


def _uncast(node: Any) -> Any:
    """What a node holds before casts and copies."""
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
