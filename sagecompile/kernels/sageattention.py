"""Attention by the installed `sageattention` package, called only where it was seen to be right.

In: a call and an output to fill. Out: `out` written; before any call, `refusal` says why the package must not get it.
Why: 1.0.6 (PyPI) and 2.x (source builds) modify K, read past tails or use the wrong stream; this gives what they need.

1.0.6 is called as its source wants it; 2.x by the documented signature of `sageattn_qk_int8_pv_fp8_cuda_sm90` in the
main branch of its repository (https://github.com/thu-ml/SageAttention). Both were tried on compute capability 9.0 only.
"""

import importlib
import importlib.metadata
from dataclasses import replace
from functools import cache

import torch
from torch._library.custom_ops import CustomOpDef

from sagecompile.kernels.call import Call
from sagecompile.site import AttentionSite

CAPABILITY = (9, 0)
"""Where both versions were compared with float64 attention."""

ROW_BLOCK, KEY_BLOCK = 128, 64
"""1.0.6 quantizes Q by 128 tokens and K by 64, and reads past the end of a block that is not full."""

FIXED = "fixed.sm90"
"""Local version label that `installed` gives to a 2.2.0 whose Hopper binding launches its kernel."""

LARGEST_SCORE = 2.0**18
"""1.0.6 masks by subtracting 1e6 from a score (in base 2), which hides it only from scores of ordinary size."""


def installed() -> tuple[str | None, str]:
    """(version, what was found), or (None, why it cannot be imported).

    The 2.2.0 tag and the main branch carry the same version, but on Hopper the tag never launches its kernel and
    returns uninitialised memory (https://github.com/thu-ml/SageAttention/pull/307). In a fixed build the name that the
    package calls is bound to a custom operator of torch, which is what is asked here; all else counts as not fixed.
    A fixed build is reported as 2.2.0+fixed.sm90; every other label that a build has given itself is dropped.
    """
    try:
        importlib.import_module("sageattention")
        version = importlib.metadata.version("sageattention").partition("+")[0]
    except ImportError as error:  # PackageNotFoundError is one
        return None, str(error)
    if version != "2.2.0":
        return version, f"sageattention {version}"
    try:
        binding = importlib.import_module("sageattention.sm90_compile")
    except ImportError as error:
        return version, f"sageattention {version} without Hopper kernels: {error}"
    operator = getattr(binding, "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf", None)
    if isinstance(operator, CustomOpDef):
        return f"{version}+{FIXED}", f"sageattention {version} with the fixed Hopper binding"
    return version, f"sageattention {version} without the fixed Hopper binding"


def refusal(site: AttentionSite, format: str, cuda_graphs: bool) -> str | None:
    """Why this site must not go to the installed package, or None."""
    found, text = _installed_once()
    if found is None:
        return f"sageattention cannot be imported: {text}"
    return refusal_of(
        found, format, site.head_dim, site.batch, site.q_len, site.kv_len, site.heads, site.kv_heads,
        site.mask.is_causal, site.dtype, torch.cuda.get_device_capability(site.device), cuda_graphs,
    )  # fmt: skip


@cache
def _installed_once() -> tuple[str | None, str]:
    return installed()


def refusal_of(
    version: str, format: str, head_dim: int, batch: int, q_len: int, kv_len: int, heads: int, kv_heads: int,
    is_causal: bool, dtype: str, capability: tuple[int, int], cuda_graphs: bool,
) -> str | None:  # fmt: skip
    """Why this call must not go to this version, or None. Lengths are only compared, so they may be symbolic."""
    name = f"sageattention {version}"
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    if version == "1.0.6":
        serves, head_dims, dtypes = "qk_int8_pv_fp16", (64, 128), ("float16", "bfloat16", "float32")
    elif version == f"2.2.0+{FIXED}":
        serves, head_dims, dtypes = "qk_int8_pv_fp8", (64, 96, 128), ("float16", "bfloat16")
    elif version == "2.2.0":
        return f"{name} without its fixed Hopper binding returns uninitialised memory: need a build of its main branch"
    else:
        return f"{name} was never compared with exact attention: need 1.0.6, or 2.2.0 built from the main branch"
    if capability != CAPABILITY:
        return f"{name} on compute capability {_dotted(capability)}: tried on {_dotted(CAPABILITY)} only"
    if format != serves:
        return f"format {format}: {name} runs {serves}"
    if head_dim not in head_dims:
        return f"head_dim {head_dim}: {name} needs one of {', '.join(map(str, head_dims))}"
    if dtype not in dtypes:
        return f"dtype {dtype}: {name} needs one of {', '.join(dtypes)}"
    if heads % kv_heads:
        return f"{heads} query heads on {kv_heads} key heads: need a multiple"
    if is_causal and q_len != kv_len:
        return f"causal with {q_len} queries and {kv_len} keys: {name} needs equal lengths"
    if batch * heads * q_len * head_dim >= 2**31 or batch * kv_heads * kv_len * head_dim >= 2**31:
        size = f"{batch} x {heads} heads x {q_len} queries and {kv_len} keys"
        return f"{size}: {name} has 32-bit offsets, need fewer than 2^31 elements"
    if batch > 65535 or heads > 65535:
        return f"batch {batch}, heads {heads}: {name} needs at most 65535 of each"
    if version == "1.0.6" and (q_len % ROW_BLOCK or kv_len % KEY_BLOCK):
        return f"{q_len} queries and {kv_len} keys: {name} needs multiples of {ROW_BLOCK} and {KEY_BLOCK}"
    if version != "1.0.6" and cuda_graphs:
        return f"inside a CUDA graph: {name} launches on the default stream, which a capture does not see"
    return None


