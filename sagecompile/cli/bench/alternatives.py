"""What else a user can call for attention: each backend of torch's SDPA, FlashAttention-3, the sageattention package.

In: q, k, v (B, H, N, D). Out: calls by name that return (B, H, N, D); those of `unquantized` do not quantize.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sagecompile.kernels import sageattention

from . import flash_attention_3
from .measure import Call, or_left_out

BACKENDS = {
    "flash": (SDPBackend.FLASH_ATTENTION, ("cpu", "cuda")),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
    "math": (SDPBackend.MATH, ("cpu", "cuda")),
}
"""SDPA's, with the device types that have one."""

MOST_SCORE_BYTES = 2 << 30
"""Above it the math backend, which writes every score to memory in float32, is hopeless."""


def unquantized(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, with_flash_attention_3: bool
) -> dict[str, Call]:
    """`sdpa` as torch chooses, `sdpa flash` and so on, `flash_attention_3`; none changes the dtype of q, k and v.

    A named backend is chosen in every call, which takes the CPU tens of microseconds: eager timing of short inputs
    shows them.
    """
    sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=is_causal)

    def by(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return sdpa()

    calls: dict[str, Call] = {"sdpa": sdpa}
    batch, heads, length, _ = q.shape
    for name, (backend, device_types) in BACKENDS.items():
        hopeless = name == "math" and 4 * batch * heads * length**2 > MOST_SCORE_BYTES
        if q.device.type in device_types and not hopeless:
            calls[f"sdpa {name}"] = partial(by, backend)
    if with_flash_attention_3 and q.dtype != torch.float32:
        with or_left_out(flash_attention_3.NAME):
            calls[flash_attention_3.NAME] = flash_attention_3.packed(q, k, v, is_causal)
    return calls


def sageattention_package(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> dict[str, Call]:
    """The installed package as its users call it, none if there is none; our provider of that name adds what it lacks.

    1.0.6 subtracts K's mean in place, so it gets a K of its own.
    """
    version, _ = sageattention.installed() if q.device.type == "cuda" else (None, "")
    if version is None:
        return {}
    from sageattention import sageattn

    return {f"sageattention {version}": partial(sageattn, q, k.clone(), v, is_causal=is_causal)}
