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
from .graph import CASTS, RESHAPES, argument, calls, is_computed, mutates, said, tensor
from .operand import permutation_of, standard
from .pattern import Attend, Match, make_site
from .unfused import FILLS, PRODUCTS, QUOTIENTS, SUMS

FAR = 64
"""Calls looked at in each direction."""
ENDS = ("softmax", "layer_norm", "rms_norm", "group_norm", "batch_norm", "scaled_dot_product_attention")
"""What lies behind them is no longer the same attention."""
LAYERS = "linear addmm conv1d conv2d conv3d convolution".split()


def match_unknown(softmax: fx.Node, live: set[fx.Node]) -> Match | None:
    """Kept, with the call that is not known as the reason."""
    found, dim = tensor(softmax), argument(softmax, 1, "dim")
    if found is None or not isinstance(dim, int) or found.dim() < 2:
        return None
    keys = str(found.shape[dim])
    above = _search(softmax, lambda node: _above(node, keys), lambda node, _: _is_scores(contraction.read(node)))
    below = _search(softmax, lambda node: _below(node, keys, live), _is_weighted)
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


def _search(
    softmax: fx.Node, onward: Callable[[fx.Node], Iterator[fx.Node]], is_end: Callable[[fx.Node, fx.Node], bool]
) -> list[fx.Node] | None:
    """The shortest way from the softmax to an end, both included."""
    ways = {softmax: [softmax]}
    waiting = deque([softmax])
    while waiting and len(ways) < FAR:
        node = waiting.popleft()
        for following in onward(node):
            if following in ways:
                continue
            ways[following] = [*ways[node], following]
            if is_end(following, node):
                return ways[following]
            if not calls(following, *ENDS):
                waiting.append(following)
    return None


def _above(node: fx.Node, keys: str) -> Iterator[fx.Node]:
    writers = [user for user in node.users if mutates(user)]  # a buffer filled part by part
    for item in [*node.all_input_nodes, *(source for user in writers for source in user.all_input_nodes)]:
        if item.op != "placeholder" and _may_be_scores(item, node, keys):
            yield item


def _below(node: fx.Node, keys: str, live: set[fx.Node]) -> Iterator[fx.Node]:
    for user in node.users:
        if user in live and (contraction.read(user) is not None or _may_be_scores(user, user, keys)):
            yield user


def _may_be_scores(node: fx.Node, call: fx.Node, keys: str) -> bool:
    """Whether scores or weights may be in it; behind a layer of the model only what still has the keys as a dim is."""
    found = tensor(node)
    if found is None or found.dim() < 2:
        return False
    return not calls(call, *LAYERS) or keys in [str(size) for size in found.shape]


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
