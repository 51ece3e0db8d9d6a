"""Reading and writing a Dynamo graph: a node's tensor facts, who still uses it, and inserting calls.

In: FX nodes whose `meta["example_value"]` is a fake tensor. Out: facts, or new nodes that carry the same metadata, so
that what comes after (AOTAutograd's cache asks for it) reads them like Dynamo's own.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .names import UNKNOWN, source_line

IN_PLACE_OPERATORS = frozenset(
    (
        "iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem delitem"
    ).split()
)
"""Of the module `operator`; as methods, with two underscores on each side."""
TRANSPARENT = ("tag_activation_checkpoint", "cond", "invoke_subgraph")
"""Higher-order ops whose subgraphs run as if they stood there: a checkpointed block, the branches of a condition."""
CASTS = ("to", "_to_copy", "float", "half", "bfloat16", "type_as", "contiguous", "clone", "type")
RESHAPES = "view reshape flatten unflatten unsqueeze squeeze view_as reshape_as _unsafe_view".split()
"""Calls that hold the same elements in the same (row-major) order under another shape."""
COPIED_METADATA = ("stack_trace", "nn_module_stack", "source_fn_stack")


def with_subgraphs(graph: fx.Graph) -> list[fx.Graph]:
    """The graph, and those inside it that run as if they stood there, each once."""
    found = {graph: None}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and name_of(node.target) in TRANSPARENT:
            for item in node.all_input_nodes:
                module = getattr(graph.owning_module, str(item.target), None) if item.op == "get_attr" else None
                if isinstance(module, fx.GraphModule):
                    found |= dict.fromkeys(with_subgraphs(module.graph))
    return list(found)


def value(node: Any) -> Any:
    """The fake tensor (or SymInt, or tuple) that a node stands for; anything that is not a node stands for itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or None if it does not stand for one tensor."""
    found = value(node)
    return found if isinstance(found, torch.Tensor) else None


def holds_tensors(node: Any) -> bool:
    """Whether a node stands for one tensor, or for a list of them as `chunk` and `unbind` make it."""
    found = value(node)
    items = found if isinstance(found, (tuple, list)) and found else (found,)
    return all(isinstance(item, torch.Tensor) for item in items)


def name_of(target: Any) -> str:
    """`softmax` for torch.softmax, F.softmax, the method and the overload aten.softmax.int alike."""
    target = getattr(target, "overloadpacket", target)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def said(node: fx.Node) -> str:
    """A call as a person would find it in the model: `masked_fill_ at bert.py:104`, `the graph's output`."""
    if node.op == "output":
        return "the graph's output"
    line = source_line(node)
    return name_of(node.target) if line == UNKNOWN else f"{name_of(node.target)} at {line}"


def bare_name(node: fx.Node) -> str:
    """`eq` for the operator `eq` and, in other versions of Dynamo, `Tensor.__eq__`; `and` for `and_`."""
    return name_of(node.target).strip("_")


def calls(node: Any, *names: str) -> bool:
    """Whether the node calls torch's function, operator or method of one of these names, in whatever namespace."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return name_of(node.target) in names and (node.op == "call_method" or _is_torchs(node.target))


def _is_torchs(target: Any) -> bool:
    """Not a user's function or custom op that happens to have the same name."""
    target = getattr(target, "overloadpacket", target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name).startswith("aten::")
    home = getattr(target, "__module__", None) or "torch"  # torch's built-in functions say None
    return home.partition(".")[0] in ("torch", "_operator", "builtins")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name; a float that Dynamo made symbolic as the number it is."""
    found = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return float(value(found)) if _is_symbolic_input(value(found)) else found


def _is_symbolic_input(found: Any) -> bool:
    """Under `dynamic=True` Dynamo makes a symbol of every float that a module keeps, such as its attention's scale.

    Reading such a one adds a guard on that float; one computed from sizes stays symbolic, as it would fix them.
    """
    if not isinstance(found, torch.SymFloat):
        return False
    return all(symbol_is_type(symbol, SymT.FLOAT) for symbol in found.node.expr.free_symbols)


def mutates(node: fx.Node) -> bool:
    """Whether the call may change a tensor it is given."""
    name = name_of(node.target)
    ends_in_place = name.endswith("_") and not name.endswith("__")
    if node.op == "call_method":
        return ends_in_place or name.strip("_") in IN_PLACE_OPERATORS
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # a Triton kernel, a subgraph: not looked into
        return True
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if getattr(node.target, "__module__", None) == "_operator":  # its and_, or_ and not_ are pure
        return name in IN_PLACE_OPERATORS
    return ends_in_place


def written(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that a mutating call may change."""
    if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
        inputs = list(node.all_input_nodes)
    elif isinstance(node.target, torch._ops.OpOverload):
        schema = zip(node.target._schema.arguments, range(len(node.target._schema.arguments)), strict=True)
        changed = [argument(node, i, item.name) for item, i in schema if item.alias_info and item.alias_info.is_write]
        inputs = [item for item in tree_leaves(changed) if isinstance(item, fx.Node)]
    else:
        inputs = [argument(node, 0, "input"), *tree_leaves(node.kwargs.get("out"))]
    return [found for found in map(tensor, inputs) if found is not None]


