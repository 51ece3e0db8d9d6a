"""Small random models of real Transformers and diffusers classes, with inputs and the attention sites to find in them.

In: a name from FAMILIES or DIFFUSION. Out: a model in eval mode and its keyword inputs. The attention weights are such
that scores vary by about one and attention moves the output: left as configured, a random model attends to everything
alike, and a lost mask, scale or head order would not be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

Inputs = dict[str, torch.Tensor]

VOCABULARY, HIDDEN, HEADS = 97, 128, 4
LAYERS = (0, 1)
LENGTH, SHORTER = 48, 41
"""Tokens; 41 is no multiple of anything that a kernel works in."""
WINDOW = 16
"""Of the models with a sliding window: shorter than both."""

MASK = "mask "
"""How the reason to keep a masked site starts."""

TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": HEADS,
    "intermediate_size": 192,
}
DECODER = {**TEXT, **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256}


def tokens(batch: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=_generator())}


def pixels(batch: int, length: int) -> Inputs:
    """6 x 6 patches whatever the length; ViT adds a token."""
    return {"pixel_values": _normal(batch, 3, 48, 48)}


def speech(batch: int, length: int) -> Inputs:
    """The encoder takes LENGTH tokens, of two mel frames each; `length` is the decoder's."""
    ids = tokens(batch, length)["input_ids"]
    return {"input_features": _normal(batch, 16, 2 * LENGTH), "decoder_input_ids": ids}


def translation(batch: int, length: int) -> Inputs:
    ids = tokens(batch, length)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids[:, : length // 2]}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator())


def _each_layer(sites: dict[str, str]) -> dict[str, str]:
    return {name.format(i): because for i in LAYERS for name, because in sites.items()}


@dataclass(frozen=True)
class Family:
    """One architecture of Transformers."""

    model: type[Any]
    config: type[Any]
    settings: dict[str, Any]
    sites: dict[str, str]
    """Every site by name, in graph order, with the start of the reason to keep it: "" if it is to be used."""
    inputs: Callable[[int, int], Inputs] = tokens
    """(batch, length) to keyword arguments."""
    implementations: tuple[str, ...] = ("sdpa", "eager")


FAMILIES = {
    "llama": Family(
        transformers.LlamaForCausalLM, transformers.LlamaConfig, DECODER, _each_layer({"model.layers.{}.self_attn": ""})
    ),
    "qwen3": Family(  # a norm on q and k
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        {**DECODER, "head_dim": 64},
        _each_layer({"model.layers.{}.self_attn": ""}),
    ),
    "mistral": Family(  # a sliding window
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        {**DECODER, "sliding_window": WINDOW},
        _each_layer({"model.layers.{}.self_attn": MASK}),
    ),
    "gemma2": Family(  # scores go through tanh, so it has no sdpa
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {**DECODER, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW},
        _each_layer({"model.layers.{}.self_attn": "tanh on the scores"}),
        implementations=("eager",),
    ),
    "gpt2": Family(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {**TEXT, "n_embd": HIDDEN, "n_layer": len(LAYERS), "n_head": HEADS, "n_positions": 256},
        _each_layer({"transformer.h.{}.attn": ""}),
    ),
    "bert": Family(
        transformers.BertModel,
        transformers.BertConfig,
        {**TEXT, **SIZES},
        _each_layer({"encoder.layer.{}.attention.self": ""}),
    ),
    "distilbert": Family(
        transformers.DistilBertModel,
        transformers.DistilBertConfig,
        {**TEXT, "dim": HIDDEN, "n_layers": len(LAYERS), "n_heads": HEADS, "hidden_dim": 192},
        _each_layer({"transformer.layer.{}.attention": ""}),
    ),
    "clip": Family(
        transformers.CLIPTextModel,
        transformers.CLIPTextConfig,
        {**TEXT, **SIZES},
        _each_layer({"encoder.layers.{}.self_attn": ""}),
    ),
    "vit": Family(
        transformers.ViTModel,
        transformers.ViTConfig,
        {**SIZES, "image_size": 48, "patch_size": 8},
        _each_layer({"layers.{}.attention": ""}),
        pixels,
    ),
    "whisper": Family(
        transformers.WhisperModel,
        transformers.WhisperConfig,
        {
            **TEXT,
            "d_model": HIDDEN,
            "num_mel_bins": 16,
            "max_source_positions": LENGTH,
            "max_target_positions": LENGTH,
            "decoder_start_token_id": 1,
            **{f"{half}_layers": len(LAYERS) for half in ("encoder", "decoder")},
            **{f"{half}_attention_heads": HEADS for half in ("encoder", "decoder")},
            **{f"{half}_ffn_dim": 192 for half in ("encoder", "decoder")},
        },
        {
            **_each_layer({"encoder.layers.{}.self_attn": ""}),
            **_each_layer({"decoder.layers.{}.self_attn": "", "decoder.layers.{}.encoder_attn": ""}),
        },
        speech,
    ),
    "t5": Family(  # a bias by relative position on self-attention, none on cross-attention
        transformers.T5Model,
        transformers.T5Config,
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 32,
            "d_ff": 192,
            "num_layers": len(LAYERS),
            "num_heads": HEADS,
        },
        {
            **_each_layer({"encoder.block.{}.layer.0.SelfAttention": f"{MASK}float32 ("}),
            **_each_layer(
                {
                    "decoder.block.{}.layer.0.SelfAttention": f"{MASK}float32 (",
                    "decoder.block.{}.layer.1.EncDecAttention": "",
                }
            ),
        },
        translation,
    ),
}


