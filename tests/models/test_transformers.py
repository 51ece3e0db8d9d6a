"""Real Transformers architectures, small and random: which sites are found and used, and that nothing else changes.

Most tests run the rewritten graph without Inductor; the last section compiles it. Under `-m gpu` the same tests run on
a GPU, where the Triton kernels do the work.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import zoo
from checks import assert_run_by, assert_sites, on, run
from support import ACCURATE, EXACT, FAST, TOLERANCE, Rewriter, compiled, relative_error
from zoo import FAMILIES, LENGTH, MASK, SHORTER, TEXT, WINDOW

from sagecompile.decide import Use
from sagecompile.report import Report

ALWAYS_MASKS = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)
"""Older versions pass SDPA a mask whenever they are traced, also one that is only causal or hides nothing."""

CAUSAL = ("llama", "qwen3", "gpt2", "clip")
BIDIRECTIONAL = ("bert", "distilbert")
USED = (*CAUSAL, *BIDIRECTIONAL, "vit", "whisper")
CASES = [(name, how) for name, family in FAMILIES.items() for how in family.implementations]
TEXT_CASES = [(name, how) for name in (*CAUSAL, *BIDIRECTIONAL) for how in ("sdpa", "eager")]


def few(*names: str) -> list[tuple[str, str]]:
    """Those of CASES, where one of each kind is enough."""
    return [case for case in CASES if case[0] in names]


def text(device: str, batch: int = 2, length: int = LENGTH, padded: int | None = None) -> dict[str, torch.Tensor]:
    """Token ids, and with `padded` an attention mask that hides so many tokens at the start of the first sequence."""
    inputs = zoo.tokens(batch, length)
    if padded is not None:
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        inputs["attention_mask"][0, :padded] = 0
    return on(device, inputs)


def all_sites(name: str, because: str = "") -> dict[str, str]:
    return dict.fromkeys(FAMILIES[name].sites, because)


# Static shapes, no mask from outside.


@pytest.mark.parametrize(
    ("name", "implementation", "format"),
    [(*case, ACCURATE) for case in CASES] + [(name, "sdpa", FAST) for name in USED],
)
def test_sites_and_output(name, implementation, format, device):
    model, family = zoo.build(name, implementation).to(device), FAMILIES[name]
    report, error = run(model, on(device, family.inputs(2, LENGTH)), dynamic=False, format=format)
    assert_sites(report, family.sites)
    assert report.graphs == 1 or name in ("whisper", "t5")  # torch 2.11 breaks them between encoder and decoder
    assert_run_by(report, format, device)
    assert error <= (TOLERANCE[format] if report.used else EXACT[torch.float32])


@pytest.mark.parametrize(("name", "implementation"), few("llama", "mistral", "bert"))
def test_batch_of_one(name, implementation, device):
    model, family = zoo.build(name, implementation).to(device), FAMILIES[name]
    report, error = run(model, on(device, family.inputs(1, LENGTH)), dynamic=False)
    assert_sites(report, family.sites)
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_a_cache(name, implementation, device):
    """Position ids then make a mask for packed sequences, which the graph shows to be causal."""
    model = zoo.build(name, implementation).to(device)
    report, error = run(model, {**text(device), "use_cache": False}, dynamic=False)
    assert_sites(report, all_sites(name))
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_kv_heads_are_not_repeated(implementation, device):
    report, _ = run(zoo.build("llama", implementation).to(device), text(device))
    assert [(entry.site.heads, entry.site.kv_heads) for entry in report.used] == [(4, 2)] * 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_causal_and_cross_attention_of_one_model(implementation, device):
    model = zoo.build("whisper", implementation).to(device)
    report, _ = run(model, on(device, FAMILIES["whisper"].inputs(2, SHORTER)))
    shapes = [(entry.site.mask.is_causal, entry.site.q_len, entry.site.kv_len) for entry in report.used]
    self_attention, cross_attention = (True, SHORTER, SHORTER), (False, SHORTER, LENGTH)
    assert shapes == [(False, LENGTH, LENGTH)] * 2 + [self_attention, cross_attention] * 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_window_that_is_never_reached(implementation, device):
    model = zoo.build("mistral", implementation, sliding_window=LENGTH).to(device)
    report, error = run(model, text(device), dynamic=False)
    assert_sites(report, all_sites("mistral"))
    assert error <= TOLERANCE[ACCURATE]


def test_window_and_full_attention_in_turn(device):
    """Without the softcap Gemma 2 may use the layers that see everything; layer 0 has the window."""
    model = zoo.build("gemma2", "eager", attn_logit_softcapping=None).to(device)
    report, error = run(model, text(device), dynamic=False)
    assert_sites(report, {"model.layers.0.self_attn": MASK, "model.layers.1.self_attn": ""})
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("dynamic", [False, None], ids=["fixed", "automatic"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_in_chunks(implementation, dynamic, device):
    """Through a cache that grows: each chunk is causal behind what is cached, a number or a symbol."""
    model, ids = zoo.build("llama", implementation).to(device), text(device)["input_ids"]
    cache, backend = transformers.DynamicCache(config=model.config), Rewriter()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, past_key_values=cache, use_cache=True).logits

    torch._dynamo.reset()
    chunk = torch.compile(logits, backend=backend, dynamic=dynamic)
    actual = torch.cat([chunk(part) for part in ids.split(LENGTH // 4, 1)], 1)
    assert relative_error(actual, model(ids).logits) <= TOLERANCE[ACCURATE]
    masks = {str(entry.site.mask) for entry in backend.report.used}
    assert backend.report.kept == () and "causal" in masks and f"causal + {LENGTH // 4}" in masks


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_attention_weights_that_are_returned(name, device):
    model = zoo.build(name, "eager").to(device)
    inputs = {**on(device, FAMILIES[name].inputs(2, LENGTH)), "output_attentions": True}
    report, error = run(model, inputs)
    assert [entry.decision.cause for entry in report.kept] == ["attention weights"] * len(FAMILIES[name].sites)
    # The hooks that collect them may break the graph: then a path starts below the outermost module.
    assert all(full.endswith(entry.site.name) for full, entry in zip(FAMILIES[name].sites, report.kept, strict=True))
    assert error <= EXACT[torch.float32]


# A padding mask is an input: what it hides is not known when the graph is compiled.


@pytest.mark.parametrize(("name", "implementation"), TEXT_CASES)
def test_padding_mask_is_kept(name, implementation, device):
    model = zoo.build(name, implementation).to(device)
    report, error = run(model, text(device, padded=5), dynamic=False)
    assert_sites(report, all_sites(name, MASK))
    assert error <= EXACT[torch.float32]


@pytest.mark.parametrize(("name", "implementation"), few("llama", "bert"))
def test_padding_mask_that_hides_nothing_is_kept_too(name, implementation, device):
    """The same graph serves the next batch, which may be padded: two lengths, the second padded."""
    model = zoo.build(name, implementation).to(device)
    report, error = run(model, text(device, padded=0), text(device, padded=5), text(device, length=SHORTER, padded=3))
    assert {entry.decision.cause.startswith(MASK) for entry in report.entries} == {True}
    assert error <= EXACT[torch.float32]


def test_padding_of_the_encoder_leaves_the_decoder(device):
    """T5: the decoder's cross-attention then has the mask, its self-attention the bias."""
    model = zoo.build("t5", "sdpa").to(device)
    inputs = on(device, FAMILIES["t5"].inputs(2, LENGTH))
    report, error = run(model, {**inputs, "attention_mask": text(device, padded=5)["attention_mask"]})
    assert_sites(report, all_sites("t5", MASK))
    assert error <= EXACT[torch.float32]


