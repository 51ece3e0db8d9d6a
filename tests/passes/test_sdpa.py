"""F.scaled_dot_product_attention in every way it can be called: used exactly, or kept with the reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import ACCURATE, assert_kept, assert_used, compiled, relative_error, rewritten
from torch import Tensor

from sagecompile.decide import Keep, decide
from sagecompile.settings import Settings
from sagecompile.site import Device

sdpa = F.scaled_dot_product_attention


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shape = shape or (2, 4, 40, 64)
    return tuple(torch.randn(shape, dtype=dtype) for _ in range(3))  # type: ignore[return-value]


CALLS = {
    "positional": lambda q, k, v: sdpa(q, k, v),
    "all positional": lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
    "keywords": lambda q, k, v: sdpa(query=q, key=k, value=v),
    "keywords, odd order": lambda q, k, v: sdpa(is_causal=True, value=v, scale=0.5, query=q, attn_mask=None, key=k),
    "mixed": lambda q, k, v: sdpa(q, value=v, dropout_p=0.0, key=k),
    "scale 0.5": lambda q, k, v: sdpa(q, k, v, scale=0.5),
    "scale 0: the mean of V": lambda q, k, v: sdpa(q, k, v, scale=0.0),
    "negative scale": lambda q, k, v: sdpa(q, k, v, scale=-0.1),
    "integer scale": lambda q, k, v: sdpa(q / 9, k, v, scale=1),
    "scale and causal": lambda q, k, v: sdpa(q, k, v, scale=0.5, is_causal=True),
    "through torch._C._nn": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
    "through aten": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
    "the same tensor three times": lambda q, k, v: sdpa(q, q, q, is_causal=True),
    "keywords of the transposes": lambda q, k, v: sdpa(
        torch.transpose(input=torch.permute(input=q, dims=(0, 2, 1, 3)), dim0=1, dim1=2),
        k.mT.mT,
        v.swapdims(dim0=1, dim1=1),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_argument_spellings(name: str) -> None:
    assert_used(CALLS[name], *qkv())


SHAPES = {
    (8, 40, 64): "no batch",
    (40, 64): "one head",
    (1, 1, 1, 64): "one token",
    (2, 3, 9, 8): "a narrow head",
    (2, 4, 40, 72): "a head dim that is padded",
    (2, 4, 40, 128): "the widest head dim",
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_and_head_dims(shape: tuple[int, ...]) -> None:
    assert_used(lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv(*shape))


@pytest.mark.parametrize("q_len, kv_len", [(40, 64), (64, 40), (1, 40), (40, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_unequal_lengths(q_len: int, kv_len: int, is_causal: bool) -> None:
    """Causal is aligned top left: query i sees the keys j <= i."""
    q, k, v = torch.randn(1, 2, q_len, 64), *qkv(1, 2, kv_len, 64)[:2]
    assert_used(lambda q, k, v: sdpa(q, k, v, is_causal=is_causal), q, k, v)


def test_grouped_query_attention() -> None:
    q, k, v = torch.randn(2, 8, 40, 64), *qkv(2, 2, 40, 64)[:2]
    backend = assert_used(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), q, k, v)
    (entry,) = backend.report.used
    assert (entry.site.heads, entry.site.kv_heads) == (8, 2)


@pytest.mark.parametrize("dim", [129, 200, 256])
def test_wide_heads(dim: int) -> None:
    """As Gemma's, of a CPU; on a GPU they are kept."""
    q, k, v = qkv(1, 2, 40, dim)
    assert_used(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, v)
    actual, done = compiled(sdpa, q, k, v)
    assert len(done.used) == 1 and relative_error(actual, sdpa(q, k, v)) <= 0.02
    site, device = replace(done.used[0].site, device="cuda:0"), Device("cuda", "NVIDIA H200", (9, 0))
    kept = decide(site, device, Settings(policy="always"), lambda *_: None)
    assert kept == Keep(f"head_dim {dim}: needs at most 128")


def test_one_kv_head_broadcasts_without_enable_gqa() -> None:
    q, k, v = torch.randn(2, 8, 40, 64), *qkv(2, 1, 40, 64)[:2]
    assert_used(sdpa, q, k, v)


