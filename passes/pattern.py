"""What the files for the single spellings share: a Match, and the facts that every site has.

In: the operands of an attention call. Out: its AttentionSite, and the obstacles that its tensors raise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sagecompile.site import AttentionSite

from .graph import Builder, mutates, said, tensor
from .names import module_path, source_line
from .operand import Operand
from .prologue import Prologue

Attend = Callable[..., fx.Node]
"""(builder, q, k, v, **seen): inserts the attention op on q, k, v of shape (batch, heads, tokens, head_dim), with what
masks.Reading.emit says of which keys are seen."""


@dataclass(frozen=True)
class Match:
    """A site, the node whose value it produces, and how to insert what computes that value instead."""

    site: AttentionSite
    anchor: fx.Node
    emit: Callable[[Builder, Attend], fx.Node]
    tokens_first: bool
    """Whether the value lies in memory as (batch, tokens, heads, head_dim); else (batch, heads, tokens, head_dim)."""
    q: Operand | None = None
    """As the graph has it; None where the call makes it itself, from its own weights. So is `k`."""
    k: Operand | None = None
    prologues: tuple[Prologue, Prologue] | None = None
    """What makes q and k, as `site.prologues` says."""


def make_site(
    node: fx.Node, spelling: str, q: Operand, k: Operand, v: Operand, dtype: torch.dtype, **facts: Any
) -> AttentionSite:
    """The site of the call at `node`, from its operands."""
    batch, heads, q_len, head_dim = q.shape
    _, kv_heads, kv_len, _ = k.shape
    found = tensor(q.node)
    assert found is not None
    for operand in (q, k, v):
        facts["obstacle"] = facts.get("obstacle") or tensor_obstacle(operand.node)
    if mutates(node):
        facts["obstacle"] = facts["obstacle"] or f"result written in place by {said(node)}: needs a new tensor"
    return AttentionSite(
        name=module_path(node),
        source=source_line(node),
        spelling=spelling,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        value_dim=v.shape[3],
        dtype=str(dtype).removeprefix("torch."),
        device=str(found.device),
        **facts,
    )


def first_result(node: fx.Node, live: set[fx.Node], others: str) -> tuple[fx.Node | None, str | None]:
    """The getitem that takes the output of a call that returns more, and an obstacle if the `others` are used."""
    output, obstacle = None, None
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == 0:
            output = output or user
        elif user in live:
            obstacle = f"{others}: used elsewhere (by {said(user)})"
    return output, obstacle


def tokens_first(out: torch.Tensor, order: tuple[int, ...] = (0, 1, 2, 3)) -> bool:
    """Whether a result lies in memory with the heads inside the tokens, as SDPA's fused kernels return it.

    Dim i of `out` is dim order[i] of (batch, heads, tokens, head_dim).
    """
    return out.dim() == 4 and str(out.stride(order.index(2))) != str(out.shape[order.index(3)])


def tensor_obstacle(node: fx.Node) -> str | None:
    """What makes a tensor something else than plain memory of sizes known before the call."""
    found = tensor(node)
    assert found is not None
    if torch._C._functorch.is_functorch_wrapped_tensor(found):
        return "inside a torch.func transform: needs a plain call"
    if not isinstance(found, FakeTensor):
        return f"tensor type {type(found).__name__}: needs torch.Tensor"
    for size in found.shape:
        if free_unbacked_symbols(size):
            return f"size {size} computed from data: needs one known before the call"
    return None


def result_obstacle(out: torch.Tensor, expected: Sequence[Any], order: Sequence[int]) -> str | None:
    """A result larger than q says, because a mask widened the scores; dim i of `out` is dim order[i] of `expected`."""
    if [str(size) for size in out.shape] == [str(expected[dim]) for dim in order]:
        return None
    return f"result ({', '.join(map(str, out.shape))}): needs q's batch, heads and tokens"


def shape_obstacle(q: Operand, k: Operand, v: Operand) -> str | None:
    """What in the sizes is not (batch, heads, tokens, head_dim) on all three."""
    batches = [operand.shape[0] for operand in (q, k, v)]
    if not all(_equal(batches[0], size) for size in batches):
        return f"batch {' and '.join(dict.fromkeys(map(str, batches)))}: needs the same on q, k and v"
    if not (_equal(k.shape[2], v.shape[2]) and _equal(k.shape[1], v.shape[1])):
        return f"k and v of {k.shape[1]}x{k.shape[2]} and {v.shape[1]}x{v.shape[2]}: needs equal heads and tokens"
    heads, kv_heads = q.shape[1], k.shape[1]
    if str(heads) != str(kv_heads) and heads % kv_heads != 0:
        return f"heads {heads} on {kv_heads}: needs a multiple"
    return None


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same: as written, or else by comparing them, which makes that a guard."""
    if str(a) == str(b):
        return True
    return not (free_unbacked_symbols(a) or free_unbacked_symbols(b)) and bool(a == b)
