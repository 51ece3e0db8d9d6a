"""`torch.ops.sagecompile.attention`: one functional op, from q, k and v as the model has them to the attention output.

In: q (B, H, Nq, D), k and v (B, Hkv, Nk, D), any strides, never modified. Out: a new (B, H, Nq, D) tensor, in memory
(B, Nq, H, D) if `tokens_first`, as SDPA's fused kernels return it. It launches on the current stream of the tensors'
own device, asks the device nothing and waits for nothing, so that it can be captured in a CUDA graph. It has no
backward: where a tensor requires a gradient a call raises UnsupportedError, and torch warns of a graph that has such a
call; torch.func's transforms see none.
`qk_norm_rope_attention` is the same on q and k as the projections leave them: it does their RMSNorm and RoPE too, as
kernels/prologue.py says. `attention_into` writes a tensor that there is, whose elements must not share memory.
Query i sees the keys that `ahead`, `behind`, `low`, `high` and `mask` all let it see, as far as they are given: see
kernels/call.py. A row that sees none is what SDPA makes of it: 0, or where a number too low hides all, as finfo.min
does, an average of all.
`site` is the name under which kernels/counts.py has the calls and their exact rows; nothing else depends on it.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from sagecompile import kernels
from sagecompile.errors import UnsupportedError
from sagecompile.formats import FORMATS, PROVIDERS
from sagecompile.kernels.call import Call
from sagecompile.kernels.prologue import ROPES, Prologue

_MORE = 'str site="", SymInt? behind=None, Tensor? low=None, Tensor? high=None, Tensor? mask=None'
_HOW = f"float? scale, SymInt? ahead, str format, str provider, bool tokens_first, {_MORE}"
SCHEMAS = {
    "attention": f"(Tensor q, Tensor k, Tensor v, *, {_HOW}) -> Tensor",
    "qk_norm_rope_attention": "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
    f"Tensor? sin, *, float? q_eps, float? k_eps, str q_rope, str k_rope, {_HOW}) -> Tensor",
    "attention_into": f"(Tensor q, Tensor k, Tensor v, Tensor(a!) out, *, float scale, SymInt? ahead, str format, "
    f"str provider, {_MORE}) -> ()",
}
library = torch.library.Library("sagecompile", "DEF")
IN_PYTHON = "_in_python"
"""Behind an op's name: the same without C++ (hopper/relaunch.cpp and cpu/ops.cpp in kernels/), which calls it for all
that it cannot do itself."""
for _name, _schema in SCHEMAS.items():
    # flexible_layout: any input strides will do, so Inductor need not copy to keep the eager ones.
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    library.define(_name + IN_PYTHON + _schema)
attention = torch.ops.sagecompile.attention
attention_into = torch.ops.sagecompile.attention_into
qk_norm_rope_attention = torch.ops.sagecompile.qk_norm_rope_attention


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, format: str, provider: str) -> None:
    """Raise UnsupportedError for what no rewritten graph contains, but a direct call may."""
    if format not in FORMATS:
        raise UnsupportedError(f"format {format!r}: known are {', '.join(FORMATS)}")
    if provider not in PROVIDERS:
        raise UnsupportedError(f"provider {provider!r}: known are {', '.join(PROVIDERS)}")
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise UnsupportedError(f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dims: each needs 4")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise UnsupportedError(f"q, k and v of {shapes}: need (B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, D)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise UnsupportedError(f"{q.shape[1]} query heads on {k.shape[1]} KV heads: needs a multiple")
    if q.shape[3] > PROVIDERS[provider].max_head_dim:
        raise UnsupportedError(f"head_dim {q.shape[3]}: {provider} needs at most {PROVIDERS[provider].max_head_dim}")
    dtypes = FORMATS[format].dtypes
    if not (q.dtype == k.dtype == v.dtype) or str(q.dtype).removeprefix("torch.") not in dtypes:
        raise UnsupportedError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: needs one of {', '.join(dtypes)} on all three")
    if not (q.device == k.device == v.device):
        raise UnsupportedError(f"devices {q.device}, {k.device}, {v.device}: needs one")


def _check_gradients(*tensors: torch.Tensor | None) -> None:
    """Raise UnsupportedError where a gradient is asked for.

    Here and not in a backward: a registered one costs every call 15 us of the host, be there gradients or not.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise UnsupportedError(
            "sagecompile's attention ops have no backward: call them under torch.no_grad(), "
            "or F.scaled_dot_product_attention where gradients are needed"
        )


