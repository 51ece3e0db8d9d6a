"""Whole vLLM engines on the CPU, each in a process of its own: with the pass, with the backend, and without us.

In: the byte-level Llama of examples/byte_lm on its held-out text, and small models of random weights. Out: greedy
tokens and log-probabilities against vLLM's own, and how many tokens our kernels did. `policy=always`, so that they do.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from sagecompile.cli.bench.serve import PASS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: .ci/vllm runs these"),
]
ROOT = Path(__file__).resolve().parents[2]
BYTE_LM = ROOT / "examples" / "byte_lm"
CUSTOM = {"attention_backend": "CUSTOM", "enforce_eager": True}
NEAR_TIE = 0.1
"""Between the two best log-probabilities: below it, rounding may choose the other."""


@cache
def texts() -> tuple[list[list[int]], list[list[int]]]:
    """200 prompts of 3 to 1900 bytes, a third of them with a common beginning; 24 more to be scored."""
    chosen, text = random.Random(0), (BYTE_LM / "heldout.txt").read_bytes()

    def cut(i: int) -> list[int]:
        length = chosen.choice([3, 20, 60, 63, 64, 65, 100, 130, 257, 400, 700, 1001, 1500, 1900])
        start = 1000 if i % 3 == 0 else chosen.randrange(len(text) - length)
        return list(text[start : start + length])

    return [cut(i) for i in range(200)], [cut(i) for i in range(24)]


def byte_lm(**changes: Any) -> dict[str, Any]:
    """Prompts in chunks of at most 512 tokens of several requests, behind contexts that are cached or shared."""
    llm = {"model": str(BYTE_LM / "model"), "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16}
    llm |= {
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 512,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
    }
    prompts, scored = texts()
    return {"llm": llm | changes, "prompts": prompts, "scored": scored, "max_tokens": 24}


def run(folder: Path, what: dict[str, Any], **environment: str) -> tuple[dict[str, Any], str]:
    """The results of an engine, and what it wrote to its log."""
    given, result = folder / "what.json", folder / "result.json"
    given.write_text(json.dumps(what))
    # The compile caches of this run alone, so that a first start is one.
    caches = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    environ = os.environ | caches | {"SAGECOMPILE_POLICY": "always"} | environment
    script = Path(__file__).with_name("engine.py")
    command = [sys.executable, str(script), str(given), str(result)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    return json.loads(result.read_text()), log


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """vLLM with sagecompile installed and not asked for."""
    return run(tmp_path_factory.mktemp("plain"), byte_lm())


@pytest.fixture(scope="module")
def pass_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pass")


@pytest.fixture(scope="module")
def with_pass(pass_folder):
    return run(pass_folder, byte_lm(compilation_config=PASS))


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    return run(tmp_path_factory.mktemp("custom"), byte_lm(**CUSTOM))


def assert_same_text(found: dict[str, Any], plain: dict[str, Any]) -> None:
    """Equal tokens, up to the first that differs at a near tie; nearly all prompts have none."""
    prompts, _ = texts()
    equal = 0
    for mine, own in zip(found["results"][: len(prompts)], plain["results"][: len(prompts)], strict=True):
        pairs = zip(mine["tokens"], own["tokens"], strict=True)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        equal += at is None
        assert at is None or own["best"][at][0] - own["best"][at][1] < NEAR_TIE
    print(f"{equal} of {len(prompts)} prompts are continued alike")
    assert equal >= 190


def assert_same_probabilities(found: dict[str, Any], plain: dict[str, Any]) -> None:
    prompts, _ = texts()
    pairs = zip(found["results"][len(prompts) :], plain["results"][len(prompts) :], strict=True)
    errors = [abs(a - b) for mine, own in pairs for a, b in zip(mine, own, strict=True)]
    print(f"prompt log-probabilities differ by {sum(errors) / len(errors):.5f} on average, {max(errors):.3f} at most")
    assert 0 < sum(errors) / len(errors) < 0.02


def assert_ours_ran(found: dict[str, Any], layers: int = 6) -> None:
    """In every layer, and on more than 8 of 10 tokens: all but decodes, short prompts and short ends of prompts."""
    assert len(found["done"]) == layers and len(set(found["done"].values())) == 1
    assert max(found["done"].values()) > 0.8 * max(found["seen"].values())


VLLMS = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
OURS = "sagecompile.vllm.backend."
LIGHT = ["sagecompile", *(f"sagecompile.{name}" for name in ("errors", "vllm"))]
LIGHT += [f"sagecompile.vllm.{name}" for name in ("asked", "lazy_pass", "plugin", "versions")]
"""What vLLM's plugin and the look-up of CPU_ATTN import."""


def test_without_being_asked_for_nothing_is_ours(plain):
    found, log = plain
    assert found["done"] == {} and found["reports"] == [] and "sagecompile:" not in log
    assert found["attention"][1]["layers"] == [[VLLMS, VLLMS + "Impl"]] * 6


