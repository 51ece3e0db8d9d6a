"""Recognise the RMSNorm and RoPE that make q or k out of its projection, for kernels that do them as they read it.

In: q and k of a site as Operands, of which those of (batch, heads, tokens, head_dim) may have one. Out: a Prologue
each: what memory holds, and what is still to be done to it. Whatever is not exactly understood is left to the graph,
which is always right; so is what would save no memory traffic, because others read the result too, or because memory
does not hold what it is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from sagecompile import site

from . import norm_rope
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
    if not (q.is_plain and k.is_plain):
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
    found = _read(given)
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
    x, rope, tables = norm_rope.rope(given) or (given, "none", ())
    source, eps, weight = norm_rope.rms_norm(x) or (x, None, None)
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
