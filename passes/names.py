"""What a site is called: the module that the call is in, and the source line.

In: a node of a graph that Dynamo is compiling. Out: `model.layers.3.self_attn` and `sdpa_attention.py:193`.

Of every module around a node Dynamo notes the id, and where it found it: an expression over the locals L and globals G
of the frame that it compiles, such as `L['self'].layers.3`, `L['a'][0].layers.3` where a decorator took the module as
one of its `*a`, or `L['fn'].func.__self__.layers.3` of a partial of a bound method. The first module on this way is the
outermost one. **A site has the name that its module has there, in `named_modules()`**, however Dynamo came to it; so
`model.get_submodule(name)` finds it. A global has its own name in front, as a function may call several.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from torch import fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator

OUTSIDE = "(top level)"
UNKNOWN = "(unknown)"
ROOT = re.compile(r"\b([LG])\['(\w+)'\]")
STEP_ENDS = re.compile(r"(?=[.\[)])|$")
HIDDEN = frozenset(("_modules", "_orig_mod"))
"""Steps between a module and its child that nobody writes; the second is of a module that was compiled before."""
HOLDERS = frozenset(("func", "args", "keywords", "cell_contents"))
"""Of functools.partial and of closures: steps from a function to the module that it holds."""


def module_path(node: fx.Node) -> str:
    """`model.layers.3.self_attn`, or `(top level)` for a call in no module but the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return OUTSIDE
    key, (source, _) = list(stack.items())[-1]
    front, outermost, inside = _outermost(str(source))
    steps = _steps(inside)
    if outermost is not None and not _is_child(outermost, steps, str(key)):
        ids = {str(id(module)): name for name, module in outermost.named_modules()}
        steps = _steps(ids.get(str(key).partition("@")[0], inside))  # `@1`: called for the second time
    return ".".join([*front, *steps]) or OUTSIDE


def source_line(node: fx.Node) -> str:
    """`sdpa_attention.py:193`, the innermost line of the user's stack."""
    frames = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    if not frames:
        return UNKNOWN
    file, line = frames[-1]
    return f"{PurePath(file).name}:{line}"


def _outermost(source: str) -> tuple[list[str], nn.Module | None, str]:
    """What goes in front, the first module on the way, and the way from there.

    Found as Dynamo's guards find it, by evaluating the expression in the frame; without one it is what L or G holds.
    """
    root = ROOT.search(source)
    if root is None:
        return [], None, source
    scope = _scope()
    for start in (root.start(), 0):  # 0: of `dict(type(L['fn']).__dict__)['__call__'].__closure__[0].cell_contents`
        for end in (match.start() for match in STEP_ENDS.finditer(source, root.end())):
            try:
                found = eval(source[start:end], scope.copy())
            except (SyntaxError, NameError, AttributeError, LookupError, TypeError):  # half an expression, or no frame
                continue
            if isinstance(found, nn.Module):
                way = _steps(source[root.end() : end] if start == root.start() else "")
                return _front(root, way), found, source[end:]
    return _front(root, []), None, source[root.end() :]


def _front(root: re.Match[str], way: list[str]) -> list[str]:
    """Of a global: its name and the way to the module in it. Those whose names begin with `__` are Dynamo's own."""
    scope, name = root.groups()
    return [name, *(step for step in way if step not in HOLDERS)] if scope == "G" and name[:2] != "__" else []


def _scope() -> dict[str, Any]:
    """Locals and globals of the frame that Dynamo is compiling; {} where it compiles none."""
    try:
        frame = InstructionTranslator.current_tx()
    except AttributeError:  # as torch 2.13 says it; 2.11 has None
        return {}
    return {} if frame is None else {"L": frame.f_locals, "G": frame.f_globals}


def _is_child(outermost: nn.Module, steps: list[str], key: str) -> bool:
    """Whether these steps lead to the module with this id, which is soon seen."""
    found: Any = outermost
    for step in steps:
        found = found._modules.get(step) if isinstance(found, nn.Module) else None
    return str(id(found)) == key.partition("@")[0]


def _steps(path: str) -> list[str]:
    """`hold[0].layers.1` as its steps, without those that nobody writes."""
    dotted = re.sub(r"\[(['\"]?)(.*?)\1\]", r".\2", path)
    return [step for step in dotted.split(".") if step not in HIDDEN and not re.fullmatch("|__.*__", step)]