# Dynamic lengths.


@pytest.mark.parametrize(("name", "implementation"), few("llama", "gpt2", "distilbert"))
def test_marked_dynamic(name, implementation, device):
    model, calls = zoo.build(name, implementation).to(device), [text(device), text(device, length=SHORTER)]
    for call in calls:
        torch._dynamo.mark_dynamic(call["input_ids"], 1)
    report, error = run(model, *calls)
    assert_sites(report, all_sites(name))
    assert report.graphs == 1
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize(("name", "implementation"), few("llama", "clip", "bert"))
def test_second_length_makes_it_dynamic(name, implementation, device):
    model, calls = zoo.build(name, implementation).to(device), [text(device, length=n) for n in (LENGTH, SHORTER, 63)]
    report, error = run(model, *calls)
    static, dynamic = report.entries[:2], report.entries[2:]
    assert_sites(Report(static), all_sites(name))
    assert_sites(Report(dynamic), all_sites(name))
    assert report.graphs == 2
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize(("name", "implementation"), few("llama", "gpt2", "bert"))
def test_everything_dynamic(name, implementation, device):
    """`dynamic=True` also makes a symbol of the module's float attribute `scaling`, which is read as its number."""
    model, calls = zoo.build(name, implementation).to(device), [text(device), text(device, length=SHORTER)]
    report, error = run(model, *calls, dynamic=True)
    assert_sites(report, all_sites(name))
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dynamic_length_without_a_cache(implementation, device):
    inputs = text(device)
    torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
    report, error = run(zoo.build("llama", implementation).to(device), {**inputs, "use_cache": False})
    assert_sites(report, all_sites("llama"))
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_dynamic_batch(name, implementation, device):
    model, calls = zoo.build(name, implementation).to(device), []
    for batch in (2, 3):
        calls.append(on(device, FAMILIES[name].inputs(batch, LENGTH)))
        torch._dynamo.mark_dynamic(next(iter(calls[-1].values())), 0)
    report, error = run(model, *calls)
    assert_sites(report, all_sites(name))
    assert report.graphs == 1
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "t5"])
def test_nothing_special_is_used_because_it_is_dynamic(name, device):
    """A window, a softcap and a position bias are kept with symbolic lengths too."""
    model, calls = zoo.build(name, "eager").to(device), []
    for length in (LENGTH, SHORTER - 1):
        calls.append(on(device, FAMILIES[name].inputs(2, length)))
    report, error = run(model, *calls)
    kept = {name for name, because in FAMILIES[name].sites.items() if because}
    assert kept.isdisjoint(entry.site.name for entry in report.used)
    assert error <= TOLERANCE[ACCURATE]


