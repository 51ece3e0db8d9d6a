"""Attention kernels without their quantization, and the quantization alone against the bytes that it must move.

In: q, k, v (B, H, N, D) and who can run them. Out: calls for the providers whose module offers the two apart, as
`quantize(k, v, *, format)` and `attend(call, quantized, out, *, format)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from sagecompile import kernels
from sagecompile.kernels import call as kernel_call

from .measure import Call, measure, or_left_out

COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Apart:
    """One format of one provider."""

    attend: Call
    """Returns (B, H, N, D)."""
    quantize: Call
    least_bytes: int
    """That the quantization reads and writes."""


def take_apart(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, runners: Iterable[tuple[str, str]]
) -> dict[str, Apart]:
    """By `format provider`, for those of `runners` (format, provider) that offer it."""
    found = {}
    for format, provider in runners:
        module = offered(provider)
        if module is None:
            continue
        quantize = partial(module.quantize, k, v, format=format)
        call = kernel_call.Call(q, k, v, q.shape[3] ** -0.5, 0 if is_causal else None)
        with or_left_out(f"{format} {provider}"):
            quantized = quantize()
            attend = partial(_attend, module.attend, call, quantized, torch.empty_like(q), format)
            found[f"{format} {provider}"] = Apart(attend, quantize, least_bytes(k, v, quantized, format))
    return found


def _attend(attend: Any, call: kernel_call.Call, quantized: Any, out: torch.Tensor, format: str) -> torch.Tensor:
    attend(call, quantized, out, format=format)
    return out


def offered(provider: str) -> Any | None:
    """The provider's module if it has both functions."""
    try:
        found = kernels.module(provider)
    except ImportError:  # a package that it needs is missing: `sagecompile doctor` says which
        return None
    return found if hasattr(found, "quantize") and hasattr(found, "attend") else None


def least_bytes(k: torch.Tensor, v: torch.Tensor, quantized: Any, format: str) -> int:
    """K read once and written once in 8 bits; V too, in the format's bits, if `quantized` has room for a copy of it.

    Memory of `quantized` that is k's or v's own is no copy; scales and the like are too small to count.
    """
    parts = [getattr(quantized, field.name) for field in fields(quantized)] if is_dataclass(quantized) else quantized
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tree_leaves(parts) if torch.is_tensor(x)}
    written = sum(found.nbytes() for at, found in storages.items() if at not in map(_storage_at, (k, v)))
    v_copy = v.numel() * (1 if format.endswith("pv_fp8") else 2)
    v_moved = v.nbytes + v_copy if written >= k.numel() + v_copy else 0
    return k.nbytes + k.numel() + v_moved


def _storage_at(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def copy_gb_per_s(device: torch.device, graph: bool) -> float:
    """Bytes read and written by a copy of 1 GiB on the device: the bandwidth of the floor."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    us = measure({"copy": lambda: target.copy_(source)}, device, graph)["copy"].us
    return 2 * COPY_BYTES / us * 1e-3
