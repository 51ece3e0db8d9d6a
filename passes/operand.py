"""Q, K or V of a site as the graph has it, and how to bring it to (batch, heads, tokens, head_dim).

In: the node that a matmul or SDPA reads, with the order of its dims. Out: an Operand whose transposes are peeled off
and whose `repeat_kv` is undone, so that K and V are quantized once per KV head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .graph import Builder, argument, calls, mutates, storage, tensor, written


@dataclass(frozen=True)
class Operand:
    """`node`, whose dim `order[i]` is dim i of (batch..., heads..., tokens, head_dim)."""

    node: fx.Node
    order: tuple[int | None, ...]
    """None: the node lacks that dim, which is one of size 1."""
    head_dims: int | None = None
    """How many of the dims before the tokens are heads; None: the last one, where there is more than one."""

    @property
    def sizes(self) -> tuple[Any, ...]:
        """(batch..., heads..., tokens, head_dim), with as many dims as the model has."""
        found = tensor(self.node)
        assert found is not None
        return tuple(1 if dim is None else found.shape[dim] for dim in self.order)

    @property
    def batch_and_heads(self) -> tuple[int, int]:
        """How many dims are joined to the batch, and how many to the heads."""
        leading = len(self.order) - 2
        heads = (1 if leading > 1 else 0) if self.head_dims is None else self.head_dims
        return leading - heads, heads

    @property
    def shape(self) -> tuple[Any, ...]:
        """(batch, heads, tokens, head_dim); what the model lacks of them is 1, what it has too many is joined."""
        batch, _ = self.batch_and_heads
        *leading, tokens, head_dim = self.sizes
        return (math.prod(leading[:batch]), math.prod(leading[batch:]), tokens, head_dim)

    @property
    def is_plain(self) -> bool:
        """Whether the node has (batch, heads, tokens, head_dim), in whatever order."""
        return None not in self.order and len(self.order) == 4 and self.batch_and_heads == (1, 1)

    @property
    def dtype(self) -> torch.dtype:
        found = tensor(self.node)
        assert found is not None
        return found.dtype

    def emit(self, build: Builder, dtype: torch.dtype) -> fx.Node:
        """A node of shape (batch, heads, tokens, head_dim) in `dtype`, by views and, under autocast, a cast."""
        node = self.node
        if self.dtype != dtype:
            node = build.call(torch.Tensor.to, node, dtype)
        present = tuple(dim for dim in self.order if dim is not None)
        if present != tuple(range(len(present))):
            node = build.call(torch.permute, node, present)
        for position, dim in enumerate(self.order):
            if dim is None:
                node = build.call(torch.unsqueeze, node, position)
        batch, heads = self.batch_and_heads
        for position, joined in ((0, batch), (1, heads)):
            if joined == 0:
                node = build.call(torch.unsqueeze, node, position)
            elif joined > 1:
                node = build.call(torch.flatten, node, position, position + joined - 1)
        return node

    def split(self, build: Builder, node: fx.Node) -> fx.Node:
        """(batch, heads, tokens, any) as (batch..., heads..., tokens, any), as many dims as this operand has."""
        batch, heads = self.batch_and_heads
        for position, first, joined in ((1, batch, heads), (0, 0, batch)):
            dims = self.order[first : first + joined]
            if joined == 0:
                node = build.call(torch.squeeze, node, position)
            elif joined > 1:
                inner = [1 if dim is None else build.size(self.node, dim) for dim in dims[1:]]
                node = build.call(torch.Tensor.unflatten, node, position, (-1, *inner))
        return node


def standard(node: fx.Node) -> Operand:
    """The node as SDPA reads it: (batch..., tokens, head_dim)."""
    found = tensor(node)
    assert found is not None
    return peel(Operand(node, tuple(range(found.dim()))))


def peel(operand: Operand) -> Operand:
    """Fold the transposes in front of the operand into its order."""
    while True:
        node = operand.node
        permutation = permutation_of(node)
        if permutation is None:
            return operand
        order = tuple(None if dim is None else permutation[dim] for dim in operand.order)
        operand = replace(operand, node=argument(node, 0, "input"), order=order)


def permutation_of(node: fx.Node) -> tuple[int, ...] | None:
    """p such that dim i of the node is dim p[i] of its input, if the node only transposes."""
    found = tensor(node)
    if found is None:
        return None
    rank = found.dim()
    order = list(range(rank))
    if calls(node, "transpose", "swapaxes", "swapdims"):
        a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
        if not (isinstance(a, int) and isinstance(b, int)):
            return None
        order[a], order[b] = order[b], order[a]
    elif calls(node, "permute"):
        dims: Any = argument(node, 1, "dims") if len(node.args) <= 2 else node.args[1:]
        if not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) for dim in dims):
            return None
        order = [dim % rank for dim in dims]
    elif calls(node, "mT") or (calls(node, "getattr") and node.args[1] in ("mT", "T")[: 2 if rank == 2 else 1]):
        order[-1], order[-2] = order[-2], order[-1]
    elif calls(node, "t") and rank == 2:
        order = [1, 0]
    else:
        return None
    return tuple(order) if tensor(argument(node, 0, "input")) is not None else None


def changed_between(first: fx.Node, last: fx.Node, *nodes: fx.Node) -> fx.Node | None:
    """A call after `first` and before `last` that may change what one of `nodes` holds in place."""
    memories = {None if (found := tensor(node)) is None else storage(found) for node in nodes}
    node = first.next
    while node is not last and node.op != "root":
        if mutates(node):
            changed = {storage(item) for item in written(node)}
            if None in memories | changed or memories & changed or not changed:
                return node
        node = node.next
    return None


def undo_repeats(k: Operand, v: Operand, anchor: fx.Node) -> tuple[Operand, Operand]:
    """K and V before each KV head was repeated for its group of query heads, if both were, alike.

    Repeating copies: where the original is changed before `anchor` reads the copy, nothing is undone.
    """
    base_k, base_v = _undo_repeat(k), _undo_repeat(v)
    if base_k is None or base_v is None or str(base_k.shape[1]) != str(base_v.shape[1]):
        return k, v
    if changed_between(k.node, anchor, base_k.node) or changed_between(v.node, anchor, base_v.node):
        return k, v
    return base_k, base_v


def _undo_repeat(operand: Operand) -> Operand | None:
    heads = operand.order[1] if operand.is_plain else None
    if heads is None:
        return None
    base = _repeat_interleaved(operand.node, heads) or _expanded_and_merged(operand.node, heads)
    base = base or _expanded(operand.node, heads)
    if base is None or tensor(base) is None:
        return None
    return peel(replace(operand, node=base))


def _repeat_interleaved(node: fx.Node, heads: int) -> fx.Node | None:
    """x of `x.repeat_interleave(n, dim=heads)`."""
    if not calls(node, "repeat_interleave") or not isinstance(argument(node, 1, "repeats"), int):
        return None
    dim, source = argument(node, 2, "dim"), argument(node, 0, "input")
    return source if isinstance(source, fx.Node) and isinstance(dim, int) and dim % 4 == heads else None


def _expanded_and_merged(node: fx.Node, heads: int) -> fx.Node | None:
    """x of `x[:, :, None].expand(..., n, ...).reshape(...)`: a new dim behind the heads, merged into them."""
    expand = argument(node, 0, "input")
    if not calls(node, "reshape", "view", "flatten") or not calls(expand, "expand", "expand_as"):
        return None
    unsqueezed = argument(expand, 0, "input")
    if not calls(unsqueezed, "getitem", "unsqueeze"):
        return None
    source = argument(unsqueezed, 0, "input")
    whole, merged, wide, base = tensor(expand), tensor(node), tensor(unsqueezed), tensor(source)
    if whole is None or merged is None or wide is None or base is None or whole.dim() != 5 or base.dim() != 4:
        return None
    sizes = [str(size) for size in base.shape]
    with_one = [*sizes[: heads + 1], "1", *sizes[heads + 1 :]]
    repeats = whole.shape[heads + 1]
    repeated = [*sizes[: heads + 1], str(repeats), *sizes[heads + 1 :]]
    joined = [str(size) for size in merged.shape]
    same_but_heads = joined[:heads] + joined[heads + 1 :] == sizes[:heads] + sizes[heads + 1 :]
    if not isinstance(repeats, int) or not same_but_heads:
        return None
    fits = [str(s) for s in wide.shape] == with_one and [str(s) for s in whole.shape] == repeated
    return source if fits and _adds_dim(unsqueezed, heads + 1) else None


def _adds_dim(node: fx.Node, dim: int) -> bool:
    """Whether the node only adds one dim of size 1 at `dim` to a 4-dim tensor."""
    index = argument(node, 1, "dim")
    if calls(node, "unsqueeze"):
        return isinstance(index, int) and index % 5 == dim
    if not isinstance(index, tuple) or index.count(None) != 1 or Ellipsis in index:
        return False
    return index.index(None) == dim and all(item is None or item == slice(None) for item in index)


def _expanded(node: fx.Node, heads: int) -> fx.Node | None:
    """x of `x.expand(...)` where only the heads grew, from 1."""
    if not calls(node, "expand", "expand_as"):
        return None
    source = argument(node, 0, "input")
    whole, base = tensor(node), tensor(source)
    if whole is None or base is None or base.dim() != 4 or str(base.shape[heads]) != "1":
        return None
    grown = [dim for dim in range(4) if str(whole.shape[dim]) != str(base.shape[dim])]
    return source if grown == [heads] else None
