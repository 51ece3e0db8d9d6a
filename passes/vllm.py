"""vLLM's attention layers in a post-grad graph: `auto_functionalized(vllm.unified_attention_with_output, ...)`.

In: the graph, vLLM's op and ours, which has the same schema, and what is decided of the layer of a name. Out: the graph
with our op where that is Use, changed in place, and the report. What lengths the requests have, the op itself sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch.fx import Graph, Node

from sagecompile.decide import Use
from sagecompile.report import Entry, Report

FUNCTIONALIZED = (auto_functionalized, auto_functionalized_v2)


def run(
    graph: Graph, theirs: torch._ops.OpOverload, ours: torch._ops.OpOverload, entry: Callable[[str, str], Entry]
) -> Report:
    """Put `ours` where `theirs` was, wherever `entry` says Use of the layer's name and device."""
    entries = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONALIZED and node.args[0] is theirs:
            device = str(node.kwargs["query"].meta["val"].device)
            entries.append(entry(_layer_name(node.kwargs["layer_name"]), device))
            if isinstance(entries[-1].decision, Use):
                node.args = (ours, *node.args[1:])
    return Report(tuple(entries))


def _layer_name(given: Any) -> str:
    """A string, an opaque object that holds one as `value`, or an input of the graph that stands for such an object."""
    if isinstance(given, Node):
        given = given.meta["val"]
        given = getattr(given, "real_obj", given)
    return given if isinstance(given, str) else str(given.value)
