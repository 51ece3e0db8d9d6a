"""`qk_norm_rope_attention` by the reference: attention on what RMSNorm and RoPE, spelled out here, make of q and k."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import FAST, TOLERANCE, exact_attention, relative_error
from torch import Tensor

from sagecompile.errors import UnsupportedError
from sagecompile.formats import PROVIDERS
from sagecompile.ops import attention, qk_norm_rope_attention

B, H, KV, N, D = 2, 4, 2, 63, 64
ROPES = ("none", "half", "interleaved")


def qkv(q_len: int = N, kv_len: int = N, dim: int = D) -> list[Tensor]:
    """k with a bias, on which a norm or a turn that is left out shows."""
    k = torch.randn(B, KV, kv_len, dim) + 3
    return [2 * torch.randn(B, H, q_len, dim), k, torch.randn(B, KV, kv_len, dim)]


def weights() -> list[Tensor]:
    return [torch.randn(D), torch.randn(D)]


def tables(length: int = N, batch: int = 1, dim: int = D) -> list[Tensor]:
    """Of no structure: each channel has a cos and a sin of its own."""
    turns = torch.randn(batch, length, dim)
    return [turns.cos(), turns.sin()]


def attend(q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None, **how: Any) -> Tensor:
    """`given`: q_weight, k_weight, cos, sin, as far as there are."""
    defaults = {"q_eps": None, "k_eps": None, "q_rope": "none", "k_rope": "none", "scale": None, "ahead": None}
    defaults |= {"format": "qk_int8_pv_fp16", "provider": "reference", "tokens_first": False}
    padded = [*given, *[None] * (4 - len(given))]
    return qk_norm_rope_attention(q, k, v, *padded, **{**defaults, **how})  # type: ignore[no-any-return]


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 if weight is None else weight.double())


def roped(x: Tensor, rope: str, cos: Tensor, sin: Tensor) -> Tensor:
    """By complex numbers: (a + ib)(c + is) where the two channels share c and s, channel by channel where not."""
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for i in range(half):
        a, b = (i, i + half) if rope == "half" else (2 * i, 2 * i + 1)
        out[..., a] = x[..., a] * cos[..., a] - x[..., b] * sin[..., a]
        out[..., b] = x[..., b] * cos[..., b] + x[..., a] * sin[..., b]
    return out


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("q_rope", ROPES)
@pytest.mark.parametrize("k_rope", ROPES)
def test_each_of_q_and_k_has_its_own(q_rope: str, k_rope: str) -> None:
    q, k, v = qkv()
    (w, _), (cos, sin) = weights(), tables(batch=B)
    some = (cos, sin) if (q_rope, k_rope) != ("none", "none") else (None, None)
    out = attend(q, k, v, w, None, *some, q_eps=1e-2, k_eps=0.5, q_rope=q_rope, k_rope=k_rope, scale=0.3)
    q, k = normed(q, w, 1e-2), normed(k, None, 0.5)
    q = q if q_rope == "none" else roped(q, q_rope, cos, sin)
    k = k if k_rope == "none" else roped(k, k_rope, cos, sin)
    assert relative_error(out, exact_attention(q, k, v, scale=0.3)) < 1e-5


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("which", ["q", "k"])
def test_one_of_q_and_k_alone(which: str) -> None:
    q, k, v = qkv(40, 63)
    w, (cos, sin) = weights()[0], tables(40 if which == "q" else 63)
    given = (w, None, cos, sin) if which == "q" else (None, w, cos, sin)
    out = attend(q, k, v, *given, ahead=0, **{f"{which}_eps": 1e-6, f"{which}_rope": "half"})
    made = roped(normed(q if which == "q" else k, w, 1e-6), "half", cos, sin)
    expected = exact_attention(made if which == "q" else q, made if which == "k" else k, v, is_causal=True)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_quantized(dtype: torch.dtype, format: str) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    given = [x.to(dtype) for x in (*weights(), *tables())]
    out = attend(q, k, v, *given, q_eps=1e-6, k_eps=1e-6, q_rope="interleaved", k_rope="interleaved", format=format)
    q = roped(normed(q, given[0], 1e-6), "interleaved", *given[2:])
    k = roped(normed(k, given[1], 1e-6), "interleaved", *given[2:])
    assert out.dtype == dtype and relative_error(out, exact_attention(q, k, v)) <= TOLERANCE[format]


def test_without_norm_and_rope_it_is_the_plain_op() -> None:
    q, k, v = qkv()
    how = {"scale": None, "ahead": 0, "format": FAST, "provider": "reference", "tokens_first": True}
    assert torch.equal(attend(q, k, v, **how), attention(q, k, v, **how))


def test_strides_and_autocast_change_nothing_and_inputs_stay() -> None:
    q, k, v = qkv()
    given = [*weights(), *tables()]
    how = {"q_eps": 1e-6, "k_eps": 1e-6, "q_rope": "half", "k_rope": "half"}
    expected = attend(q, k, v, *given, **how)
    other = [x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x for x in (q, k, v, *given)]
    before = [x.clone() for x in other]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*other, **how)
    assert relative_error(out, expected) < 2e-3  # sums in another order can round an INT8 value the other way
    assert all(torch.equal(x, y) for x, y in zip(other, before, strict=True))


@pytest.mark.parametrize("q_len, kv_len", [(0, 9), (9, 0)])
def test_empty(q_len: int, kv_len: int) -> None:
    q, k, v = qkv(q_len, kv_len)
    out = attend(q, k, v, None, None, *tables(q_len), q_eps=1e-6, q_rope="half")
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize("given", ["all", "rope of q", "norm of k"])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_opcheck(given: str, tokens_first: bool) -> None:
    how: dict[str, Any] = {"scale": None, "ahead": 0, "format": FAST, "provider": "reference"}
    how |= {"q_eps": None, "k_eps": None, "q_rope": "none", "k_rope": "none", "tokens_first": tokens_first}
    extra: list[Tensor | None] = [None] * 4
    if given == "all":
        extra = [*weights(), *tables(9)]
        how |= {"q_eps": 1e-6, "k_eps": 1e-6, "q_rope": "half", "k_rope": "interleaved"}
    elif given == "rope of q":
        extra[2:] = tables(9, batch=B)
        how["q_rope"] = "half"
    else:
        extra[1], how["k_eps"] = weights()[1], 1e-6
    torch.library.opcheck(qk_norm_rope_attention.default, (*qkv(9, 9), *extra), how)


def test_calling_it_with_a_gradient_says_what_to_do() -> None:
    q, k, v = qkv(9, 9)
    with pytest.raises(UnsupportedError, match="no backward"):
        attend(q, k, v, weights()[0].requires_grad_(), q_eps=1e-6)


W, T = weights()[0], tables()
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "format": (lambda: attend(*qkv(), format="int4"), "format 'int4': known are"),
    "provider": (lambda: attend(*qkv(), provider="cpu"), "provider 'cpu': RMSNorm and RoPE of q and k need one of"),
    "rope": (lambda: attend(*qkv(), None, None, *T, q_rope="full"), "q_rope 'full': known are none, half, interleaved"),
    "tables": (lambda: attend(*qkv(), q_rope="half"), "q_rope 'half': needs cos and sin"),
    "one table": (lambda: attend(*qkv(), None, None, T[0], k_rope="half"), "k_rope 'half': needs cos and sin"),
    "no rope": (lambda: attend(*qkv(), None, None, *T), "cos and sin without q_rope or k_rope"),
    "weight": (lambda: attend(*qkv(), W[:32], q_eps=1e-6), "q_weight (32,): needs (64,)"),
    "weight of heads": (lambda: attend(*qkv(), None, W.expand(KV, 1, D), k_eps=1e-6), "k_weight (2, 1, 64): needs"),
    "no eps": (lambda: attend(*qkv(), None, W), "k_weight without k_eps"),
    "integers": (lambda: attend(*qkv(), W.int(), q_eps=1e-6), "q_weight torch.int32: needs a floating dtype"),
    "table": (lambda: attend(*qkv(), None, None, *tables(9), q_rope="half"), "q needs (2, 63, 64)"),
    "table of k": (
        lambda: attend(*qkv(N, 9), None, None, *T, q_rope="half", k_rope="half"),
        "cos (1, 63, 64) and sin (1, 63, 64): k needs (2, 9, 64), or 1 for 2, of both",
    ),
    "two tables": (lambda: attend(*qkv(), None, None, T[0], T[1][:, :9], q_rope="half"), "sin (1, 9, 64)"),
    "dtypes": (lambda: attend(*qkv(), None, None, T[0], T[1].half(), q_rope="half"), "needs one dtype"),
    "odd": (lambda: attend(*qkv(dim=63), None, None, *tables(dim=63), q_rope="half"), "head_dim 63: q_rope 'half'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_direct_call_says_what_is_needed(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        call()


def test_who_has_prologues() -> None:
    assert [row.name for row in PROVIDERS.values() if row.prologues] == ["hopper", "reference"]