@pytest.mark.parametrize(
    ("asked", "cpu_attn", "layer", "is_ours"),
    [
        ({}, VLLMS, [VLLMS, VLLMS + "Impl"], False),
        ({"compilation_config": PASS}, OURS + "Backend", [OURS + "Backend", VLLMS + "Impl"], True),
        ({"attention_backend": "CUSTOM"}, VLLMS, [OURS + "Backend", OURS + "Impl"], True),
    ],
    ids=["nothing", "the pass", "CUSTOM"],
)
def test_what_runs_attention_in_a_process_of_the_workers(tmp_path, asked, cpu_attn, layer, is_ours):
    what = random_model(tmp_path, architectures=["LlamaForCausalLM"], model_type="llama", head_dim=64)
    what["llm"] |= {"compilation_config": {}, "enforce_eager": True} | asked
    found, log = run(tmp_path, what, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    here, worker = found["attention"]
    assert here["process"] != worker["process"]
    assert here["cpu_attn"] == worker["cpu_attn"] == cpu_attn and worker["layers"] == [layer] * 2
    assert worker["has_op"] == is_ours
    if not is_ours:
        assert worker["modules"] == sorted(LIGHT) and "sagecompile:" not in log


def test_the_pass(with_pass, plain):
    found, log = with_pass
    assert [(one["used"], one["kept"]) for one in found["reports"]] == [(6, 0)]
    assert "6 of 6 attention sites rewritten" in log and "sagecompile: 6 of 6 layers: policy=always" in log
    assert_ours_ran(found)
    assert_same_text(found, plain[0])
    assert_same_probabilities(found, plain[0])


def test_a_second_start_finds_its_caches_and_is_ours(pass_folder, with_pass):
    again, _ = run(pass_folder, byte_lm(compilation_config=PASS))
    assert again["results"] == with_pass[0]["results"]
    assert_ours_ran(again)


def test_the_backend_without_compilation(custom, plain):
    found, _ = custom
    assert found["reports"] == []
    assert_ours_ran(found)
    assert_same_text(found, plain[0])
    assert_same_probabilities(found, plain[0])


def test_under_duress(tmp_path, plain):
    """Pass and backend at once, drafts of 3 tokens, and so few cache blocks that requests are put off and done anew."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    scarce = byte_lm(**CUSTOM | {"enforce_eager": False}, compilation_config=PASS, speculative_config=drafts)
    scarce["llm"] |= {"num_gpu_blocks_override": 40}
    scarce["scored"] = []
    found, _ = run(tmp_path, scarce)
    assert found["preemptions"] > 0
    assert len(found["done"]) == 6
    assert_same_text(found, plain[0])


def test_never_is_vllms_own(tmp_path, plain):
    """Down to the bit, whatever ran beside it, compiled or not."""
    found, log = run(tmp_path, byte_lm(compilation_config=PASS), SAGECOMPILE_POLICY="never")
    assert found["done"] == {} and found["results"] == plain[0]["results"]
    assert "0 of 6 attention sites rewritten; kept: policy=never (6)" in log
    # What was compiled so is not taken for what another policy compiles.
    few = byte_lm(compilation_config=PASS)
    few["prompts"], few["scored"] = few["prompts"][:20], []
    assert len(run(tmp_path, few)[0]["done"]) == 6


def random_model(folder: Path, **config: Any) -> dict[str, Any]:
    """The arguments of an engine for a config.json alone."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"vocab_size": 256, "max_position_embeddings": 512, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(sizes | more | config))
    llm = {"model": str(folder), "load_format": "dummy", "max_model_len": 512, "compilation_config": PASS}
    llm["skip_tokenizer_init"] = True
    return {"llm": llm, "prompts": [list(range(200)), list(range(50, 150)), [1, 2, 3]], "max_tokens": 4}


def test_a_model_that_stays_starts_and_says_why(tmp_path):
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64, "head_dim": 64}
    found, log = run(tmp_path, random_model(tmp_path, num_key_value_heads=1, **config))
    assert found["done"] == {} and [len(one["tokens"]) for one in found["results"]] == [4, 4, 4]
    assert "0 of 2 attention sites rewritten; kept: sliding window 64 (2)" in log


def test_wide_heads(tmp_path):
    """Of 256 channels, as Gemma's, of which the shipped profiles know nothing."""
    what = random_model(tmp_path, architectures=["LlamaForCausalLM"], model_type="llama", head_dim=256)
    found, log = run(tmp_path, what)
    assert "2 of 2 attention sites rewritten" in log
    assert len(found["done"]) == 2 and [len(one["tokens"]) for one in found["results"]] == [4, 4, 4]


def test_an_encoder(tmp_path):
    """Bidirectional attention without a KV cache, prompts of several requests in one batch, one of them short."""
    what = random_model(tmp_path)
    what["llm"] |= {"runner": "pooling", "skip_tokenizer_init": False, "load_format": "auto"}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=256, initializer_range=0.2)).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0").save_pretrained(tmp_path)
    ours, _ = run(tmp_path, what)
    own, _ = run(tmp_path, what, SAGECOMPILE_POLICY="never")
    assert set(ours["done"].values()) == {300} and own["done"] == {}
    for mine, theirs in zip(ours["results"], own["results"], strict=True):
        assert sum(a * b for a, b in zip(mine, theirs, strict=True)) > 0.999  # of unit vectors
    assert ours["results"][0] != own["results"][0]
    assert ours["results"][2] == pytest.approx(own["results"][2], abs=1e-5)  # too short to be ours
