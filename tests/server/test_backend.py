"""Plans of batches as vLLM describes them, and what our pass is in another process: vLLM, but no engine and no kernel.

In: CommonAttentionMetadata of the shapes that vLLM's runners make. Out: the plan, and the metadata of the rest.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from sagecompile.decide import Keep, Use

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: .ci/vllm runs these"),
]
USE = Use("qk_int8_pv_fp16", "cpu")


@pytest.fixture
def builder(monkeypatch):
    """Of one layer, for requests of 100 queries and more; the parent's build gives back what it is given."""
    from sagecompile.vllm import backend

    monkeypatch.setattr(
        backend.ParentBuilder,
        "build",
        lambda self, prefix, common, fast_build=False: SimpleNamespace(common=common, fast_build=fast_build),
    )
    made = object.__new__(backend.Builder)
    made._choose = lambda q_len, kv_len: USE if q_len >= 100 else Keep("short")
    made._ours, made._group, made._why_not_pages = frozenset({"layer"}), "layer", None
    return made


def batch(q_lens, kv_lens, prefills, **changes):
    """As a runner has it; a padded request has no tokens, and may be missing among the prefills."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, lengths = sum(q_lens), torch.tensor(kv_lens, dtype=torch.int32)
    facts = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": lengths,
        "seq_lens_cpu_upper_bound": lengths,
        "num_reqs": len(q_lens),
        "num_actual_tokens": tokens,
        "max_query_len": max(q_lens),
        "max_seq_len": max(kv_lens),
        "block_table_tensor": 10 * torch.arange(len(q_lens))[:, None] + torch.arange(4),
        "slot_mapping": torch.arange(tokens),
        "positions": torch.arange(tokens),
        "is_prefilling": torch.tensor(prefills),
    }
    return CommonAttentionMetadata(**facts | changes)


def plan_of(builder, common):
    return builder.build(0, common).sagecompile_plan


def test_whole_prompts_are_ours(builder):
    plan = plan_of(builder, batch([300, 212], [300, 212], [True, True]))
    assert [(part.start, part.q_len) for part in plan.parts] == [(0, 300), (300, 212)]
    assert plan.rest is None and plan.is_causal


def test_requests_that_are_padded_for_a_cuda_graph_stay(builder):
    """Two of 512 tokens and four of none, which only some runners have among the prefills: then they are no parts."""
    q_lens, kv_lens = [300, 212, 0, 0, 0, 0], [300, 212, 0, 0, 0, 0]
    assert plan_of(builder, batch(q_lens, kv_lens, [True, True])) is None
    plan = plan_of(builder, batch(q_lens, kv_lens, [True, True, False, False, False, False]))
    assert len(plan.parts) == 2 and plan.rest is None


def test_the_rest_of_a_mixed_batch_is_a_batch_of_its_own(builder):
    """A decode, a whole prompt, a short prompt, a chunk behind a context, a padded request."""
    plan = plan_of(builder, batch([1, 300, 20, 128, 0], [90, 300, 20, 500, 0], [False, True, True, True, False]))
    assert [(part.row, part.start, part.q_len, part.kv_len) for part in plan.parts] == [(1, 1, 300, 300), (3, 321, 128, 500)]  # fmt: skip
    tokens = [0, *range(301, 321)]
    assert plan.rest.rows.tolist() == [0, 2] and plan.rest.tokens.tolist() == tokens
    apart = plan.rest.metadata.common
    assert plan.rest.metadata.fast_build
    assert (apart.num_reqs, apart.num_actual_tokens, apart.max_query_len, apart.max_seq_len) == (2, 21, 20, 90)
    assert apart.query_start_loc.tolist() == apart.query_start_loc_cpu.tolist() == [0, 1, 21]
    assert apart.seq_lens.tolist() == apart.seq_lens_cpu_upper_bound.tolist() == [90, 20]
    assert apart.is_prefilling.tolist() == [False, True]
    assert apart.block_table_tensor[:, 0].tolist() == [0, 20]
    assert apart.slot_mapping.tolist() == apart.positions.tolist() == tokens


def test_unpickled_twice_the_pass_still_takes_its_place():
    """As from a server to its engine to the engine's workers, each in a process of its own."""
    import sagecompile

    twice = pickle.dumps(pickle.loads(pickle.dumps(sagecompile.vllm_pass)))
    code = (
        "import pickle, sys\n"
        "found = pickle.load(sys.stdin.buffer)\n"
        "from sagecompile.vllm import graph_pass, plugin, versions\n"
        "assert plugin.take_place.cache_info().currsize == 1\n"
        "assert versions.own_backend().get_path() == plugin.BACKEND\n"
        "assert found is graph_pass.graph_pass()\n"
    )
    subprocess.run([sys.executable, "-c", code], input=twice, check=True)
