"""Recognise a mask that the graph itself computes, from positions alone: causal, or one that masks nothing.

In: a mask node. Out: which keys it lets a query see, or None (unknown). Transformers builds causal masks in the graph,
out of `arange`: as a formula (positions.py) such a mask is known for every length. What has no formula, such as a mask
filled in place, is computed once, at compile time, if all lengths are known. An input is never known.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true as known
from torch.utils._python_dispatch import _disable_current_modes

from sagecompile.mask import ALL, CAUSAL, Mask

from .formula import Affine, Split, index
from .graph import bare_name, calls, mutates, name_of, storage, tensor, written
from .positions import formulas

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


def describe(node: Any) -> str:
    """`bool (2, 1, 40, 40)`."""
    found = tensor(node)
    if found is None:
        return "of unknown shape"
    return f"{str(found.dtype).removeprefix('torch.')} ({', '.join(str(size) for size in found.shape)})"


def read(node: Any, q_len: Any, kv_len: Any, true_means_masked: bool = False) -> Mask:
    """What `recognise` says, a tensor where it does not know; no node is no mask."""
    if node is None:
        return ALL
    found = recognise(node, q_len, kv_len, true_means_masked)
    return Mask(tensor=describe(node)) if found is None else found


def recognise(node: Any, q_len: Any, kv_len: Any, true_means_masked: bool = False) -> Mask | None:
    """What a mask for (..., q_len, kv_len) scores does, None if that cannot be known.

    A boolean mask marks what takes part, unless `true_means_masked`; a float mask is added to the scores.
    """
    found = tensor(node)
    if not isinstance(node, fx.Node) or found is None or found.dim() < 2:
        return None
    seen = node.meta.setdefault("sagecompile_mask", {})  # all layers ask about the same mask
    key = (str(q_len), str(kv_len), true_means_masked)
    if key not in seen:
        wanted = (q_len, kv_len)
        fits = all(known(have == 1) or known(have == want) for have, want in zip(found.shape[-2:], wanted, strict=True))
        ways = (_proved, _computed) if fits else ()
        said = (way(node, wanted, true_means_masked) for way in ways)
        seen[key] = next((mask for mask in said if mask is not None), None)
    return seen[key]  # type: ignore[no-any-return]


def _proved(node: fx.Node, wanted: tuple[Any, Any], true_means_masked: bool) -> Mask | None:
    """From the formula of the mask, whatever the lengths."""
    found, read = tensor(node), formulas(node)
    formula = read.get(node)
    if found is None or formula is None or not _unchanged(read):
        return None
    parts = (formula.then, formula.other) if isinstance(formula, Split) else (formula,)
    allowed = [_takes_part(part, found.dtype, true_means_masked) for part in parts]
    if None in allowed or not any(allowed):
        return None
    if all(allowed):
        return ALL
    assert isinstance(formula, Split)
    below = formula.below if allowed[0] else formula.below.negated()
    query, key = (index(found.dim() - back, found.dim(), 0 if known(found.shape[-back] == 1) else 1) for back in (2, 1))
    behind = below - (key - query)
    if not _same_shape(found, wanted) or any(behind.steps):
        return None
    return _causal(-behind.constant, wanted)


def _causal(ahead: Any, wanted: tuple[Any, Any]) -> Mask | None:
    """Query i sees the keys j <= i + ahead. None if one may see no key, or for a symbol that rewrite.py does not know.

    It knows kv_len - q_len: the queries are the last tokens.
    """
    q_len, kv_len = wanted
    if not known(ahead >= 0):
        return None
    if known(ahead == 0):
        return CAUSAL
    return Mask(ahead) if isinstance(ahead, int) or known(ahead == kv_len - q_len) else None


def _takes_part(part: Affine, dtype: torch.dtype, true_means_masked: bool) -> bool | None:
    value = part.constant
    if any(part.steps) or not isinstance(value, (int, float)):
        return None
    if dtype == torch.bool:
        return bool(value) != true_means_masked
    if not dtype.is_floating_point:
        return None
    return True if value == 0 else False if value <= masking_threshold(dtype) else None


def _same_shape(mask: torch.Tensor, wanted: tuple[Any, Any]) -> bool:
    """Not broadcast along the queries or the keys."""
    return all(known(have == want) for have, want in zip(mask.shape[-2:], wanted, strict=True))


def _computed(node: fx.Node, wanted: tuple[Any, Any], true_means_masked: bool) -> Mask | None:
    """From its value: what changes in place, or is no formula, with lengths that are known."""
    mask = constant(node)
    if mask is None or mask.numel() == 0:
        return None
    allowed = _allowed(mask, true_means_masked)
    if allowed is None:
        return None
    if bool(allowed.all()):
        return ALL
    if not _same_shape(mask, wanted):
        return None
    rows = allowed.reshape(-1, *allowed.shape[-2:])
    ahead = int(rows[0, 0].sum()) - 1
    return _causal(ahead, wanted) if torch.equal(rows, rows.new_ones(rows.shape).tril(ahead)) else None


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