def build(name: str, implementation: str, **settings: Any) -> Any:
    """A model of that family; `settings` override its configuration."""
    family = FAMILIES[name]
    config = family.config(**{**family.settings, **settings})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return with_sharp_attention(family.model(config))


@dataclass(frozen=True)
class Diffusion:
    """One architecture of diffusers, with the attention processor it comes with."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    """(batch, side of the image in patches) to keyword arguments."""
    sites: dict[str, str]


def _latents(batch: int, side: int) -> Inputs:
    """Patches of 2 x 2."""
    return {"hidden_states": _normal(batch, 4, 2 * side, 2 * side), "timestep": torch.full((batch,), 7)}


def _prompt(batch: int) -> Inputs:
    """11 text tokens."""
    return {"encoder_hidden_states": _normal(batch, 11, 48), "pooled_projections": _normal(batch, 24)}


DIFFUSION = {
    "dit": Diffusion(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=32,
            in_channels=4,
            out_channels=8,
            num_layers=len(LAYERS),
            sample_size=12,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        ),
        lambda batch, side: {**_latents(batch, side), "class_labels": torch.arange(batch)},
        _each_layer({"transformer_blocks.{}.attn1": ""}),
    ),
    "sd3": Diffusion(  # joint attention over image and text, norms on q and k
        lambda: diffusers.SD3Transformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            num_layers=len(LAYERS),
            sample_size=12,
            pos_embed_max_size=12,
            joint_attention_dim=48,
            caption_projection_dim=HIDDEN,
            pooled_projection_dim=24,
            qk_norm="rms_norm",
        ),
        lambda batch, side: {**_latents(batch, side), **_prompt(batch)},
        _each_layer({"transformer_blocks.{}.attn": ""}),
    ),
    "flux": Diffusion(  # RoPE over two axes, double and single blocks
        lambda: diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=HEADS,
            joint_attention_dim=48,
            pooled_projection_dim=24,
            axes_dims_rope=(8, 12, 12),
        ),
        lambda batch, side: {
            **_prompt(batch),
            "hidden_states": _normal(batch, side * side, 16),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(side))] * 2),
            "txt_ids": torch.zeros(11, 3),
        },
        {"transformer_blocks.0.attn": "", "single_transformer_blocks.0.attn": ""},
    ),
    "pixart": Diffusion(  # cross-attention with a mask on the text
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=32,
            in_channels=4,
            out_channels=8,
            num_layers=len(LAYERS),
            cross_attention_dim=HIDDEN,
            sample_size=12,
            caption_channels=48,
            use_additional_conditions=False,
            norm_num_groups=4,
        ),
        lambda batch, side: {
            **_latents(batch, side),
            "encoder_hidden_states": _normal(batch, 11, 48),
            "encoder_attention_mask": (torch.arange(11) < 8).expand(batch, 11),
        },
        _each_layer({"transformer_blocks.{}.attn1": "", "transformer_blocks.{}.attn2": MASK}),
    ),
}


def build_diffusion(name: str) -> Any:
    """A model of that architecture."""
    torch.manual_seed(0)
    return with_sharp_attention(DIFFUSION[name].model())


def with_sharp_attention(model: nn.Module) -> nn.Module:
    """The model in eval mode, without gradients, its attention projections N(0, 1 / hidden size)."""
    generator = _generator()
    for name, parameter in model.named_parameters():
        if "attn" in name.lower() or "attention" in name.lower():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, HIDDEN**-0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, 0, 0.5, generator=generator)
    return model.eval().requires_grad_(False)