def test_window_reached_by_the_second_length_only(device):
    """Compiled below the window, the same model must not be served above it."""
    model = zoo.build("mistral", "sdpa").to(device)
    report, error = run(model, text(device, length=WINDOW - 2), text(device, length=LENGTH))
    assert [isinstance(entry.decision, Use) for entry in report.entries] == [True, True, False, False]
    assert error <= TOLERANCE[ACCURATE]


# Dtypes and gradients.


@pytest.mark.parametrize(
    ("name", "implementation", "dtype"),
    [(*case, torch.bfloat16) for case in few("llama", "gpt2", "bert", "vit")] + [("llama", "sdpa", torch.float16)],
)
def test_half_precision_model(name, implementation, dtype, device):
    model = zoo.build(name, implementation).to(device, dtype)
    report, error = run(model, on(device, FAMILIES[name].inputs(2, LENGTH), dtype))
    assert_sites(report, all_sites(name))
    assert {entry.site.dtype for entry in report.used} == {str(dtype).removeprefix("torch.")}
    assert error <= TOLERANCE[ACCURATE] + EXACT[dtype]


@pytest.mark.parametrize(("name", "implementation"), few("llama", "bert"))
def test_autocast(name, implementation, device):
    model, inputs = zoo.build(name, implementation).to(device), on(device, FAMILIES[name].inputs(2, LENGTH))
    with torch.autocast(device, torch.bfloat16):
        report, error = run(model, inputs)
    assert_sites(report, all_sites(name))
    assert {entry.site.dtype for entry in report.used} == {"bfloat16"}
    assert error <= TOLERANCE[ACCURATE] + EXACT[torch.bfloat16]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_training_step(implementation, device):
    model = zoo.build("llama", implementation).to(device).requires_grad_(True).train()
    inputs = text(device)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    backend = Rewriter()
    torch.compile(model, backend=backend)(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert_sites(backend.report, all_sites("llama", "needs a gradient"))
    assert relative_error({name: p.grad for name, p in model.named_parameters()}, expected) <= EXACT[torch.float32]


def test_only_sites_that_a_gradient_flows_through_are_kept(device):
    """Fine-tuning the last layer: the first one runs forward only."""
    model = zoo.build("llama", "sdpa").to(device)
    model.model.layers[1].requires_grad_(True)
    report, _ = run(model, text(device))
    assert_sites(report, {"model.layers.0.self_attn": "", "model.layers.1.self_attn": "needs a gradient"})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_is_kept(implementation, device):
    """Monte-Carlo dropout: training mode, no gradient."""
    model = zoo.build("bert", implementation).to(device).train()
    backend = Rewriter()
    torch.compile(model, backend=backend)(**text(device))
    assert_sites(backend.report, all_sites("bert", "dropout_p 0.1"))


# Generation.


def generate(model: Any, inputs: dict[str, Any], cache: str) -> Any:
    """Eight greedy tokens, with their logits and the cache."""
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    return model.generate(
        **inputs, **options, cache_implementation=cache, return_dict_in_generate=True, output_logits=True
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate(implementation, cache, device):
    """Every token is, within the quantization's error, the one that eager finds best after the tokens before it."""
    model, inputs = zoo.build("llama", implementation).to(device), text(device)
    forward, backend = model.forward, Rewriter()
    model.forward = torch.compile(forward, backend=backend)
    generated = generate(model, inputs, cache).sequences
    model.forward = forward
    logits = model(generated[:, :-1]).logits[:, LENGTH - 1 :]
    chosen = logits.gather(-1, generated[:, LENGTH:, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() <= 3 * TOLERANCE[ACCURATE] * logits.std()
    # Prefill: what eager attention adds for a static cache depends on how full that is.
    assert bool(backend.report.used) == (implementation == "sdpa" if cache == "static" else not ALWAYS_MASKS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_kv_cache_reads_as_after_eager(cache, device):
    """Layer 0, whose keys do not depend on any attention: not one bit of K or V is touched."""
    model, inputs = zoo.build("llama", "sdpa").to(device), text(device)
    expected = generate(model, inputs, cache)
    model.forward = torch.compile(model.forward, backend=Rewriter())
    actual = generate(model, inputs, cache)
    prompt = slice(0, LENGTH)  # later tokens may differ
    for what in ("keys", "values"):
        kept, seen = (getattr(result.past_key_values.layers[0], what) for result in (expected, actual))
        assert torch.equal(seen[:, :, prompt], kept[:, :, prompt])


# Through Inductor.


@pytest.mark.parametrize(("name", "implementation", "format"), [("llama", "sdpa", ACCURATE), ("bert", "eager", FAST)])
def test_compiled(name, implementation, format, device):
    model, inputs = zoo.build(name, implementation).to(device), text(device)
    out, report = compiled(model, call_kwargs=inputs, formats=(format,), fullgraph=True)
    assert_sites(report, FAMILIES[name].sites)
    assert relative_error(out[0], model(**inputs)[0]) <= TOLERANCE[format]


@pytest.mark.parametrize(("channels", "steepness"), [(128, 1.0), (4, 0.25)])
def test_compiled_with_the_keys_of_qwen2(channels, steepness):
    """k_proj with a bias of norm 921, as Qwen2 has, over all channels or four of each head, which RoPE turns.

    Over all of them scores differ by hundreds, and nearly all rows are computed exactly; with four INT8 holds them. The
    model itself multiplies errors: with q, k and v in bfloat16 it is 0.17 and 0.006 from float32.
    """
    config = transformers.Qwen2Config(
        **TEXT,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="sdpa",
    )
    model = transformers.Qwen2Model(config).eval().requires_grad_(False)
    for layer in model.layers:
        bias = torch.randn(2, 128) * (torch.rand(2, 128).argsort(-1) < channels)
        layer.self_attn.k_proj.bias.copy_(bias.flatten() * (921 / bias.norm()))
        layer.self_attn.q_proj.weight *= steepness
    inputs = zoo.tokens(1, 320)
    out, report = compiled(model, call_kwargs=inputs, formats=(ACCURATE,), fullgraph=True)
    assert_sites(report, {f"layers.{i}.self_attn": "" for i in range(4)})
    assert_run_by(report, ACCURATE, "cpu")
    assert relative_error(out[0], model(**inputs)[0]) <= TOLERANCE[ACCURATE]


def test_compiled_for_any_length(device):
    model, calls = zoo.build("gpt2", "sdpa").to(device), [text(device), text(device, length=SHORTER)]
    for call in calls:
        torch._dynamo.mark_dynamic(call["input_ids"], 1)
    fast = torch.compile(model, backend="sage_inductor", options={"sage.policy": "always"}, fullgraph=True)
    errors = [relative_error(fast(**call)[0], model(**call)[0]) for call in calls]
    assert max(errors) <= TOLERANCE[ACCURATE]


def test_compiled_and_kept_is_what_inductor_gives(device):
    """policy=never, a static cache: the very tokens and logits of backend="inductor"."""
    inputs, results = text(device), []
    for how in ({"backend": "inductor"}, {"backend": "sage_inductor", "options": {"sage.policy": "never"}}):
        torch._dynamo.reset()
        model = zoo.build("llama", "sdpa", num_hidden_layers=1).to(device)
        model.forward = torch.compile(model.forward, **how)
        results.append(generate(model, inputs, "static"))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(torch.stack(results[0].logits), torch.stack(results[1].logits))