KEPT = {
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.1) * 0, qkv, "dropout_p 0.1: needs 0"),
    "five dims, broadcast against each other": (
        sdpa,
        lambda: (torch.randn(2, 1, 2, 9, 16), *[torch.randn(1, 2, 2, 9, 16)] * 2),
        "result (2, 2, 2, 9, 16): needs q's batch, heads and tokens",
    ),
    "head dim 264": (sdpa, lambda: qkv(1, 2, 9, 264), "head_dim 264: needs at most 256"),
    "float64": (sdpa, lambda: qkv(dtype=torch.float64), "dtype float64: needs float16, bfloat16, float32"),
    "value head dim": (
        sdpa,
        lambda: (*qkv(1, 2, 9, 64)[:2], torch.randn(1, 2, 9, 32)),
        "value head_dim 32: needs q's and k's, 64",
    ),
    "batch broadcasts": (
        sdpa,
        lambda: (torch.randn(2, 2, 9, 64), *qkv(1, 2, 9, 64)[:2]),
        "batch 2 and 1: needs the same on q, k and v",
    ),
    "q's batch broadcasts": (
        sdpa,
        lambda: (torch.randn(1, 2, 9, 64), *qkv(2, 2, 9, 64)[:2]),
        "batch 1 and 2: needs the same on q, k and v",
    ),
    "q's heads broadcast": (
        sdpa,
        lambda: (torch.randn(1, 1, 9, 64), *qkv(1, 2, 9, 64)[:2]),
        "heads 1 on 2: needs a multiple",
    ),
    "only v's heads broadcast": (
        sdpa,
        lambda: (*qkv(1, 2, 9, 64)[:2], torch.randn(1, 1, 9, 64)),
        "k and v of 2x9 and 1x9: needs equal heads and tokens",
    ),
    "ranks differ": (
        sdpa,
        lambda: (torch.randn(1, 2, 9, 64), *qkv(2, 9, 64)[:2]),
        "4, 3, 3 dims of q, k and v: needs as many of each",
    ),
    "no tokens": (sdpa, lambda: qkv(1, 2, 0, 64), "q_len 0: nothing to compute"),
    "no keys": (
        sdpa,
        lambda: (torch.randn(1, 2, 9, 64), *qkv(1, 2, 0, 64)[:2]),
        "kv_len 0: nothing to compute",
    ),
    "no batch": (sdpa, lambda: qkv(0, 2, 9, 64), "batch 0: nothing to compute"),
    "no heads": (sdpa, lambda: qkv(1, 0, 9, 64), "heads 0: nothing to compute"),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_the_value_seen_and_the_value_needed(name: str) -> None:
    fn, inputs, reason = KEPT[name]
    assert_kept(fn, *inputs(), because=reason)


