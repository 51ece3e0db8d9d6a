"""Small random models of the real Transformers and diffusers classes, with inputs for them.

In: a name and an attention implementation. Out: a model in eval mode whose attention is far from uniform (random
weights as configured give nearly equal scores, where a lost mask or scale would not be seen), and its keyword inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 97
HIDDEN = 128
LAYERS = 2
HEADS = 4
WINDOW = 16
"""Of the models with a sliding window; shorter than every input here."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 192,
}
_DECODER = _SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None}
_VISION = {key: value for key, value in _SIZES.items() if key != "vocab_size"}


@dataclass(frozen=True)
class Family:
    """One architecture of Transformers."""

    model: type[nn.Module]
    config: Callable[[], Any]
    site: str
    """Module path of layer i's attention, with {i}."""
    inputs: Callable[[int, int], dict[str, torch.Tensor]]
    """(batch, length) to keyword arguments."""
    implementations: tuple[str, ...] = ("sdpa", "eager")
    decoder: bool = False


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(VOCABULARY, (batch, length), generator=_generator())}


def images(batch: int, length: int) -> dict[str, torch.Tensor]:
    """`length` is the side in patches of 8 pixels; ViT adds one token."""
    return {"pixel_values": torch.randn(batch, 3, 8 * length, 8 * length, generator=_generator())}


def spectrograms(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Two mel frames make a token."""
    return {"input_features": torch.randn(batch, 16, 2 * length, generator=_generator())}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _whisper() -> Any:
    return transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=64,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


FAMILIES = {
    "llama": Family(
        transformers.LlamaForCausalLM,
        lambda: transformers.LlamaConfig(**_DECODER),
        "model.layers.{i}.self_attn",
        tokens,
        decoder=True,
    ),
    "qwen3": Family(
        transformers.Qwen3ForCausalLM,
        lambda: transformers.Qwen3Config(**_DECODER, head_dim=64),
        "model.layers.{i}.self_attn",
        tokens,
        decoder=True,
    ),
    "mistral": Family(
        transformers.MistralForCausalLM,
        lambda: transformers.MistralConfig(**_DECODER, sliding_window=WINDOW),
        "model.layers.{i}.self_attn",
        tokens,
        decoder=True,
    ),
    "gemma2": Family(
        transformers.Gemma2ForCausalLM,
        lambda: transformers.Gemma2Config(**_DECODER, head_dim=32, sliding_window=WINDOW),
        "model.layers.{i}.self_attn",
        tokens,
        implementations=("eager",),
        decoder=True,
    ),
    "gpt2": Family(
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=256
        ),
        "transformer.h.{i}.attn",
        tokens,
        decoder=True,
    ),
    "bert": Family(
        transformers.BertModel,
        lambda: transformers.BertConfig(**_SIZES),
        "encoder.layer.{i}.attention.self",
        tokens,
    ),
    "distilbert": Family(
        transformers.DistilBertModel,
        lambda: transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=192
        ),
        "transformer.layer.{i}.attention",
        tokens,
    ),
    "clip": Family(
        transformers.CLIPTextModel,
        lambda: transformers.CLIPTextConfig(**_SIZES, eos_token_id=2),
        "encoder.layers.{i}.self_attn",
        tokens,
    ),
    "vit": Family(
        transformers.ViTModel,
        lambda: transformers.ViTConfig(**_VISION, image_size=48, patch_size=8),
        "layers.{i}.attention",
        images,
    ),
    "whisper_encoder": Family(
        lambda config: transformers.WhisperModel(config).encoder,
        _whisper,
        "layers.{i}.self_attn",
        spectrograms,
    ),
    "t5_encoder": Family(
        transformers.T5EncoderModel,
        lambda: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=32, d_ff=192, num_layers=LAYERS, num_heads=HEADS
        ),
        "encoder.block.{i}.layer.0.SelfAttention",
        tokens,
    ),
}


def build(name: str, implementation: str = "sdpa", **config: Any) -> nn.Module:
    """The model of that family; `config` overrides single values of its configuration."""
    family = FAMILIES[name]
    settings = family.config()
    settings._attn_implementation = implementation
    for key, value in config.items():
        setattr(settings, key, value)
    return randomized(family.model(settings))


def randomized(model: nn.Module) -> nn.Module:
    """The model in eval mode, weights such that scores of queries and keys vary by about one."""
    generator = _generator()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                fan_in = 1 if "embed" in name else parameter[0].numel()
                parameter.normal_(0, 1.5 * fan_in**-0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5, generator=generator)
    return model.eval().requires_grad_(False)
