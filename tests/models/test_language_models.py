"""Language models of Transformers, small and random, without padding: each attention call is a site, in every spelling.

How many of them are used is the business of other tests: here no model that attends may be missed,
and what is rewritten must give the model's own result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
import zoo
from support import Rewriter, relative_error

from sagecompile.decide import Decision, Use
from sagecompile.site import AttentionSite

LENGTH = 24
LAYERS = 2
SIZES: dict[str, Any] = {
    **dict.fromkeys("vocab_size src_vocab_size tgt_vocab_size".split(), zoo.VOCABULARY),
    **dict.fromkeys("hidden_size d_model n_embd emb_dim embed_dim embedding_size".split(), 64),
    **dict.fromkeys("num_hidden_layers num_layers num_decoder_layers n_layer n_layers".split(), LAYERS),
    **dict.fromkeys("encoder_layers decoder_layers num_encoder_layers".split(), LAYERS),
    **dict.fromkeys("num_attention_heads num_heads n_head n_heads".split(), 4),
    **dict.fromkeys("encoder_attention_heads decoder_attention_heads".split(), 4),
    **dict.fromkeys("num_encoder_attention_heads num_decoder_attention_heads".split(), 4),
    **dict.fromkeys("intermediate_size d_ff d_inner dff ffn_dim encoder_ffn_dim decoder_ffn_dim".split(), 96),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx".split(), 128),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4),
    "moe_intermediate_size": 32,
    "d_kv": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
"""Under every name that a configuration has for them."""
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}


@dataclass(frozen=True)
class Case:
    """A class of Transformers, what it differs in from SIZES, and how often it attends."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    calls: int = LAYERS
    inputs: Callable[[int, int], zoo.Inputs] = zoo.tokens
    reads_sizes: bool = False
    """Whether Dynamo breaks the graph between its scores and its softmax unless it captures what `item()` returns."""


def translating(model: str, **settings: Any) -> Case:
    """Encoder, decoder, and from one to the other."""
    return Case(model, settings, 3 * LAYERS, zoo.translation)


CASES = {
    # Decoders of before RoPE, and their spellings.
    "bloom": Case("BloomForCausalLM"),
    "gpt-neo": Case("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
    "gpt-neox": Case("GPTNeoXForCausalLM"),
    "gpt-neox-japanese": Case("GPTNeoXJapaneseForCausalLM"),
    "gpt-j": Case("GPTJForCausalLM", {"rotary_dim": 8}),
    "gpt-bigcode": Case("GPTBigCodeForCausalLM"),  # one KV head
    "openai-gpt": Case("OpenAIGPTLMHeadModel"),
    "ctrl": Case("CTRLLMHeadModel"),
    "codegen": Case("CodeGenForCausalLM", {"rotary_dim": 8}),
    "mpt": Case("MptForCausalLM"),
    "opt": Case("OPTForCausalLM"),
    "biogpt": Case("BioGptForCausalLM"),
    "xglm": Case("XGLMForCausalLM"),
    "trocr": Case("TrOCRForCausalLM"),
    "falcon": Case("FalconForCausalLM", {"num_kv_heads": 1, "alibi": False, "new_decoder_architecture": False}),
    "falcon with ALiBi": Case("FalconForCausalLM", {"multi_query": False, "alibi": True}),
    # Llama's descendants: sinks, latent attention, softcapping, chunks, experts.
    "mixtral": Case("MixtralForCausalLM", GROUPED),
    "qwen2-moe": Case("Qwen2MoeForCausalLM", {**GROUPED, "shared_expert_intermediate_size": 32}),
    "gemma": Case("GemmaForCausalLM", GROUPED),
    "gemma3": Case("Gemma3ForCausalLM", {**GROUPED, "query_pre_attn_scalar": 16}),
    "phi": Case("PhiForCausalLM", GROUPED),
    "phi3": Case("Phi3ForCausalLM", GROUPED),
    "stablelm": Case("StableLmForCausalLM", GROUPED),
    "cohere": Case("CohereForCausalLM", GROUPED),
    "olmo2": Case("Olmo2ForCausalLM", GROUPED),
    "glm4": Case("Glm4ForCausalLM", GROUPED),
    "gpt-oss": Case("GptOssForCausalLM", GROUPED),
    "deepseek-v3": Case("DeepseekV3ForCausalLM", LATENT),
    "diffllama": Case("DiffLlamaForCausalLM", GROUPED, calls=2 * LAYERS),  # one on each half of V
    "doge": Case("DogeForCausalLM", GROUPED),
    # Encoders.
    "roberta": Case("RobertaModel"),
    "albert": Case("AlbertModel"),
    "electra": Case("ElectraModel"),
    "deberta": Case("DebertaModel"),
    "deberta, disentangled": Case("DebertaModel", DISENTANGLED, reads_sizes=True),
    "deberta-v2": Case("DebertaV2Model", {**DISENTANGLED, "position_buckets": 8, "share_att_key": True}),
    "mpnet": Case("MPNetModel"),
    "roformer": Case("RoFormerModel"),
    "squeezebert": Case("SqueezeBertModel"),
    "convbert": Case("ConvBertModel"),
    "funnel": Case("FunnelModel", {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 16}, calls=3),
    "xlnet": Case("XLNetModel"),
    "xlm": Case("XLMModel"),
    "longformer": Case("LongformerModel", {"attention_window": 8}),
    "modernbert": Case("ModernBertModel", {"global_attn_every_n_layers": 2, "local_attention": 8}),
    # Encoders with decoders.
    "umt5": translating("UMT5Model"),
    "bart": translating("BartModel"),
    "m2m-100": translating("M2M100Model", encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    "fsmt": translating("FSMTModel", langs=["en", "de"]),
    "prophetnet": translating("ProphetNetModel"),
}
ALSO_EAGER = ("falcon", "falcon with ALiBi", "gpt-neox", "gpt-bigcode", "bart", "xlm", "deepseek-v3", "gemma3")
"""Whose two implementations are spelled as no other's."""


def build(case: Case, implementation: str | None) -> Any:
    model = getattr(transformers, case.model)
    kind, known = model.config_class, model.config_class()
    derived = {name for name in SIZES if isinstance(getattr(kind, name, None), property)}
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name) and name not in derived}
    config = kind(**{**sizes, **case.settings})
    if implementation:
        config._attn_implementation = implementation
    return zoo.with_sharp_attention(model(config))


@pytest.mark.usefixtures("no_grad", "not_quantized")
@pytest.mark.parametrize(
    ("name", "implementation"), [(name, None) for name in CASES] + [(name, "eager") for name in ALSO_EAGER]
)
def test_every_attention_call_is_a_site(name: str, implementation: str | None) -> None:
    case = CASES[name]
    model, inputs = build(case, implementation), case.inputs(2, LENGTH)
    backend = Rewriter()
    decide = backend.decide

    def by_reference(site: AttentionSite) -> Decision:
        decision = decide(site)
        return replace(decision, provider="reference") if isinstance(decision, Use) else decision

    backend.decide = by_reference
    with torch._dynamo.config.patch(capture_scalar_outputs=case.reads_sizes):
        found = torch.compile(model, backend=backend, dynamic=False)(**inputs)
    assert len(backend.report.entries) >= case.calls, f"of {case.calls} calls seen:\n{backend.report}"
    assert relative_error(found[0], model(**inputs)[0]) < 1e-4
