"""The pass as vLLM runs it: over each graph that it compiles, after its own passes.

In: a post-grad graph. Out: the same graph with our op at the layers that are ours, the report in the log, and a uuid of
our sources and settings, by which vLLM's and Inductor's caches know what was compiled with us.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch.fx import Graph

from sagecompile import report
from sagecompile.decide import Keep, Use, legal
from sagecompile.kernels import available
from sagecompile.passes import vllm as vllms_graph
from sagecompile.report import Entry
from sagecompile.sources import source_hash

from . import plugin
from .choice import settings
from .layer import site_of
from .versions import known_names

with known_names():
    from vllm.compilation.passes.inductor_pass import InductorPass
    from vllm.config import get_current_vllm_config_or_none
    from vllm.forward_context import get_forward_context

logger = logging.getLogger("vllm.sagecompile")


@dataclass(frozen=True)
class ByRequest(Use):
    """A layer whose requests the op sends to our kernels or not, each by its length."""

    @property
    def reason(self) -> str:
        return f"request by request, by policy={settings().policy}"


class GraphPass(InductorPass):
    """Rewrites every attention layer that our kernels can do."""

    def __call__(self, graph: Graph) -> None:
        from . import op

        def look(name: str, device: str) -> Entry:
            return _entry(get_forward_context().no_compile_layers[name], device)

        done = vllms_graph.run(graph, op.THEIRS, op.OURS, look)
        if done.entries:
            logger.info("sagecompile: %s", done.summary())
            logger.debug("\n%s", done)
        elif _may_be_split():
            _warn_of_nothing()
        report.record(done)

    def uuid(self) -> str:
        """What a cached graph was made with."""
        return f"{source_hash()}-{settings()}"

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """In whichever process it is unpickled, our backend takes its place."""
        return graph_pass, ()


def _entry(layer: Any, device: str) -> Entry:
    """Whether the layer is one that kernels are made for. Not whether one runs here and now, as the graph is cached,
    nor whether it wins, as lengths are not known: the op goes by both for each request.
    """
    site = site_of(layer, device)
    candidates, limits = legal(site, available.device(device), settings().formats)
    if settings().policy == "never":
        return Entry(site, Keep("policy=never: set SAGECOMPILE_POLICY to auto or always"))
    if not candidates:
        return Entry(site, Keep("; ".join(limits)))
    return Entry(site, ByRequest(candidates[0].format, candidates[0].provider))


def _may_be_split() -> bool:
    """Whether vLLM may have cut the model at its attention layers before Inductor saw it."""
    config = get_current_vllm_config_or_none()
    if config is None:
        return True
    compilation = config.compilation_config
    return bool(compilation.splitting_ops) and not compilation.use_inductor_graph_partition


@cache
def _warn_of_nothing() -> None:
    logger.warning(
        "sagecompile: a compiled graph without attention layers. If vLLM split the model at them, set "
        '"use_inductor_graph_partition": true in --compilation-config, or use --attention-backend CUSTOM'
    )


@cache
def graph_pass() -> GraphPass:
    """The one of this process. Raises OptionError for an impossible SAGECOMPILE_ variable."""
    settings()
    plugin.register()
    plugin.take_place()
    return GraphPass()