def attention(call: Call, out: torch.Tensor, *, format: str) -> None:
    """The call's result into out, (B, Hq, N, D) with any strides, if `refusal` lets it pass. Nothing is counted."""
    k = call.k
    with torch.cuda.device(k.device):
        k_smooth = (k.float() - k.mean(-2, keepdim=True, dtype=torch.float32)).to(k.dtype).contiguous()
        smooth = replace(call, k=k_smooth)
        flags = _attend_1(smooth, out) if format == "qk_int8_pv_fp16" else _attend_2(smooth, out)
        from .triton.exact import recompute_flagged

        recompute_flagged(replace(call, site=""), out, flags)


def _attend_1(call: Call, out: torch.Tensor) -> torch.Tensor:
    """1.0.6. V goes in scaled by a power of two to about 1: it is cast to float16, and summed there by 64."""
    from sageattention import sageattn

    q, v = call.q, call.v
    v_norm = torch.linalg.vector_norm(v, ord=float("inf"), dim=-2, keepdim=True, dtype=torch.float32)
    exponent = torch.frexp(v_norm).exponent.clamp(-126, 127)  # 2^exponent stays a finite, normal float32
    v_scaled = torch.ldexp(v.float(), -exponent).to(v.dtype).contiguous()
    result = sageattn(q.contiguous(), call.k, v_scaled, is_causal=call.is_causal, sm_scale=call.scale, smooth_k=False)
    out.copy_(torch.ldexp(result.float(), exponent.repeat_interleave(q.shape[1] // v.shape[1], dim=1)))
    return _flags(call)


def _attend_2(call: Call, out: torch.Tensor) -> torch.Tensor:
    """2.2.0. Its kernel runs on the default stream, which waits for the current one before, and is waited for after."""
    from sageattention import sageattn_qk_int8_pv_fp8_cuda_sm90

    q, scale = call.q, call.scale
    q_ready, v_ready = (q if scale >= 0 else -q).contiguous(), call.v.contiguous()
    current, default = torch.cuda.current_stream(q.device), torch.cuda.default_stream(q.device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        result = sageattn_qk_int8_pv_fp8_cuda_sm90(
            q_ready,
            call.k,
            v_ready,
            is_causal=call.is_causal,
            sm_scale=abs(scale),
            pv_accum_dtype="fp32+fp32",
            smooth_k=False,
        )
        out.copy_(result)
    current.wait_stream(default)
    return _flags(call)


def _flags(call: Call) -> torch.Tensor:
    """Of a call with smooth K, (B * Hkv) int32: 1 where a value is not finite or a score could be too large.

    The package notices neither.
    """
    q_norm, k_norm, v_norm = (
        torch.linalg.vector_norm(x, ord=float("inf"), dim=(-2, -1), dtype=torch.float32)
        for x in (call.q, call.k, call.v)
    )
    q_norm = q_norm.unflatten(1, (call.k.shape[1], -1)).amax(-1)
    score = q_norm * k_norm * (abs(call.scale) * 1.4426950408889634 * call.q.shape[-1])
    fine: torch.Tensor = torch.isfinite(v_norm) & (score < LARGEST_SCORE)
    return torch.logical_not(fine).to(torch.int32).flatten()


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
