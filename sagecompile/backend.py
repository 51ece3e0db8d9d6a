"""`torch.compile(model, backend="sage_inductor")`: our pass over the graph, then Inductor; and `explain`.

In: a Dynamo graph with example inputs, torch.compile's mode and options. Out: what Inductor compiles of the rewritten
graph. The backend is found through the `torch_dynamo_backends` entry point, so nothing of ours need be imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch._inductor.compile_fx  # seconds, which belong to torch.compile as with inductor, not to the first call
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

import sagecompile.passes as passes
from sagecompile import counters, measure, ops, report, settings
from sagecompile.cost.local import Local
from sagecompile.decide import Decision, Keep, decide
from sagecompile.dump import dump
from sagecompile.errors import OptionError
from sagecompile.formats import fuses, fusing_devices
from sagecompile.kernels import available
from sagecompile.report import Report
from sagecompile.settings import Settings
from sagecompile.site import AttentionSite
from sagecompile.sources import source_hash

logger = logging.getLogger("sagecompile")

PASS_SLOTS = (
    "post_grad_custom_post_pass",
    "post_grad_custom_pre_pass",
    "joint_custom_post_pass",
    "joint_custom_pre_pass",
)
"""Inductor options that hold custom passes: the first that the user left free carries our stamp, else the last one does
beside the user's, as a pass there is called with nothing but the graph."""