def _check_prologue(x: torch.Tensor, name: str, prologue: Prologue) -> None:
    """Raise UnsupportedError for a prologue that does not fit its tensor, `q` or `k`."""
    batch, _, length, head_dim = x.shape
    weight, cos, sin = prologue.weight, prologue.cos, prologue.sin
    if prologue.rope not in ROPES:
        raise UnsupportedError(f"{name}_rope {prologue.rope!r}: known are {', '.join(ROPES)}")
    if weight is not None and prologue.eps is None:
        raise UnsupportedError(f"{name}_weight without {name}_eps: needs both, or no weight")
    if weight is not None and weight.shape != (head_dim,):
        raise UnsupportedError(f"{name}_weight {tuple(weight.shape)}: needs ({head_dim},), a weight a channel")
    if prologue.rope != "none":
        if cos is None or sin is None:
            raise UnsupportedError(f"{name}_rope {prologue.rope!r}: needs cos and sin")
        if head_dim % 2:
            raise UnsupportedError(f"head_dim {head_dim}: {name}_rope {prologue.rope!r} needs an even one")
        if cos.shape not in ((1, length, head_dim), (batch, length, head_dim)) or sin.shape != cos.shape:
            raise UnsupportedError(
                f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: {name} needs ({batch}, {length}, {head_dim}), "
                f"or 1 for {batch}, of both"
            )
        if sin.dtype != cos.dtype:
            raise UnsupportedError(f"cos {cos.dtype} and sin {sin.dtype}: needs one dtype")
    for what, given in ((f"{name}_weight", weight), ("cos", cos), ("sin", sin)):
        if given is not None and not given.is_floating_point():
            raise UnsupportedError(f"{what} {given.dtype}: needs a floating dtype")
        if given is not None and given.device != x.device:
            raise UnsupportedError(f"{what} on {given.device}: needs {name}'s device, {x.device}")


def _empty(q: torch.Tensor, tokens_first: bool) -> torch.Tensor:
    """The output, for the op and its fake alike."""
    batch, heads, q_len, head_dim = q.shape
    if tokens_first:
        return q.new_empty((batch, q_len, heads, head_dim)).transpose(1, 2)
    return q.new_empty((batch, heads, q_len, head_dim))


def _scale(scale: float | None, q: torch.Tensor) -> float:
    """SDPA's own where none is given."""
    return scale if scale is not None else 1 / math.sqrt(max(1, q.shape[3]))


def _attend(call: Call, format: str, provider: str, tokens_first: bool) -> torch.Tensor:
    """Of a checked call."""
    q, k, v = call.q, call.k, call.v
    out = _empty(q, tokens_first)
    if q.numel() == 0:
        return out
    _check_mask(call, provider)
    if k.shape[2] == 0:
        return out.copy_(F.scaled_dot_product_attention(q, k, v, scale=call.scale, enable_gqa=True))
    _launch(call, out, format, provider)
    return out


def _check_mask(call: Call, provider: str) -> None:
    """Raise UnsupportedError for bounds that do not fit q and k, and for what the provider does not have."""
    for name, number in (("ahead", call.ahead), ("behind", call.behind)):
        if number is not None and number < 0:
            raise UnsupportedError(f"{name} {number}: needs 0 or more, or None")
    if call.ahead and not PROVIDERS[provider].causal_offset:
        raise UnsupportedError(f"ahead {call.ahead}: {provider} needs 0 or None")
    if call.is_affine:
        return
    if not PROVIDERS[provider].masks:
        able = ", ".join(row.name for row in PROVIDERS.values() if row.masks)
        raise UnsupportedError(f"provider {provider!r}: behind, low, high and mask need one of {able}")
    batch, heads, q_len, _ = call.q.shape
    per_row, scores = (batch, q_len), (batch, heads, q_len, call.k.shape[2])
    for name, bound in (("low", call.low), ("high", call.high)):
        fits = bound is None or (bound.dtype == torch.int32 and bound.dim() == 2 and _broadcasts(bound, per_row))
        if not fits:
            raise UnsupportedError(f"{_said(name, bound)}: needs torch.int32 {per_row}, 1 for any of them")
    dtypes = (torch.bool, torch.float32, call.q.dtype)
    if call.mask is not None and not (call.mask.dtype in dtypes and _broadcasts(call.mask, scores)):
        needed = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise UnsupportedError(f"{_said('mask', call.mask)}: needs {needed} that broadcasts to {scores}")
    for name, given in (("low", call.low), ("high", call.high), ("mask", call.mask)):
        if given is not None and given.device != call.q.device:
            raise UnsupportedError(f"{name} on {given.device}: needs q's device, {call.q.device}")


