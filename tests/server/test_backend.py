"""Plans of batches as vLLM describes them, and what our pass is in another process: vLLM, but no engine and no kernel.

In: CommonAttentionMetadata of the shapes that vLLM's runners make. Out: the plan, and the metadata of the rest.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from test_plan import layer

from sagecompile.decide import Keep, Use
from sagecompile.settings import Settings

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
    made._ours, made._group, made._why_not_pages, made._moves_drafts = frozenset({"layer"}), "layer", None, False
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
    found = [(part.row, part.start, part.q_len, part.kv_len) for part in plan.parts]
    assert found == [(1, 1, 300, 300), (3, 321, 128, 500)]
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


def test_where_drafts_move_on_the_device_a_mixed_batch_stays(builder):
    """What decodes has other tokens there than on the host, so that the rest cannot be told from ours."""
    builder._moves_drafts = True
    assert plan_of(builder, batch([5, 300], [90, 300], [False, True])) is None
    assert plan_of(builder, batch([200, 300], [200, 300], [True, True])) is not None


def test_what_is_captured_or_warms_up_counts_for_nothing_and_has_no_plan(builder, monkeypatch):
    from sagecompile.vllm import backend

    counted = []
    monkeypatch.setattr(backend, "count_batch", lambda group, tokens: counted.append(tokens))
    captured = builder.build_for_cudagraph_capture(batch([300], [300], [True]))
    assert getattr(captured, "sagecompile_plan", None) is None and counted == []
    plan_of(builder, batch([4, 4, 2], [4, 4, 4], [False] * 3))
    assert counted == []
    plan_of(builder, batch([1, 1], [2, 90], [False] * 2))
    plan_of(builder, batch([20], [20], [True]))
    assert counted == [2, 20]


def config_of(**compilation):
    from vllm.config import CompilationConfig

    return SimpleNamespace(compilation_config=CompilationConfig(**compilation))


def test_the_pass_is_known_by_name_and_as_an_object():
    from sagecompile import vllm_pass
    from sagecompile.vllm.backend import has_pass

    key = "post_grad_custom_post_pass"
    by_name = config_of(inductor_passes={key: "sagecompile.vllm_pass"})
    assert has_pass(by_name) and has_pass(copy.deepcopy(by_name))
    for asked in (vllm_pass, copy.deepcopy(vllm_pass)):
        assert has_pass(config_of(inductor_compile_config={key: asked}))
    assert not has_pass(config_of(inductor_compile_config={"trace": "on"}))


def test_a_graph_without_attention_is_warned_of_only_where_vllm_may_have_cut_it(monkeypatch):
    from sagecompile.vllm import graph_pass

    warned = []
    monkeypatch.setattr(graph_pass, "_warn_of_nothing", lambda: warned.append(True))
    for splitting_ops, partition in ([], False), (["vllm::op"], True), (["vllm::op"], False):
        config = config_of(splitting_ops=splitting_ops, use_inductor_graph_partition=partition)
        monkeypatch.setattr(graph_pass, "get_current_vllm_config_or_none", lambda config=config: config)
        assert warned == []
        graph_pass.graph_pass()(torch.fx.Graph())
    assert warned == [True]


def test_what_a_cached_graph_says_does_not_depend_on_what_runs_here_now(monkeypatch):
    from sagecompile.kernels import available
    from sagecompile.vllm import graph_pass

    monkeypatch.setattr(available, "refusal", lambda *_, **__: "no compiler")
    monkeypatch.setattr(graph_pass, "settings", lambda: Settings(policy="auto"))
    entry = graph_pass._entry(layer(), "cpu")
    assert isinstance(entry.decision, graph_pass.ByRequest)
    assert isinstance(graph_pass._entry(layer(head_size=264, head_size_v=264), "cpu").decision, Keep)


REGISTER = """
import logging, sys
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from sagecompile.vllm import plugin
custom, cpu_attn = AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN
{before}
logging.basicConfig(level="DEBUG")
plugin.register()
print(registry._ATTN_OVERRIDES.get(custom))
print(cpu_attn.get_class().__module__)
"""
OURS, VLLMS = "sagecompile.vllm.backend.Backend", "vllm.v1.attention.backends.cpu_attn"
OTHER_CONFIG = f"import {VLLMS}\ndel sys.modules['vllm.config'].get_current_vllm_config_or_none"
THEIRS = "registry.register_backend({}, 'logging.handlers.SocketHandler')"


@pytest.mark.parametrize(
    ("before", "custom", "cpu_attn", "said"),
    [
        ("", OURS, VLLMS, None),
        (THEIRS.format("custom"), "logging.handlers.SocketHandler", VLLMS, "CUSTOM is logging.handlers.SocketHandler"),
        (THEIRS.format("cpu_attn"), OURS, "logging.handlers", None),
        ("del registry.register_backend", "None", VLLMS, "this version of vLLM is not known (ImportError: cannot"),
        (OTHER_CONFIG, OURS, VLLMS, "this version of vLLM is not known (ImportError: cannot"),
        ("sys.modules['sagecompile.vllm.backend'] = None", OURS, VLLMS, None),
    ],
    ids=["ours", "their CUSTOM", "their CPU_ATTN", "another registry", "another config", "a broken backend of ours"],
)
def test_the_plugin_replaces_nobody_and_ends_no_start(before, custom, cpu_attn, said):
    """And says what it found to whoever looks for it, at the level DEBUG, and nothing otherwise."""
    command = [sys.executable, "-c", REGISTER.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [custom, cpu_attn]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "sagecompile: " in line]
    assert len(lines) == (said is not None)
    assert all(line.startswith("DEBUG:vllm.sagecompile:") and said in line for line in lines)


ASKED = """
import sys
from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.v1.attention.backends.registry import AttentionBackendEnum
import sagecompile
from sagecompile.vllm import plugin
plugin.register()
{before}
if {by_pass}:
    assert isinstance(sagecompile.vllm_pass, InductorPass)