def sage_inductor(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite the attention calls of `gm` where that is decided, then compile it with Inductor.

    `mode` and every option without the prefix `sage.` go to Inductor as they are. Raises OptionError for an unknown
    or impossible `sage.` option.
    """
    counters.look()
    ours, inductor_options = settings.resolve(options)
    is_captured = _is_captured(ours, _inductor(mode, inductor_options))
    decision = decider(ours, is_captured)
    before = len(_guards())
    done = _rewrite(gm, decision, ours)
    logger.info(done.summary())
    logger.debug("\n%s", done)
    report.record(done)
    if measure.is_asked():
        return gm.forward
    counters.watch(done, lambda device: measurements(device, is_captured))
    return _inductor(mode, inductor_options, _guards()[before:])(gm, example_inputs)  # type: ignore[no-any-return]


def _rewrite(gm: GraphModule, decision: Callable[[AttentionSite], Decision], ours: Settings) -> Report:
    """`passes.run`, dumped and made to measure errors where that is asked for."""
    nodes: list[Node] = []
    dump(gm, "before")
    done = passes.run(gm, decision, fusing(ours), nodes)
    dump(gm, "after")
    return measure.watch(done, nodes) if measure.is_asked() else done


def _inductor(mode: str | None, options: dict[str, Any], guards: Sequence[str] = ()) -> Any:
    """Inductor as torch.compile itself would call it, with its own checks of mode and options."""
    return torch._TorchCompileInductorWrapper(mode, _with_stamp(options, guards), None)


def _guards() -> list[str]:
    """Of the sizes of the graph that Dynamo is compiling."""
    context = torch._guards.TracingContext.try_get()
    shape_env = context.fake_mode.shape_env if context and context.fake_mode else None
    return [str(guard.expr) for guard in shape_env.guards] if shape_env else []


def _is_captured(ours: Settings, inductor: Any) -> bool:
    """Whether the graph runs inside of a CUDA graph: Inductor's, or the caller's."""
    return ours.cuda_graphs or bool(inductor.get_compiler_config()["triton.cudagraphs"])


def decider(ours: Settings, cuda_graphs: bool) -> Callable[[AttentionSite], Decision]:
    """`decide` for this machine; `cuda_graphs`: whether the graph will be captured in one."""

    def decision(site: AttentionSite) -> Decision:
        fails_fused = False

        def can_run(site: AttentionSite, format: str, provider: str) -> str | None:
            nonlocal fails_fused
            reason = available.refusal(site, format, provider, cuda_graphs)
            fails_fused |= bool(reason and site.prologues and fuses((format, provider), site.head_dim))
            return reason

        local = replace(measurements(site.device, cuda_graphs), may_measure=ours.measure)
        found = decide(site, available.device(site.device), ours, can_run, local, cuda_graphs)
        if fails_fused and isinstance(found, Keep):  # the same kernel may run where it leaves the prologues to Inductor
            return decision(replace(site, prologues=None))
        return found

    return decision


def fusing(ours: Settings) -> frozenset[str]:
    """Device types on which these settings may use a kernel that does prologues."""
    return frozenset() if ours.policy == "never" else fusing_devices(may_win=ours.policy == "auto")


@cache
def measurements(device: str, cuda_graphs: bool) -> Local:
    """What this machine itself says of a device, for graphs that are captured in CUDA graphs or not."""
    return Local(available.machine(device) | {"sources": source_hash()}, ops, cuda_graphs)


def explain(model: Callable[..., Any], *args: Any, measure_error: bool = False, **kwargs: Any) -> Report:
    """Run `model(*args, **kwargs)` once and report every attention call: used or kept, and why.

    What torch.compile returned with `backend="sage_inductor"` is explained with the mode, options and `dynamic` it was
    given, anything else with those of the environment. Without `dynamic` it is of these sizes, whatever came before.
    What runs are the model's own graphs, not the rewritten ones. With `measure_error` it is the rewritten ones, not
    compiled by Inductor, and the report also has each used site's error on its own q, k and v, see `report.Measured`.
    """
    if not isinstance(measure_error, bool):
        raise OptionError(f"measure_error {measure_error!r}: it can be True, False")
    given = _options_of(model)
    if not given and _unwrapped(model) is not model:
        logger.warning("another backend compiled this model; this is what backend='sage_inductor' would do to it:")
    with measure.measuring(measure_error):
        return explain_with(given, model, args, kwargs)


def explain_with(
    given: Mapping[str, Any], model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Report:
    """`explain` with torch.compile's `mode`, `options` and `dynamic` given; it measures inside `measuring()`."""
    ours, inductor_options = settings.resolve(given.get("options"))
    decision = decider(ours, _is_captured(ours, _inductor(given.get("mode"), inductor_options)))
    found = Report(graphs=0)

    def look(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal found
        rewritten = _copy(gm)
        found += _rewrite(rewritten, decision, ours)
        return rewritten.forward if measure.is_asked() else gm.forward

    original = _unwrapped(model)

    def run(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    # Dynamo keeps what it compiled with the code object: one of its own leaves the model's and its limits alone.
    run.__code__ = run.__code__.replace()
    torch.compile(run, backend=look, dynamic=bool(given.get("dynamic")))(*args, **kwargs)
    return found


def _unwrapped(model: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile was given to return this model, or the model itself."""
    found = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)
    return model if found is None else found


def _options_of(model: Any) -> dict[str, Any]:
    """The `mode`, `options` and `dynamic` that torch.compile was given with our backend, {} for any other model.

    A compiled module keeps them in its context; a compiled function, and what Module.compile() made, in the closure.
    """
    compiled = getattr(model, "_compiled_call_impl", None) or model
    held = [cell.cell_contents for cell in getattr(compiled, "__closure__", None) or ()]
    for context in (getattr(model, "dynamo_ctx", None), *held):
        backend = getattr(context, "callback", None)
        while backend is not None and getattr(backend, "compiler_fn", None) is not sage_inductor:
            backend = getattr(backend, "_torchdynamo_orig_backend", None)
        if backend is not None:
            return {**backend.kwargs, "dynamic": getattr(context, "_dynamic", None)}
    return {}


def _copy(gm: GraphModule) -> GraphModule:
    """The same modules and parameters with a graph of its own."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return GraphModule(gm, graph)


class Stamp(CustomGraphPass):
    """A pass that does what the user's in the same slot do: its uuid puts our sources and guards, beside theirs, into
    the key of Inductor's and AOTAutograd's caches.

    What they keep of a graph has its guards with it: without ours in the key, the next to compile the same graph, by
    another crossing or none, would be guarded by the old one.
    """

    def __init__(self, guards: Sequence[str], passes: Sequence[Callable[[Graph], None]]) -> None:
        self.guards, self.passes = guards, passes

    def __call__(self, graph: Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        """None, by which nothing is cached, where one of the user's has none, as Inductor has it without us."""
        theirs = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return (source_hash(), tuple(self.guards), tuple(theirs)) if all(theirs) else None


def _with_stamp(options: dict[str, Any], guards: Sequence[str]) -> dict[str, Any]:
    given = {slot: getattr(torch._inductor.config, slot) for slot in PASS_SLOTS}
    given |= {slot: passes for name, passes in options.items() if (slot := name.replace("-", "_")) in PASS_SLOTS}
    slot = next((slot for slot in PASS_SLOTS if not given[slot]), PASS_SLOTS[-1])
    passes = given[slot] or []
    stamp = Stamp(guards, passes if isinstance(passes, (list, tuple)) else [passes])  # several since torch 2.13
    return {name: value for name, value in options.items() if name.replace("-", "_") != slot} | {slot: stamp}
