"""Models of real width and few layers, for `bench models`: random weights, one input.

In: the package that has the model, a length, layers, sequences, whether it is small. Out: a module and the keyword
arguments of its forward, which returns a tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Case = tuple[torch.nn.Module, dict[str, Any]]
"""A model and the keyword arguments of its forward, which returns a tuple."""

TEXT_TOKENS = 512
"""Of a prompt, as the pipelines of Flux and Wan pad it; 16 with --small."""


def flux(diffusers: Any, length: int, layers: int, batch: int, small: bool) -> Case:
    """`layers` double and `layers` single blocks; one image whose tokens and the prompt's make `length`."""
    heads, head_dim, axes, text_dim = (2, 64, (16, 24, 24), 64) if small else (24, 128, (16, 56, 56), 4096)
    text = _text_tokens(small)
    if length <= text:
        raise ValueError(f"length {length}: {text} are text, needs more")
    rows, columns = near_cube(length - text, 2)
    model = diffusers.FluxTransformer2DModel(
        num_layers=layers,
        num_single_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        axes_dims_rope=axes,
        joint_attention_dim=text_dim,
    )
    return model, {
        "hidden_states": torch.randn(batch, length - text, 64),
        "encoder_hidden_states": torch.randn(batch, text, text_dim),
        "pooled_projections": torch.randn(batch, 768),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def wan(diffusers: Any, length: int, layers: int, batch: int, small: bool, heads: int, ffn_dim: int) -> Case:
    """One video whose latents have `length` patches; cross-attention to the prompt."""
    heads, head_dim, ffn_dim, text_dim = (2, 64, 256, 64) if small else (heads, 128, ffn_dim, 4096)
    frames, height, width = near_cube(length, 3)
    model = diffusers.WanTransformer3DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn_dim, text_dim=text_dim
    )
    return model, {
        "hidden_states": torch.randn(batch, 16, frames, 2 * height, 2 * width),  # patches of 1 x 2 x 2
        "encoder_hidden_states": torch.randn(batch, _text_tokens(small), text_dim),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }


def llama(transformers: Any, length: int, layers: int, batch: int, small: bool) -> Case:
    """The prefill of prompts, logits for their last tokens."""
    model = _llama(transformers, length, layers, small)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length))
    return model, {"input_ids": tokens, "use_cache": False, "logits_to_keep": 1, "return_dict": False}


def llama_decode(transformers: Any, length: int, layers: int, batch: int, small: bool) -> Case:
    """The token after a context of `length` tokens, whose keys and values are given."""
    model = _llama(transformers, length + 1, layers, small)
    config = model.config
    heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cached = torch.randn(layers, 2, batch, heads, length, head_dim)
    tokens = torch.randint(0, config.vocab_size, (batch, 1))
    return Decode(model, transformers.DynamicCache), {"input_ids": tokens, "cached": cached}


class Decode(torch.nn.Module):
    """A step of a language model that finds the same cache at every call."""

    def __init__(self, model: torch.nn.Module, cache: Any) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, input_ids: torch.Tensor, cached: torch.Tensor) -> Any:
        past = self.cache([(keys, values) for keys, values in cached])
        return self.model(input_ids=input_ids, past_key_values=past, return_dict=False)


def _llama(transformers: Any, length: int, layers: int, small: bool) -> Any:
    hidden, heads, kv_heads, ffn_dim, vocabulary = (128, 2, 1, 256, 256) if small else (4096, 32, 8, 14336, 128256)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn_dim,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


def bert(transformers: Any, length: int, layers: int, batch: int, small: bool, hidden: int) -> Case:
    """Encoded texts without padding; heads of 64."""
    hidden = 128 if small else hidden
    config = transformers.BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=max(512, length),
    )
    tokens = torch.randint(0, config.vocab_size, (batch, length))
    return transformers.BertModel(config), {"input_ids": tokens, "return_dict": False}


def vit(transformers: Any, length: int, layers: int, batch: int, small: bool, hidden: int) -> Case:
    """Square images of `length` tokens, one of them the class's, in patches of 16; heads of 64."""
    side = round((length - 1) ** 0.5)
    if side**2 + 1 != length:
        raise ValueError(f"length {length}: needs a square and one more, such as {side**2 + 1}")
    hidden = 128 if small else hidden
    config = transformers.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        image_size=16 * side,
    )
    return transformers.ViTModel(config), {
        "pixel_values": torch.randn(batch, 3, 16 * side, 16 * side),
        "return_dict": False,
    }


def dit(diffusers: Any, length: int, layers: int, batch: int, small: bool) -> Case:
    """DiT-XL/2: 16 heads of 72, square latents of `length` patches."""
    side = round(length**0.5)
    if side**2 != length:
        raise ValueError(f"length {length}: needs a square, such as {side**2}")
    heads, head_dim = (2, 32) if small else (16, 72)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, sample_size=2 * side
    )
    return model, {
        "hidden_states": torch.randn(batch, 4, 2 * side, 2 * side),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.zeros(batch, dtype=torch.long),
        "return_dict": False,
    }


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    package: str
    make: Callable[[Any, int, int, int, bool], Case]
    """Of the package, the length, the layers, the sequences, whether it is small."""
    lengths: tuple[int, ...]
    """Where --lengths names none; with --small the first alone."""


FAMILIES = {
    "flux": Family("diffusers", flux, (4608, 16896)),  # images of 1024 x 1024 and 2048 x 2048
    "wan": Family("diffusers", partial(wan, heads=12, ffn_dim=8960), (4096, 16384, 32768)),
    "wan-14b": Family("diffusers", partial(wan, heads=40, ffn_dim=13824), (4096, 16384, 32768)),
    "dit": Family("diffusers", dit, (256, 1024, 4096)),
    "llama": Family("transformers", llama, (8192, 32768, 65536)),
    "llama-decode": Family("transformers", llama_decode, (1024, 8192)),
    "bert-base": Family("transformers", partial(bert, hidden=768), (128, 512)),
    "bert-large": Family("transformers", partial(bert, hidden=1024), (128, 512)),
    "vit-base": Family("transformers", partial(vit, hidden=768), (197, 577)),
    "vit-large": Family("transformers", partial(vit, hidden=1024), (197, 577)),
}


def near_cube(volume: int, sides: int) -> tuple[int, ...]:
    """`sides` whole numbers with that product, as equal as they can be taken one after the other."""
    if sides == 1:
        return (volume,)
    most = int(volume ** (1 / sides) + 1e-9)
    side = next(side for side in range(max(1, most), 0, -1) if volume % side == 0)
    return (side, *near_cube(volume // side, sides - 1))


def _text_tokens(small: bool) -> int:
    return 16 if small else TEXT_TOKENS