def storage(found: torch.Tensor) -> int | None:
    """Says which tensors share memory: views of one tensor have the same. None for a tensor without one memory."""
    plain = isinstance(found, FakeTensor) and found.layout == torch.strided
    return found.untyped_storage()._cdata if plain else None


def is_computed(node: fx.Node) -> bool:
    """Whether a value depends on an input of the graph that is no parameter."""
    seen = {node}
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if item.op == "placeholder" and not isinstance(tensor(item), (torch.nn.Parameter, type(None))):
            return True
        new = [source for source in item.all_input_nodes if source not in seen]
        seen.update(new)
        waiting.extend(new)
    return False


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that matter. Dynamo leaves in the graph what the model computed and threw away."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        pure = node.op in ("call_function", "call_method") and not mutates(node) and holds_tensors(node)
        pure = pure or calls(node, "_assert_tensor_metadata")  # export's, of what is known since
        if not pure or any(user in live for user in node.users):
            live.add(node)
    return live


def erase_dead(graph: fx.Graph, roots: Iterable[fx.Node]) -> None:
    """Remove the roots and whatever is connected to them, as far as nothing needs it any more."""
    live = live_nodes(graph)
    dead: set[fx.Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in live and node not in dead:
            dead.add(node)
            waiting.extend([*node.users, *node.all_input_nodes])
    for node in reversed(graph.nodes):
        if node in dead:
            graph.erase_node(node)


def autocast_is_on(node: fx.Node, device_type: str) -> bool:
    """Whether autocast is on where the node is: by the innermost region of the graph around it, or around the graph."""
    regions: list[fx.Node] = []
    for item in node.graph.nodes:
        if item is node:
            break
        if calls(item, "_enter_autocast") and item.args[0] == device_type:
            regions.append(item)
        elif calls(item, "_exit_autocast") and item.args[0] in regions:
            regions.remove(item.args[0])
    return bool(regions[-1].args[2]) if regions else torch.is_autocast_enabled(device_type)


class Builder:
    """Inserts calls in front of an anchor node, with its source location and with example values of their own.

    `replaced`: nodes of the graph as it was matched, with what has taken their place since. A call that is given one of
    them gets the other, so that nobody reads what was replaced, whatever was noted before.
    """

    def __init__(
        self,
        anchor: fx.Node,
        replaced: Mapping[fx.Node, fx.Node] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.graph = anchor.graph
        self.anchor = anchor
        self.replaced = replaced or {}
        self.metadata = metadata or {key: anchor.meta[key] for key in COPIED_METADATA if key in anchor.meta}

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of a dim: an int, or the node of a symbolic one."""
        found = tensor(node)
        assert found is not None
        return found.shape[dim] if isinstance(found.shape[dim], int) else self.call(torch.Tensor.size, node, dim)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        args, kwargs = fx.map_arg((args, kwargs), lambda node: self.replaced.get(node, node))
        with self.graph.inserting_before(self.anchor):
            # What C wrote has no module, by which AOTAutograd's cache would know it: a method by its name has.
            if isinstance(function, types.MethodDescriptorType):
                node = self.graph.call_method(function.__name__, args, kwargs)
            else:
                node = self.graph.call_function(function, args, kwargs)
        node.meta.update(self.metadata)
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), value)
        # Dynamo's own mode: the one that is current while a backend runs is another.
        modes = [leaf.fake_mode for leaf in tree_leaves((fake_args, fake_kwargs)) if isinstance(leaf, FakeTensor)]
        if modes:  # none inside torch.vmap, whose tensors mean nothing outside it
            with modes[0], torch.no_grad():
                node.meta["example_value"] = function(*fake_args, **fake_kwargs)
        return node


def number(build: Builder, found: Any, look: bool = False) -> Any:
    """A number as it is, a symbol as a node that computes it again from the graph's inputs; None if that cannot be.

    `look`: insert nothing, only say whether it can be.
    """
    if found is None or isinstance(found, int):
        return found
    if not isinstance(found, torch.SymInt):
        return None
    known = _symbols(build.graph)
    expression = found.node.expr
    if not expression.free_symbols <= known.keys() or not _is_polynomial(expression):
        return None
    return True if look else _emitted(build, expression, known)


def _symbols(graph: fx.Graph) -> dict[Any, tuple[fx.Node, int | None]]:
    """Where each symbol of a size is an input of the graph, or one of its dims."""
    found: dict[Any, tuple[fx.Node, int | None]] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        given = value(node)
        sizes = [(given, None)] if isinstance(given, torch.SymInt) else []
        if isinstance(given, torch.Tensor) and given.layout == torch.strided:
            sizes += [(size, dim) for dim, size in enumerate(given.shape)]
        for size, dim in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (node, dim))
    return found


def _is_polynomial(expression: Any) -> bool:
    if expression.is_symbol or expression.is_Integer:
        return True
    return (expression.is_Add or expression.is_Mul) and all(map(_is_polynomial, expression.args))


def _emitted(build: Builder, expression: Any, known: Mapping[Any, tuple[fx.Node, int | None]]) -> Any:
    if expression.is_Integer:
        return int(expression)
    if expression.is_symbol:
        node, dim = known[expression]
        return node if dim is None else build.size(node, dim)
    terms = [_emitted(build, item, known) for item in expression.args]
    total = terms[0]
    for term in terms[1:]:
        total = build.call(operator.add if expression.is_Add else operator.mul, total, term)
    return total