def _broadcasts(given: torch.Tensor, sizes: tuple[int, ...]) -> bool:
    wanted = sizes[len(sizes) - given.dim() :]
    return given.dim() <= len(sizes) and all(a in (1, b) for a, b in zip(given.shape, wanted, strict=True))


def _said(name: str, given: Any) -> str:
    return f"{name} {given.dtype} {tuple(given.shape)}"


def _launch(call: Call, out: torch.Tensor, format: str, provider: str) -> None:
    """Without autocast, which would round the exact INT8 products of the reference; turning it off takes time, too."""
    device = out.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        kernels.launcher(provider)(call, out, format=format)


@torch.library.impl(library, "attention", "CompositeExplicitAutograd")
@torch.library.impl(library, "attention" + IN_PYTHON, "CompositeExplicitAutograd")
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    ahead: int | None,
    format: str,
    provider: str,
    tokens_first: bool,
    site: str = "",
    behind: int | None = None,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    _check_gradients(q, k, v, mask)
    _check(q, k, v, format, provider)
    call = Call(q, k, v, _scale(scale, q), ahead, None, None, site, behind, low, high, mask)
    return _attend(call, format, provider, tokens_first)


@torch.library.impl(library, "attention_into", "CompositeExplicitAutograd")
@torch.library.impl(library, "attention_into" + IN_PYTHON, "CompositeExplicitAutograd")
def _attention_into(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    ahead: int | None,
    format: str,
    provider: str,
    site: str = "",
    behind: int | None = None,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> None:
    _check_gradients(q, k, v, out, mask)
    _check(q, k, v, format, provider)
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise UnsupportedError(
            f"out {tuple(out.shape)} {out.dtype} on {out.device}: needs q's, {tuple(q.shape)} {q.dtype} on {q.device}"
        )
    if k.shape[2] == 0:
        raise UnsupportedError("0 keys: needs some")
    call = Call(q, k, v, scale, ahead, None, None, site, behind, low, high, mask)
    _check_mask(call, provider)
    if q.numel() == 0:
        return
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # for whoever saved it for a gradient
    _launch(call, out, format, provider)


@torch.library.impl(library, "qk_norm_rope_attention", "CompositeExplicitAutograd")
@torch.library.impl(library, "qk_norm_rope_attention" + IN_PYTHON, "CompositeExplicitAutograd")
def _qk_norm_rope_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    q_eps: float | None,
    k_eps: float | None,
    q_rope: str,
    k_rope: str,
    scale: float | None,
    ahead: int | None,
    format: str,
    provider: str,
    tokens_first: bool,
    site: str = "",
    behind: int | None = None,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    _check_gradients(q, k, v, q_weight, k_weight, cos, sin, mask)
    _check(q, k, v, format, provider)
    if not PROVIDERS[provider].prologues:
        able = ", ".join(row.name for row in PROVIDERS.values() if row.prologues)
        raise UnsupportedError(f"provider {provider!r}: RMSNorm and RoPE of q and k need one of {able}")
    if q_rope == k_rope == "none" and not (cos is None and sin is None):
        raise UnsupportedError("cos and sin without q_rope or k_rope: needs one of them other than 'none'")
    prologues = []
    for name, x, eps, weight, rope in (("q", q, q_eps, q_weight, q_rope), ("k", k, k_eps, k_weight, k_rope)):
        tables = {} if rope == "none" else {"cos": cos, "sin": sin}
        prologue = Prologue(eps, weight, rope, **tables)
        _check_prologue(x, name, prologue)
        prologues.append(None if eps is None and rope == "none" else prologue)
    q_prologue, k_prologue = prologues
    call = Call(q, k, v, _scale(scale, q), ahead, q_prologue, k_prologue, site, behind, low, high, mask)
    return _attend(call, format, provider, tokens_first)


def _fake(q: torch.Tensor, *_: Any, tokens_first: bool, **__: Any) -> torch.Tensor:
    return _empty(q, tokens_first)


def _fake_into(*_: Any, **__: Any) -> None:
    """Nothing is returned."""


for _name in SCHEMAS:
    _made = _fake_into if _name == "attention_into" else _fake
    torch.library.register_fake(f"sagecompile::{_name}", _made, lib=library)
