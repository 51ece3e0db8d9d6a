"""Report the attention that no spelling knows, so that none is left out in silence.

In: a softmax that unfused.py does not understand. Out: a Match that is always kept, where the softmax stands between
two products and both operands of the first are computed from inputs (a router's gate or a memory is a parameter); else
None.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from . import contraction
from .contraction import Contraction
from .graph import CASTS, RESHAPES, argument, calls, is_computed, said, tensor
from .operand import permutation_of, standard
from .pattern import Attend, Match, make_site
from .unfused import FILLS, JOINS, PRODUCTS, QUOTIENTS, SUMS

FAR = 64
"""Calls looked at in each direction."""
ENDS = ("softmax", "layer_norm", "rms_norm", "group_norm", "batch_norm", "scaled_dot_product_attention")
"""What lies behind them is no longer the same attention."""


def match_unknown(softmax: fx.Node, live: set[fx.Node]) -> Match | None:
    """Kept, with the call that is not known as the reason."""
    found, dim = tensor(softmax), argument(softmax, 1, "dim")
    if found is None or not isinstance(dim, int) or found.dim() < 2:
        return None
    keys = str(found.shape[dim])
    above = _search(softmax, _above, lambda node, reader: _is_scores(contraction.read(node)), keys)
    below = _search(softmax, lambda node, keys: _below(node, keys, live), _is_weighted, keys)
    if above is None or below is None:
        return None
    scores, weighted = contraction.read(above[-1]), below[-1]
    assert scores is not None
    strange = next((node for node in [*above[1:-1], *below[1:-1]] if not _is_common(node)), None)
    what = "softmax over an inner dim" if dim % found.dim() != found.dim() - 1 else f"the product {said(weighted)}"
    q, k = standard(scores.left), standard(scores.right)
    out = tensor(weighted)
    assert out is not None

    def emit(build: Any, attend: Attend) -> fx.Node:
        raise AssertionError(f"{weighted} is always kept")

    site = make_site(
        weighted,
        scores.spelling,
        q,
        k,
        k,
        out.dtype,
        needs_grad=out.requires_grad,
        obstacle=f"spelling not known: {what if strange is None else said(strange)}",
    )
    return Match(site, weighted, emit, tokens_first=False)


Step = tuple[fx.Node, str]
"""A call, and how many keys there are in what it reads or writes."""


def _search(
    softmax: fx.Node,
    onward: Callable[[fx.Node, str], Iterator[Step]],
    is_end: Callable[[fx.Node, fx.Node], bool],
    keys: str,
) -> list[fx.Node] | None:
    """The shortest way from the softmax to an end, both included; over tensors that have the keys as a dim."""
    ways: dict[fx.Node, list[fx.Node]] = {softmax: [softmax]}
    waiting = deque([(softmax, keys)])
    while waiting and len(ways) < FAR:
        node, keys = waiting.popleft()
        for following, its_keys in onward(node, keys):
            if following in ways:
                continue
            ways[following] = [*ways[node], following]
            if is_end(following, node):
                return ways[following]
            if not calls(following, *ENDS):
                waiting.append((following, its_keys))
    return None


def _above(node: fx.Node, keys: str) -> Iterator[Step]:
    for item in node.all_input_nodes:
        found = tensor(item)
        if found is None or item.op == "placeholder":
            continue
        sizes = [str(size) for size in found.shape]
        if keys in sizes:
            yield item, keys
        elif calls(node, *JOINS) and sizes:  # more keys than there are, as a sink adds
            yield item, sizes[argument(node, 1, "dim", 0)]


def _below(node: fx.Node, keys: str, live: set[fx.Node]) -> Iterator[Step]:
    for user in node.users:
        found = tensor(user)
        if user not in live or found is None:
            continue
        if keys in [str(size) for size in found.shape] or contraction.read(user) is not None:
            yield user, keys
        elif calls(user, "getitem", "narrow", "slice") and found.dim():
            yield user, str(found.shape[-1])


def _is_scores(product: Contraction | None) -> bool:
    return product is not None and all(is_computed(item) for item in (product.left, product.right))


def _is_weighted(node: fx.Node, reader: fx.Node) -> bool:
    """Whether the call multiplies what it reads of the softmax with something computed."""
    product = contraction.read(node)
    others = [] if product is None else [item for item in (product.left, product.right) if item is not reader]
    return any(is_computed(item) for item in others)


def _is_common(node: fx.Node) -> bool:
    """Whether every spelling may have such a call."""
    common = calls(node, *CASTS, *RESHAPES, *PRODUCTS, *QUOTIENTS, *SUMS, *FILLS, "expand", "dropout")
    return common or permutation_of(node) is not None
