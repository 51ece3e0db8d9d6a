"""Recognise a mask that the graph itself computes, from positions alone, as causal or as masking nothing.

In: a mask node. Out: CAUSAL, NOTHING_MASKED or None (unknown). Transformers builds causal masks out of `arange` in the
graph; such a mask depends on no input, so it is computed once, at compile time, and compared. With symbolic lengths,
or with a padding mask that is an input, nothing is assumed and the site is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from .graph import calls, mutates, storage, tensor, written

CAUSAL = "causal"
NOTHING_MASKED = "nothing masked"

MAX_ELEMENTS = 1 << 28
"""Of the largest tensor that is computed here; a mask above it is not looked at."""

PURE = frozenset(
    (
        "__and__ __or__ add and and_ arange bitwise_and bitwise_not bitwise_or bool clone contiguous cumsum "
        "detach diff div eq expand expand_as finfo float full full_like ge getitem gt invert le logical_and "
        "logical_not logical_or lt masked_fill mul ne neg new_full new_ones new_zeros not_ ones ones_like or_ "
        "permute reshape rsub scalar_tensor size squeeze sub tensor to transpose tril triu truediv type "
        "type_as unsqueeze view where zeros zeros_like"
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


def recognise(node: Any, q_len: Any, kv_len: Any, true_means_masked: bool = False) -> str | None:
    """What a mask for (..., q_len, kv_len) scores does, if that can be known.

    A boolean mask marks what takes part, unless `true_means_masked`; a float mask is added to the scores.
    """
    if not (isinstance(q_len, int) and isinstance(kv_len, int) and isinstance(node, fx.Node)):
        return None
    seen = node.meta.setdefault("sagecompile_mask", {})  # all layers ask about the same mask
    key = (q_len, kv_len, true_means_masked)
    if key not in seen:
        seen[key] = _recognise(node, *key)
    return seen[key]  # type: ignore[no-any-return]


def _recognise(node: fx.Node, q_len: int, kv_len: int, true_means_masked: bool) -> str | None:
    mask = constant(node)
    if mask is None or mask.dim() < 2 or mask.numel() == 0:
        return None
    allowed = _allowed(mask, true_means_masked)
    if allowed is None or any(
        have not in (1, want) for have, want in zip(mask.shape[-2:], (q_len, kv_len), strict=True)
    ):
        return None
    if bool(allowed.all()):
        return NOTHING_MASKED
    causal = torch.ones(q_len, kv_len, dtype=torch.bool, device=mask.device).tril()
    return CAUSAL if allowed.shape[-2:] == causal.shape and bool((allowed == causal).all()) else None


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
        pure = calls(item, *PURE) and not mutates(item)
        if not (pure or calls(item, *PURE_BUT_IN_PLACE)) or too_large:
            return None
        needed.add(item)
        waiting.extend(item.all_input_nodes)
    memory = {storage(found) for found in map(tensor, needed) if found is not None}
    others = [item for item in node.graph.nodes if mutates(item) and item not in needed]
    changed = {storage(found) for item in others for found in written(item)}
    if None in memory or memory & changed:
        return None
    return [item for item in node.graph.nodes if item in needed]


def _static(found: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in found.shape)
