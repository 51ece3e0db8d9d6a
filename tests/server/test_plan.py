"""Which requests of a batch go to our kernels, decided from lengths alone: without vLLM and without a kernel run.

In: layers as vLLM has them, batches as lists of lengths. Out: parts, choices, and the reason of each layer that stays.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from sagecompile.decide import Keep, Use
from sagecompile.kernels import available
from sagecompile.settings import Settings
from sagecompile.site import Device
from sagecompile.vllm import choice
from sagecompile.vllm.choice import LEAST_QUERIES, chooser, square
from sagecompile.vllm.layer import site_of
from sagecompile.vllm.plan import parts_of

ALWAYS = Settings(policy="always", formats=("qk_int8_pv_fp16",))
USE = Use("qk_int8_pv_fp16", "cpu")


class Attention(SimpleNamespace):
    """Of the name, and with the facts, of vLLM's plain attention layer."""


def layer(kind=Attention, impl=None, **changes):
    plain = {"alibi_slopes": None, "logits_soft_cap": 0, "sinks": None, "scale": 0.125, "dcp_world_size": 1}
    facts = {
        "layer_name": "model.layers.0.self_attn.attn",
        "attn_backend": SimpleNamespace(makes_plans=True),
        "impl": SimpleNamespace(**plain | (impl or {})),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 64,
        "head_size_v": 64,
        "dtype": "torch.float32",
        "attn_type": "decoder",
        "sliding_window": None,
        "kv_sharing_target_layer_name": None,
        "kv_cache_dtype": "auto",
        "use_mm_prefix": False,
    }
    return kind(**facts | changes)


class MLAAttention(Attention):
    """Not plain."""


FLASHINFER = SimpleNamespace(get_name=lambda: "FLASHINFER")
KEPT = {
    "MLAAttention: needs one of": layer(MLAAttention),
    "attention backend FLASHINFER: needs": layer(attn_backend=FLASHINFER),
    "encoder_decoder attention: needs": layer(attn_type="encoder_decoder"),
    "sliding window 512: needs none": layer(sliding_window=512),
    "ALiBi: needs none": layer(impl={"alibi_slopes": [0.5]}),
    "logits soft cap 50.0: needs none": layer(impl={"logits_soft_cap": 50.0}),
    "attention sinks: needs none": layer(impl={"sinks": [0.0]}),
    "KV cache of layers.3: needs its own": layer(kv_sharing_target_layer_name="layers.3"),
    "kv_cache_dtype fp8: needs one that is not quantized": layer(kv_cache_dtype="fp8"),
    "images that see what follows them": layer(use_mm_prefix=True),
    "context in 2 processes: needs 1": layer(impl={"dcp_world_size": 2}),
    "head_dim 264: needs at most 256": layer(head_size=264, head_size_v=264),
    "value head_dim 32: needs q's and k's, 64": layer(head_size_v=32),
    "dtype float64: needs": layer(dtype="torch.float64"),
}


@pytest.fixture
def every_kernel_can(monkeypatch):
    """Here all can run, on the CPU of a shipped profile."""
    monkeypatch.setattr(available, "refusal", lambda *_, **__: None)
    monkeypatch.setattr(available, "device", lambda name: Device("cpu", "AMD EPYC (AVX-512 BF16)", threads=2))


@pytest.mark.usefixtures("every_kernel_can")
@pytest.mark.parametrize("reason", KEPT)
def test_a_layer_that_stays_has_its_reason(reason):
    decision = chooser(site_of(KEPT[reason], "cpu"), ALWAYS)(1000, 1000)
    assert isinstance(decision, Keep) and decision.reason.startswith(reason)


@pytest.mark.usefixtures("every_kernel_can")
@pytest.mark.parametrize(("kind", "is_causal"), [("decoder", True), ("encoder_only", False)])
def test_a_plain_layer_is_used(kind, is_causal):
    site = site_of(layer(attn_type=kind), "cpu")
    assert site.mask.is_causal == is_causal and site.shape == "1x4/2xnx64"
    assert isinstance(chooser(site, ALWAYS)(1000, 1000), Use)


@pytest.mark.usefixtures("every_kernel_can")
def test_a_short_request_is_not_worth_a_launch_whatever_the_policy():
    choose = chooser(site_of(layer(), "cpu"), ALWAYS)
    assert choose(LEAST_QUERIES - 1, 5000) == Keep("63 queries: needs at least 64")
    assert isinstance(choose(LEAST_QUERIES, 5000), Use)


@pytest.mark.usefixtures("every_kernel_can")
def test_never_is_never():
    assert isinstance(chooser(site_of(layer(), "cpu"), Settings(policy="never"))(1000, 1000), Keep)


@pytest.mark.usefixtures("every_kernel_can")
def test_a_provider_without_a_causal_offset_gets_whole_prompts_only(monkeypatch):
    fixed = {name: replace(row, causal_offset=False) for name, row in choice.PROVIDERS.items()}
    monkeypatch.setattr(choice, "PROVIDERS", fixed)
    choose = chooser(site_of(layer(), "cpu"), ALWAYS)
    assert isinstance(choose(500, 500), Use)
    assert choose(500, 700).reason.startswith("200 cached tokens: cpu has no causal offset")
    assert isinstance(chooser(site_of(layer(attn_type="encoder_only"), "cpu"), ALWAYS)(500, 700), Use)


@pytest.mark.usefixtures("every_kernel_can")
def test_auto_goes_by_the_profile_at_the_lengths_of_the_request():
    """The shipped profile of this CPU says a win for the site at 1000 tokens; one of another device says nothing."""
    site = site_of(layer(num_heads=8, num_kv_heads=8), "cpu")
    decision = chooser(site, Settings())(1000, 1000)
    assert isinstance(decision, Use) and "AMD EPYC (AVX-512 BF16)" in decision.reason


@pytest.mark.usefixtures("every_kernel_can")
def test_auto_measures_nothing(monkeypatch):
    monkeypatch.setattr(available, "device", lambda name: Device("cpu", "of no profile"))
    decision = chooser(site_of(layer(), "cpu"), Settings())(1000, 1000)
    assert isinstance(decision, Keep) and decision.reason.startswith("not measured at this shape on of no profile")


def test_a_chunk_is_like_a_shorter_prompt():
    """As much work for each quantized token: the whole for itself, three times its own length far behind a context."""
    assert square(700, 700) == 700
    assert 3 * 64 * 0.95 < square(64, 1 << 20) <= 3 * 64
    assert 700 < square(700, 1400) < 1400


def choose_long(q_len, kv_len):
    return USE if q_len >= 100 else Keep("short")


def test_parts_of_a_mixed_batch():
    """A decode, a short prompt, a whole prompt, a chunk behind a context, a padded row of a CUDA graph."""
    starts, kv_lens = [0, 1, 21, 321, 449, 449], [90, 20, 300, 1000, 0]
    parts = parts_of(starts, kv_lens, [False, True, True, True, False], choose_long)
    found = [(part.row, part.start, part.q_len, part.kv_len) for part in parts]
    assert found == [(2, 21, 300, 300), (3, 321, 128, 1000)]
    assert {part.use for part in parts} == {USE}


def test_what_decodes_is_never_ours_however_many_drafts_it_has():
    assert parts_of([0, 200], [900], [False], choose_long) == []