with set_current_vllm_config(VllmConfig(attention_config=AttentionConfig(backend=None if {by_pass} else "CUSTOM"))):
    print(AttentionBackendEnum.CPU_ATTN.get_class().__module__)
print(AttentionBackendEnum.CPU_ATTN.get_class().__module__)
"""
LACKS_NAME = "from vllm.model_executor.layers.attention import attention\ndel attention.get_attention_context"


@pytest.mark.parametrize("by_pass", [True, False], ids=["the pass", "CUSTOM"])
@pytest.mark.parametrize(
    ("before", "error"),
    [
        ("", None),
        ("sys.modules['sagecompile.vllm.choice'] = None", "ModuleNotFoundError: import of sagecompile.vllm.choice"),
        ("import sagecompile.decide\ndel sagecompile.decide.Keep", "ImportError: cannot import name 'Keep' from 'sage"),
        (LACKS_NAME, "UnsupportedError: this version of vLLM is not known (ImportError: cannot import name 'get_att"),
    ],
    ids=["ours", "a module of ours is broken", "a name of ours is missing", "a name of vLLM's is missing"],
)
def test_whoever_asks_gets_ours_or_the_error_that_it_is(before, error, by_pass):
    """With CUSTOM while a config that says so is vLLM's current one; with the pass in the whole process."""
    command = [sys.executable, "-c", ASKED.format(before=before, by_pass=by_pass)]
    done = subprocess.run(command, capture_output=True, text=True)
    if error is None:
        ours = "sagecompile.vllm.backend"
        assert done.stdout.splitlines()[-2:] == [ours, ours if by_pass else VLLMS], done.stderr
    else:
        last = done.stderr.splitlines()[-1]
        assert done.returncode != 0 and error in last and ("not known" in last) == ("Unsupported" in error), last


KEYS, VALUES = torch.arange(2 * 3 * 4 * 2 * 8).view(2, 3, 4, 2, 8).unbind(0)
"""Of 3 pages, 4 tokens a page, 2 KV heads, head_dim 8."""


@pytest.mark.parametrize(
    ("facts", "cache"),
    [
        ({}, torch.stack([KEYS, VALUES])),
        ({}, torch.cat([KEYS, VALUES], -1).transpose(1, 2)),
        (
            {"isa": "vec"},
            torch.cat([KEYS.permute(0, 2, 3, 1).flatten(2), VALUES.transpose(1, 2).flatten(2)], 2).view(3, 2, 4, 16),
        ),
    ],
    ids=["0.20.2 on CUDA", "0.32 on CUDA", "0.32 on a CPU"],
)
def test_pages_of_every_known_layout(facts, cache):
    from sagecompile.vllm.versions import pages

    keys, values = pages(SimpleNamespace(head_size=8, **facts), cache)
    assert torch.equal(keys, KEYS) and torch.equal(values, VALUES)


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
