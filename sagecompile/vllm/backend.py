"""The attention backend: the platform's own, whose metadata also says what our kernels do of each batch.

In: CommonAttentionMetadata, of which only what is on the host is read. Out: the parent's metadata with a Plan. It is
registered as CUSTOM, where its implementation carries the plan out, and in the place of its parent for the pass, whose
op does. A server that asks for neither does not import it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from sagecompile.decide import Keep

from . import op  # noqa: F401  (registered before any graph that calls it is loaded)
from .asked import is_custom
from .attention import PLAN, forward
from .choice import LEAST_QUERIES, Choose, chooser, settings
from .counters import count_batch
from .graph_pass import GraphPass
from .layer import site_of
from .plan import Part, Plan, Rest, parts_of
from .versions import Index, is_dummy, is_known, known_names, own_backend, split_fields, why_not_pages

with known_names():
    from vllm.config import VllmConfig, get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

logger = logging.getLogger("vllm.sagecompile")
PLATFORMS = own_backend()

with known_names():
    Parent: Any = resolve_obj_by_qualname(PLATFORMS.value)
    ParentBuilder: Any = Parent.get_builder_cls()
    ParentImpl: Any = Parent.get_impl_cls()


def has_pass(config: VllmConfig) -> bool:
    """Whether the server runs our pass over its graphs."""
    passes = config.compilation_config.inductor_compile_config.values()  # where vLLM puts those that have a name, too
    return any(isinstance(one, GraphPass) for one in passes)


class Builder(ParentBuilder):  # type: ignore[misc]
    """The parent's, and a plan on what it builds."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._choose: Choose | None = None
        self._ours: frozenset[str] = frozenset()
        self._group = layer_names[0] if layer_names else ""
        # 0.32's adaptive verification: what decodes has other tokens on the device than on the host.
        self._moves_drafts = bool(getattr(vllm_config.speculative_config, "enable_adaptive_verification", False))
        if has_pass(vllm_config) or is_custom(vllm_config):
            self._look_at_layers(layer_names, vllm_config, device)

    def _look_at_layers(self, names: list[str], config: VllmConfig, device: torch.device) -> None:
        """Which layers are ours; deciding once for each builds and tries the kernel before any request comes."""
        layers = [config.compilation_config.static_forward_context[name] for name in names]
        longest = config.model_config.max_model_len
        sites = {name: site_of(layer, str(device)) for name, layer in zip(names, layers, strict=True)}
        decisions = {name: chooser(site, settings())(longest, longest) for name, site in sites.items()}
        used = [name for name, decision in decisions.items() if not isinstance(decision, Keep)]
        for reason in sorted({decision.reason for decision in decisions.values() if isinstance(decision, Keep)}):
            logger.info("sagecompile: attention stays vLLM's: %s", reason)
        if used:
            alike = replace(sites[used[0]], name="")
            self._choose = chooser(alike, settings())
            self._ours = frozenset(name for name in used if replace(sites[name], name="") == alike)
            self._why_not_pages = why_not_pages(layers[names.index(used[0])])
            logger.info("sagecompile: %d of %d layers: %s", len(self._ours), len(names), decisions[used[0]].reason)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """`fast_build` is for models that draft: those stay vLLM's."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self._choose is not None and not fast_build:
            setattr(metadata, PLAN, self._plan(common_attn_metadata))
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """What is captured is replayed for other batches: no plan, and it counts for nothing."""
        choose, self._choose = self._choose, None
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._choose = choose

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> Any:
        """Lengths on the host may be behind the device's there: no plan."""
        metadata = super().build_for_drafting(common_attn_metadata, draft_index)
        setattr(metadata, PLAN, None)
        return metadata

    def update_block_table(self, metadata: Any, blk_table: Any, slot_mapping: Any) -> Any:
        """For another group of layers, that has the same requests in other blocks."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        plan: Plan | None = getattr(metadata, PLAN, None)
        if plan is not None:
            rest = plan.rest
            if rest is not None:
                tables = blk_table[rest.rows], slot_mapping[rest.tokens]
                rest = replace(rest, metadata=super().update_block_table(rest.metadata, *tables))
            setattr(updated, PLAN, replace(plan, rest=rest, layers=self._ours))
        return updated

    def _plan(self, common: Any) -> Plan | None:
        """None where all stays vLLM's: also for what is padded for a CUDA graph, and what is not known to be split."""
        requests, kv_lens = slice(common.num_reqs), common.seq_lens_cpu_upper_bound
        tokens = int(common.query_start_loc_cpu[common.num_reqs])
        if not is_dummy(common):
            count_batch(self._group, tokens)
        if common.max_query_len < LEAST_QUERIES or tokens != common.num_actual_tokens:
            return None
        if kv_lens is None or not isinstance(common.causal, bool) or not is_known(common):
            return None
        prefills = common.is_prefilling if common.is_prefilling is not None else torch.ones_like(kv_lens)
        if min(len(kv_lens), len(prefills)) < common.num_reqs:
            return None
        assert self._choose is not None
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        parts = parts_of(starts, kv_lens[requests].tolist(), prefills[requests].tolist(), self._choose)
        if self._why_not_pages:
            parts = [part for part in parts if part.q_len == part.kv_len]
        if not parts:
            return None
        rest = self._rest(common, starts, kv_lens, parts)
        if rest is not None and self._moves_drafts:
            return None
        return Plan(tuple(parts), rest, self._ours, common.causal)

    def _rest(self, common: Any, starts: list[int], kv_lens: torch.Tensor, parts: list[Part]) -> Rest | None:
        """vLLM's metadata of the requests that are not ours, as of a batch of their own."""
        ours = {part.row for part in parts}
        lengths = [end - start for start, end in pairwise(starts)]
        rows = [row for row, length in enumerate(lengths) if length and row not in ours]
        if not rows:
            return None
        device = common.query_start_loc.device
        at_rows = Index.of(torch.tensor(rows), device)
        at_tokens = Index.of(torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows]), device)
        new_starts = torch.tensor([0, *(lengths[row] for row in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        apart = common.replace(
            query_start_loc=Index.of(new_starts, device).device,
            query_start_loc_cpu=new_starts,
            num_reqs=len(rows),
            num_actual_tokens=int(new_starts[-1]),
            max_query_len=max(lengths[row] for row in rows),
            max_seq_len=int(kv_lens[at_rows.host].max()),
            **split_fields(common, at_rows, at_tokens),
        )
        # A fast build has no schedule made ahead: that would be written into buffers that it shares with the batch's.
        return Rest(at_rows.device, at_tokens.device, super().build(0, apart, fast_build=True))


class Impl(ParentImpl):  # type: ignore[misc]
    """The parent's, after the plan."""

    def forward(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(super().forward, layer, *args, **kwargs)


class Backend(Parent):  # type: ignore[misc]
    """The parent in all things, its name among them, so that what vLLM asks of it by name stays true."""

    makes_plans = True

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return Builder

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return Impl if is_custom(get_current_vllm_config_or_none()) else ParentImpl