MASKS = {
    "bool": (lambda: torch.rand(9, 9) > 0.3, "mask bool (9, 9): needs none"),
    "bool with empty rows": (lambda: torch.arange(9)[:, None].expand(9, 9) > 2, "mask bool (9, 9)"),
    "float": (lambda: torch.randn(2, 1, 9, 9), "mask float32 (2, 1, 9, 9): needs none"),
    "padding": (lambda: torch.arange(9).expand(2, 1, 1, 9) < 5, "mask bool (2, 1, 1, 9)"),
    "causal, but an input": (lambda: torch.ones(9, 9, dtype=torch.bool).tril(), "mask bool (9, 9)"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_is_an_input_is_kept(name: str) -> None:
    mask, reason = MASKS[name]
    assert_kept(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), *qkv(2, 2, 9, 64), mask(), because=reason)


def test_empty_rows_give_what_sdpa_gives_through_inductor() -> None:
    q, k, v = qkv(2, 2, 9, 64)
    mask = torch.arange(9)[:, None].expand(9, 9) > 2
    actual, report = compiled(lambda q, k, v, m: sdpa(q, k, v, m), q, k, v, mask)
    assert not report.used
    assert relative_error(actual, sdpa(q, k, v, mask)) < 1e-5


def test_a_scale_that_depends_on_a_symbolic_length_is_kept() -> None:
    fn = lambda q, k, v: sdpa(q, k, v, scale=1 / q.shape[2])  # noqa: E731
    assert_kept(fn, *qkv(), because="scale computed in the graph: needs a constant", dynamic=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    (entry,) = assert_used(sdpa, *qkv(dtype=dtype)).report.used
    assert entry.site.dtype == str(dtype).removeprefix("torch.")


def test_expanded_keys_and_values() -> None:
    q, k, v = (
        torch.randn(2, 4, 40, 64),
        torch.randn(1, 4, 40, 64).expand(2, -1, -1, -1),
        torch.randn(64).expand(2, 4, 40, 64),
    )
    assert_used(sdpa, q, k, v)


def test_transposed_storage_is_read_through_the_transposes() -> None:
    def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (
            sdpa(q.transpose(1, 2), k.permute(0, 2, 1, 3), torch.swapaxes(v, -3, -2))
            .transpose(1, 2)
            .reshape(2, 40, 256)
        )

    backend = assert_used(heads_last, *qkv(2, 40, 4, 64))
    assert backend.targets[:4] == ["permute", "permute", "permute", "attention.default"]


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_has_sdpas_strides(layout: str, dtype: torch.dtype) -> None:
    """`.view` after the call works in eager only if they fit, and Dynamo has traced it with them."""
    q, k, v = qkv(2, 4, 40, 64, dtype=dtype)
    if layout == "tokens first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    out, backend = rewritten(lambda q, k, v: sdpa(q, k, v) + 0, q, k, v)
    assert len(backend.report.used) == 1
    assert out.stride() == (sdpa(q, k, v) + 0).stride()
    if layout == "tokens first":
        assert_used(lambda q, k, v: sdpa(q, k, v).transpose(1, 2).view(2, 40, 256), q, k, v)
    else:
        assert_used(lambda q, k, v: sdpa(q, k, v).view(8, 40, 64), q, k, v)


def test_two_sites_share_keys_and_values() -> None:
    assert_used(lambda q, k, v: sdpa(q, k, v) + sdpa(q * 2, k, v), *qkv(), sites=2)


def test_the_result_of_one_site_feeds_the_next() -> None:
    assert_used(lambda q, k, v: sdpa(sdpa(q, k, v), k, v), *qkv(), sites=2)


def test_a_result_that_nobody_uses_is_no_site() -> None:
    def unused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sdpa(q, k, v)
        return q + 1

    _, backend = rewritten(unused, *qkv())
    assert backend.report.entries == ()


@pytest.mark.parametrize("format", ["qk_int8_pv_fp16", "qk_int8_pv_fp8"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_through_inductor(device: str, format: str, dynamic: bool) -> None:
    q, k, v = (x.to(device) for x in qkv())
    fn = lambda q, k, v: sdpa(q, k, v, is_causal=True)  # noqa: E731
    actual, report = compiled(fn, q, k, v, formats=[format], dynamic=dynamic, fullgraph=True)
    assert [entry.decision.reason for entry in report.kept] == []
    assert relative_error(actual, fn(q, k, v)) <= 0.06


def test_a_site_that_needs_a_gradient_is_kept_and_trains() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 9, 16))
    out, report = compiled(sdpa, q, k, v)
    assert report.kept[0].decision.reason.startswith("needs a gradient: run under torch.inference_mode()")
    actual = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = torch.autograd.grad(sdpa(q, k, v).square().sum(), (q, k, v))
    assert relative_error(actual, expected) < 1e-5


def test_no_grad_inside_the_model_makes_a_site_usable() -> None:
    def frozen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return sdpa(q, k, v)

    q, k, v = (x.requires_grad_() for x in qkv())
    backend = assert_used(frozen, q, k, v)
    assert backend.report.used[0].decision.format == ACCURATE


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_around_the_call(mode: type) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    with mode():
        assert_used(sdpa, q, k, v)


MANY_DIMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "five": (sdpa, (2, 3, 4, 20, 16)),
    "six": (sdpa, (2, 1, 3, 2, 20, 16)),
    "five, causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), (2, 3, 4, 20, 16)),
    "five, transposed": (
        lambda q, k, v: sdpa(*(x.transpose(1, 3) for x in (q, k, v))).transpose(1, 3),
        (2, 20, 4, 3, 16),
    ),
    "five, as Hiera's windows": (
        lambda q, k, v: sdpa(*torch.stack([q, k, v], 3).permute(3, 0, 4, 2, 1, 5).unbind(0)).transpose(1, 3),
        (2, 10, 3, 4, 16),
    ),
}


@pytest.mark.parametrize("name", MANY_DIMS)
def test_leading_dims_are_joined(name: str) -> None:
    fn, shape = MANY_DIMS[name]
    assert_used(fn, *(torch.randn(shape) for _ in range(3)))


@pytest.mark.parametrize("name", [name for name in MANY_DIMS if name != "six"])
def test_symbolic_leading_dims_are_joined(name: str) -> None:
    """Of six torch itself says sizes such as s**2 // s, which are not seen to be s."""
    fn, shape = MANY_DIMS[name]
    assert_used(fn, *(torch.randn(shape) for _ in range(3)), dynamic=True)


aten = torch.ops.aten
OVERLOADS: dict[str, Any] = {
    "the composite": lambda q, k, v: aten.scaled_dot_product_attention.default(q, k, v, None, 0.0, True),
    "the composite, with keywords": lambda q, k, v: aten.scaled_dot_product_attention.default(
        q, k, v, is_causal=True, scale=0.3
    ),
    "flash for CPUs": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, 0.0, True, scale=0.3
    )[0],
    "math": lambda q, k, v: aten._scaled_dot_product_attention_math.default(q, k, v, None, 0.0, True)[0],
}


@pytest.mark.parametrize("name", OVERLOADS)
def test_overloads_of_aten(name: str) -> None:
    site = assert_used(OVERLOADS[name], *qkv()).report.used[0].site
    assert site.mask.is_causal and site.spelling == "sdpa"


def test_overloads_of_aten_are_kept_for_their_mask_and_what_else_they_return() -> None:
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert_kept(
        lambda q, k, v, m: flash(q, k, v, attn_mask=m)[0], *qkv(), torch.randn(40, 40), because="mask float32 ("
    )
    assert_kept(lambda q, k, v: flash(q, k, v), *qkv(), because="log-sum-exp: used elsewhere (by getitem at")
