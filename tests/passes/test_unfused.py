"""Attention spelled out with products and a softmax: recognised in every order, and only where it is attention."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import assert_kept, assert_no_site, assert_used, compiled, relative_error
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

B, H, N, D = 2, 3, 24, 16
INF = float("-inf")
Function = Callable[..., Tensor]


def qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = shape or (B, H, N, D)
    return torch.randn(shape), torch.randn(shape), torch.randn(shape)


def hidden() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).triu(1)


def added() -> Tensor:
    return torch.full((N, N), INF).triu(1)


def flat(x: Tensor) -> Tensor:
    return x.reshape(B * H, N, -1)


USED: dict[str, Function] = {
    "operators": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "torch.matmul, F.softmax": lambda q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)), dim=-1), v),
    "keywords": lambda q, k, v: torch.matmul(
        input=torch.softmax(input=torch.matmul(other=k.mT, input=q), dim=3), other=v
    ),
    "methods": lambda q, k, v: q.matmul(k.transpose(-2, -1)).softmax(dim=-1).matmul(v),
    "bmm": lambda q, k, v: flat(q).bmm(flat(k).transpose(1, 2)).softmax(-1).bmm(flat(v)).view(B, H, N, D),
    "two dims": lambda q, k, v: torch.mm((q[0, 0] @ k[0, 0].T).softmax(-1), v[0, 0]),
    "baddbmm": lambda q, k, v: (
        torch.baddbmm(torch.empty(B * H, N, N), flat(q), flat(k).mT, beta=0, alpha=0.1).softmax(-1) @ flat(v)
    ),
    "baddbmm with a causal mask": lambda q, k, v: (
        torch.baddbmm(added()[None], flat(q), flat(k).mT, alpha=0.1).softmax(-1) @ flat(v)
    ),
    "scale before": lambda q, k, v: (q * 0.1 @ k.mT).softmax(-1) @ v,
    "scale after": lambda q, k, v: (q @ k.mT * 0.1).softmax(-1) @ v,
    "scale on the left": lambda q, k, v: (0.1 * (q @ k.mT)).softmax(-1) @ v,
    "scale by division": lambda q, k, v: (q @ k.mT / math.sqrt(D)).softmax(-1) @ v,
    "scale by torch.div": lambda q, k, v: torch.div(q @ k.mT, 4).softmax(-1) @ v,
    "scale twice": lambda q, k, v: ((q @ k.mT) / 2 * 0.5).softmax(-1) @ v,
    "negative scale": lambda q, k, v: (q @ k.mT * -0.1).softmax(-1) @ v,
    "scale 0": lambda q, k, v: (q @ k.mT * 0).softmax(-1) @ v,
    "scale in place": lambda q, k, v: (q @ k.mT).mul_(0.1).softmax(-1) @ v,
    "causal, masked_fill": lambda q, k, v: (q @ k.mT / 4).masked_fill(hidden(), INF).softmax(-1) @ v,
    "causal, masked_fill with keywords": lambda q, k, v: (
        (q @ k.mT / 4).masked_fill(value=-1e9, mask=hidden()).softmax(-1) @ v
    ),
    "causal, masked_fill in place": lambda q, k, v: (q @ k.mT / 4).masked_fill_(hidden(), INF).softmax(-1) @ v,
    "causal, where": lambda q, k, v: torch.where(hidden(), torch.tensor(INF), q @ k.mT).softmax(-1) @ v,
    "causal, where the other way": lambda q, k, v: torch.where(~hidden(), q @ k.mT, -1e10).softmax(-1) @ v,
    "causal, the method where": lambda q, k, v: (q @ k.mT).where(~hidden(), INF).softmax(-1) @ v,
    "causal, added": lambda q, k, v: (q @ k.mT / 4 + added()).softmax(-1) @ v,
    "causal, added on the left": lambda q, k, v: (added() + q @ k.mT).softmax(-1) @ v,
    "causal, added in place": lambda q, k, v: (q @ k.mT).add_(added()).softmax(-1) @ v,
    "softmax dtype": lambda q, k, v: F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "clone and contiguous": lambda q, k, v: (q @ k.mT).contiguous().softmax(-1).clone() @ v,
    "dropout off": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5, training=False) @ v,
    "torch.dropout off": lambda q, k, v: torch.dropout((q @ k.mT).softmax(-1), 0.5, train=False) @ v,
    "dropout 0": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.0, training=True) @ v,
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
    "einsum, other letters": lambda q, k, v: torch.einsum(
        "x y q k, x y k e -> x y q e", torch.einsum("zaic,zajc->zaij", q, k).softmax(-1), v
    ),
    "einsum, k first": lambda q, k, v: torch.einsum(
        "bhjd,bhij->bhid", v, torch.einsum("bhjd,bhid->bhij", k, q).softmax(-1)
    ),
    "einsum, tokens first": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v
    ).reshape(B, N, H * D),
    "einsum, heads before the batch": lambda q, k, v: torch.einsum(
        "hbij,bhjd->bihd", torch.einsum("bhid,bhjd->hbij", q, k).softmax(-1), v
    ),
    "einsum, ellipsis": lambda q, k, v: torch.einsum(
        "...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v
    ),
    "einsum, three dims": lambda q, k, v: torch.einsum(
        "bij,bjd->bid", torch.einsum("bid,bjd->bij", q[0], k[0]).softmax(-1), v[0]
    ),
    "einsum, operands in a list": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", [torch.einsum("bhid,bhjd->bhij", [q, k]).softmax(-1), v]
    ),
    "einsum and matmul": lambda q, k, v: torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1) @ v,
    "batch and heads apart for the softmax": lambda q, k, v: (
        (flat(q).bmm(flat(k).mT) / 4).view(B, H, N, N).softmax(-1).view(B * H, N, N).bmm(flat(v))
    ),
    "batch and heads apart for a causal mask": lambda q, k, v: (
        (flat(q).bmm(flat(k).mT).view(B, H, N, N) + added()).flatten(0, 1).softmax(-1).bmm(flat(v))
    ),
    "batch and heads apart from then on": lambda q, k, v: (
        torch.baddbmm(torch.empty(1, N, N), flat(q), flat(k).mT, beta=0, alpha=0.3).view(B, H, N, N).softmax(-1) @ v
    ),
    "batch and heads joined from then on": lambda q, k, v: (
        (q @ k.mT).reshape(-1, N, N).softmax(-1).bmm(flat(v)).view(B, H, N, D)
    ),
    "windows apart for the softmax": lambda q, k, v: (
        (q @ k.mT).unflatten(0, (1, B)).unsqueeze(3).softmax(-1).squeeze(3).flatten(0, 1) @ v
    ),
    "queries of all heads on one key": lambda q, k, v: (
        torch.bmm(q.flatten(1, 2), k[:, 0].mT).view(B, H, N, N).softmax(-1).view(B, H * N, N) @ v[:, 0]
    ).view(B, H, N, D),
    "permuted weights": lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).permute(0, 1, 3, 2),
    "permuted weights of three dims": lambda q, k, v: torch.bmm(
        flat(v).mT, torch.softmax(flat(q) @ flat(k).mT, 2).transpose(1, 2)
    ),
    "permuted scores": lambda q, k, v: (k @ q.mT).mT.softmax(-1) @ v,
    "heads moved for the softmax": lambda q, k, v: (q @ k.mT).permute(1, 0, 2, 3).softmax(-1).transpose(0, 1) @ v,
    "keys first": lambda q, k, v: (k @ q.mT / 4).softmax(-2).mT @ v,
    "keys first in einsum": lambda q, k, v: torch.einsum(
        "bhji,bhjd->bhid", torch.einsum("bhjd,bhid->bhji", k, q).softmax(2), v
    ),
    "one KV head": lambda q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
    "one KV head without its dim": lambda q, k, v: (q @ k[0, 0].mT).softmax(-1) @ v[0, 0],
    "one KV head, einsum": lambda q, k, v: torch.einsum(
        "bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1), v[:, 0]
    ),
    "one KV head, einsum, tokens first": lambda q, k, v: torch.einsum(
        "bhij,bjd->bihd", torch.einsum("bihd,bjd->bhij", q.transpose(1, 2), k[:, 0]).softmax(-1), v[:, 0]
    ),
    "one KV head of size 1 in einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k[:, :1]).softmax(-1), v[:, :1]
    ),
    "groups of heads in matmul": lambda q, k, v: (
        ((q[:, :, None] * torch.ones(2, 1, 1)) @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]
    ),
    "groups of heads in einsum": lambda q, k, v: torch.einsum(
        "bghij,bhjd->bghid",
        torch.einsum("bghid,bhjd->bghij", torch.stack([q, q / 2], 1), k).softmax(-1),
        v,
    ),
    "five dims": lambda q, k, v: (
        (torch.stack([q, q + 1], 1) @ torch.stack([k, v], 1).mT).softmax(-1) @ torch.stack([v, k], 1)
    ),
    "six dims in einsum": lambda q, k, v: torch.einsum(
        "...ij,...jd->...id",
        torch.einsum("...id,...jd->...ij", q[None, None], k[None, None]).softmax(-1),
        v[None, None],
    ),
}


@pytest.mark.parametrize("name", USED)
def test_spellings(name: str) -> None:
    backend = assert_used(USED[name], *qkv())
    assert backend.report.used[0].site.mask.is_causal == ("causal" in name)
    assert "softmax" not in backend.targets


def test_in_place_operators() -> None:
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores /= 8
        scores += added()
        return scores.softmax(-1) @ v

    assert assert_used(eager, *qkv()).report.used[0].site.scale == 1 / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_softmax_in_float32_and_back(dtype: torch.dtype) -> None:
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.softmax((q @ k.mT / 4).float(), dim=-1).to(q.dtype)
        return F.dropout(weights, p=0.1, training=False) @ v

    assert_used(eager, *(x.to(dtype) for x in qkv()))


@pytest.mark.parametrize("q_len, kv_len", [(8, 24), (24, 8), (1, 24)])
def test_cross_attention(q_len: int, kv_len: int) -> None:
    q, k, v = torch.randn(B, H, q_len, D), *qkv(B, H, kv_len, D)[:2]
    assert_used(USED["operators"], q, k, v)


@pytest.mark.parametrize("layout", ["bnhd,bmhd->bhnm", "bhdn,bhdm->bhnm", "bdhn,bdhm->bhnm", "nbhd,mbhd->bhnm"])
def test_einsum_in_other_layouts(layout: str) -> None:
    q, k, v = qkv()
    own = layout.partition(",")[0]
    order = ["bhnd".index(letter) for letter in own]
    value = layout.split("->")[0].split(",")[1]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum(f"bhnm,{value}->{own}", torch.einsum(layout, q, k).softmax(-1), v)

    assert_used(attention, *(x.permute(order).contiguous() for x in (q, k, v)))


@pytest.mark.parametrize("name", ["operators", "one KV head", "keys first", "five dims", "groups of heads in einsum"])
def test_symbolic_lengths(name: str) -> None:
    assert_used(USED[name], *qkv(), dynamic=True)


CONSTANT_IS_INPUT = ("causal, where",)
"""A tensor that the model makes of a number is an input of the graph that export and make_fx write."""
HEADS_REORDERED = ("einsum, heads before the batch", "one KV head, einsum, tokens first")
"""Decomposed, the two products join batch, heads and queries in different orders."""


@pytest.mark.parametrize("trace", ["export", "export, decomposed", "make_fx"])
@pytest.mark.parametrize("name", USED)
def test_spellings_as_tools_write_them(name: str, trace: str) -> None:
    """In overloads of aten, as torch.export and make_fx do."""

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return USED[name](q, k, v)

    if trace == "make_fx":
        module = make_fx(Attend())(*qkv())
    else:
        program = torch.export.export(Attend(), qkv())
        module = (program.run_decompositions() if "decomposed" in trace else program).module()
    if name in CONSTANT_IS_INPUT:
        assert_kept(module, *qkv(), because="where on the scores")
    elif name in HEADS_REORDERED and trace != "export":
        assert_kept(module, *qkv(), because="spelling not known: the product bmm at")
    else:
        assert_used(module, *qkv())


KEPT: dict[str, tuple[Function, str]] = {
    "weights returned": (
        lambda q, k, v: torch.cat([(w := (q @ k.mT).softmax(-1)) @ v, w], -1),
        "attention weights: used elsewhere (by ",
    ),
    "weights in two products": (
        lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w @ k,
        "attention weights: used elsewhere (by ",
    ),
    "scores used": (
        lambda q, k, v: (s := q @ k.mT).softmax(-1) @ v + s.mean(),
        "scores: used elsewhere (by mean at test_unfused.py:",
    ),
    "scores used after the scale": (lambda q, k, v: (s := q @ k.mT * 2).softmax(-1) @ v + s.mean(), "scores: used"),
    "dropout": (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5) @ v * 0, "dropout_p 0.5: needs 0"),
    "dropout on the scores": (lambda q, k, v: F.dropout(q @ k.mT, 0.5).softmax(-1) @ v * 0, "dropout on the scores"),
    "softcap": (lambda q, k, v: (torch.tanh(q @ k.mT / 30) * 30).softmax(-1) @ v, "tanh on the scores: needs scale"),
    "softcap in place": (lambda q, k, v: ((q @ k.mT / 30).tanh_() * 30).softmax(-1) @ v, "tanh_ on the scores"),
    "subtracted maximum": (lambda q, k, v: ((s := q @ k.mT) - s.amax(-1, True)).softmax(-1) @ v, "sub on the scores"),
    "bias": (lambda q, k, v: (q @ k.mT + torch.arange(N) / N).softmax(-1) @ v, "mask float32 (24): needs none"),
    "added number": (lambda q, k, v: (q @ k.mT + 3.0).softmax(-1) @ v, "add on the scores"),
    "alpha": (
        lambda q, k, v: torch.add(q @ k.mT, torch.eye(N), alpha=2).softmax(-1) @ v,
        "alpha 2 on the mask: needs 1",
    ),
    "beta": (
        lambda q, k, v: torch.baddbmm(added()[None], flat(q), flat(k).mT, beta=0.5).softmax(-1) @ flat(v),
        "beta 0.5 on the mask: needs 1",
    ),
    "scale as a tensor": (lambda q, k, v: (q @ k.mT * torch.tensor(0.3)).softmax(-1) @ v, "mul on the scores"),
    "scale 1/0": (lambda q, k, v: (q @ k.mT / 0.0).softmax(-1) @ v, "scale computed"),
    "scale after the mask": (
        lambda q, k, v: ((q @ k.mT).masked_fill(hidden(), -1e9) * 1e-9).softmax(-1) @ v,
        "scale after the mask: needs it before",
    ),
    "negative scale after the mask": (
        lambda q, k, v: ((q @ k.mT).masked_fill(hidden(), -1e9) * -1).softmax(-1) @ v,
        "scale after the mask: needs it before",
    ),
    "soft fill": (lambda q, k, v: (q @ k.mT).masked_fill(hidden(), -1.0).softmax(-1) @ v, "masked_fill on the scores"),
    "inverted fill": (lambda q, k, v: (q @ k.mT).masked_fill(~hidden(), INF).softmax(-1) @ v, "mask bool (24, 24)"),
    "where with another tensor": (
        lambda q, k, v: torch.where(hidden(), q @ k.mT, torch.zeros(N, N)).softmax(-1) @ v,
        "where on the scores",
    ),
    "scores modified through a view": (
        lambda q, k, v: [s := q @ k.mT, s[..., 0].fill_(0), s.softmax(-1) @ v][-1],
        "scores: changed in place by fill_ at test_unfused.py:",
    ),
    "a mask written in place": (
        lambda q, k, v: [s := q @ k.mT, s.__setitem__((..., hidden()), INF), s.softmax(-1) @ v][-1],
        "scores: changed in place by setitem at test_unfused.py:",
    ),
    "a mask written in place behind the scale": (
        lambda q, k, v: [s := q @ k.mT / 4, s.masked_fill_(hidden(), INF), s.softmax(-1) @ v][-1],
        "scores: changed in place by masked_fill_ at test_unfused.py:",
    ),
    "weights written in place": (
        lambda q, k, v: [w := (q @ k.mT).softmax(-1), w[..., 0].zero_(), w @ v][-1],
        "attention weights: used elsewhere (by zero_ at test_unfused.py:",
    ),
    "weights in another order": (
        lambda q, k, v: (q @ k.mT).softmax(-1)[..., torch.arange(N - 1, -1, -1)] @ v,
        "attention weights: cut or reordered by getitem at test_unfused.py:",
    ),
    "weights of heads in another order": (
        lambda q, k, v: (q @ k.mT).softmax(-1)[:, [2, 0, 1]] @ v,
        "attention weights: cut or reordered by getitem at test_unfused.py:",
    ),
    "weights of queries in another order": (
        lambda q, k, v: (q @ k.mT).softmax(-1)[:, :, torch.arange(N - 1, -1, -1)] @ v,
        "attention weights: cut or reordered by getitem at test_unfused.py:",
    ),
    "weights of the first keys": (
        lambda q, k, v: (q @ k.mT).softmax(-1)[..., :9] @ v[:, :, :9],
        "attention weights: cut or reordered by getitem at test_unfused.py:",
    ),
    "weights of the last keys": (
        lambda q, k, v: (q @ k.mT).softmax(-1).narrow(-1, 9, N - 9) @ v[:, :, 9:],
        "attention weights: cut or reordered by narrow at test_unfused.py:",
    ),
    "sinks": (
        lambda q, k, v: torch.cat([q @ k.mT, torch.ones(B, H, N, 1)], -1).softmax(-1)[..., :-1] @ v,
        "attention sinks (cat at test_unfused.py:",
    ),
    "sinks, and the maximum subtracted": (
        lambda q, k, v: ((s := torch.cat([q @ k.mT / 4, q[..., :1]], -1)) - s.amax(-1, True)).softmax(-1)[..., :N] @ v,
        "attention sinks (cat at test_unfused.py:",
    ),
    "a sink in front": (
        lambda q, k, v: torch.cat([q[..., :1], q @ k.mT + added()], 3).softmax(-1).narrow(-1, 1, N) @ v,
        "attention sinks (cat at test_unfused.py:",
    ),
    "fp32 result of half scores": (
        lambda q, k, v: (q.half() @ k.half().mT).float().softmax(-1) @ v,
        "scores in float16, result in float32: needs one dtype",
    ),
    "value head dim": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v[..., :8], "value head_dim 8: needs q's and k's, 16"),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    fn, reason = KEPT[name]
    assert_kept(fn, *qkv(), because=reason)


def test_a_padding_mask_is_kept() -> None:
    def eager(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~valid[:, None, None, :], INF).softmax(-1) @ v

    assert_kept(eager, *qkv(), torch.arange(N).expand(B, N) < 20, because="mask bool (2, 1, 1, 24)")


def test_a_mask_may_not_widen_the_scores() -> None:
    """One query, and a causal mask that makes it twenty-four."""

    def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q[:, :, :1] @ k.mT + added()).softmax(-1) @ v

    assert_kept(widened, *qkv(), because="result (2, 3, 24, 16): needs q's batch, heads and tokens")


def test_a_size_computed_from_data_is_kept() -> None:
    def packed(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        index = valid.nonzero().squeeze(1)
        return (q @ k.index_select(2, index).mT).softmax(-1) @ v.index_select(2, index)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_kept(packed, *qkv(), torch.rand(N) > 0.4, because="size u0 computed from data: needs one known")


def keys_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    k[:, :, 3] = 7.0
    return scores.softmax(-1) @ v + 0 * k


def queries_changed_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    q.transpose(1, 2).zero_()
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("fn", [keys_changed, queries_changed_through_a_view])
def test_q_or_k_changed_between_the_scores_and_the_result(fn: Function) -> None:
    assert_kept(fn, *qkv(), because="in-place ")


def test_keys_changed_through_another_input() -> None:
    """Two inputs that are views of one tensor."""

    def changed(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        scores = q @ k.mT
        cache.zero_()
        return scores.softmax(-1) @ v

    def from_cache(q: Tensor, cache: Tensor, v: Tensor) -> Tensor:
        return torch.compile(changed, backend=backend)(q, cache[:, :H], v, cache)

    from support import Rewriter

    backend = Rewriter()
    q, k, v = qkv()
    cache = torch.cat([k, k], 1)
    expected = changed(q, k, v, cache.clone())
    assert relative_error(from_cache(q, cache, v), expected) <= 1e-6
    assert backend.report.kept[0].decision.reason.startswith("in-place ")


def test_values_changed_before_they_are_read() -> None:
    def changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT / 4).softmax(-1)
        v[:, :, 3] = 7.0
        return weights @ v

    assert_used(changed, *qkv())


LOOKALIKES: dict[str, Function] = {
    "linear attention": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "one softmax in front of the product": lambda q, k, v: (q @ k.mT) @ v.softmax(-1),
    "log_softmax": lambda q, k, v: (q @ k.mT).log_softmax(-1) @ v,
    "softmin": lambda q, k, v: F.softmin(q @ k.mT, dim=-1) @ v,
    "sigmoid": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    "no values": lambda q, k, v: (q @ k.mT).softmax(-1) * 2,
    "gate on one matrix of experts": lambda q, k, v: F.linear(q, k[0, 0, :4]).softmax(-1) @ v[0, 0, :4],
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_no_sites(name: str) -> None:
    assert_no_site(LOOKALIKES[name], *qkv())


EQUAL_HEADS = "k and v of "
UNKNOWN: dict[str, tuple[Function, str]] = {
    "q and k share more than the batch": (
        lambda q, k, v: (q @ k[:1].expand(B, H, N, D).mT + torch.zeros(4, B, 1, 1, 1)).softmax(-1)[0] @ v,
        "spelling not known: getitem at test_unfused.py:",
    ),
    "softmax over the queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "spelling not known: softmax over an"),
    "softmax over the heads": (lambda q, k, v: (q @ k.mT).softmax(1) @ v, "spelling not known: softmax over an"),
    "softmax over the batch": (lambda q, k, v: (q @ k.mT).softmax(0) @ v, "spelling not known: softmax over an"),
    "transposed weights": (lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v, "spelling not known: the product matmul at"),
    "transposed weights in einsum": (
        lambda q, k, v: torch.einsum("bhij,bhid->bhjd", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
        "spelling not known: the product einsum at",
    ),
    "weights on the right": (
        lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1),
        "spelling not known: the product matmul at",
    ),
    "head mask": (
        lambda q, k, v: ((q @ k.mT).softmax(-1) * v[:, :1, :1, :1]) @ v,
        "spelling not known: the product matmul at",
    ),
    "experts that are inputs": (
        lambda q, k, v: torch.einsum("ne,ned->nd", (q[0, 0] @ k[0, 0, :4].T).softmax(-1), v[0, 0, :4].expand(N, 4, D)),
        "spelling not known: the product einsum at",
    ),
    "sum over the heads": (
        lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bhid,bhjd->bij", q, k).softmax(-1), v[:, 0]),
        "spelling not known: the product einsum at",
    ),
    "sum over the heads of the result": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
        "spelling not known: the product einsum at",
    ),
    "values without heads": (
        lambda q, k, v: torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v[:, 0]),
        "k and v of 3x24 and 1x24: needs equal heads and tokens",
    ),
    "one key for all heads in einsum": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1), v),
        "k and v of 1x24 and 3x24: needs equal heads and tokens",
    ),
    "one query for all heads in einsum": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bid,bhjd->bhij", q[:, 0], k).softmax(-1), v),
        "heads 1 on 3: needs a multiple",
    ),
    "one batch of keys": (
        lambda q, k, v: (q @ k[:1].mT).softmax(-1) @ v,
        "batch 2 and 1: needs the same on q, k and v",
    ),
    "the diagonal": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (q @ k.mT).softmax(-1).diagonal(0, 2, 3).diag_embed(), v),
        "spelling not known: diagonal at",
    ),
    "weights rounded to integers": (
        lambda q, k, v: (q @ k.mT).softmax(-1).to(torch.int32).to(q.dtype) @ v,
        "spelling not known: the product matmul at",
    ),
    "scores rounded to integers": (
        lambda q, k, v: (q @ k.mT).to(torch.int64).to(q.dtype).softmax(-1) @ v,
        "spelling not known: the product matmul at",
    ),
    "bits of the scores read as another dtype": (
        lambda q, k, v: (q.half() @ k.half().mT).view(torch.bfloat16).softmax(-1) @ v.bfloat16(),
        "spelling not known: the product matmul at",
    ),
    "weights rounded to float8": (
        lambda q, k, v: (q @ k.mT).softmax(-1).to(torch.float8_e5m2).float() @ v,
        "spelling not known: the product matmul at",
    ),
    "scores floor-divided": (
        lambda q, k, v: torch.div(q @ k.mT, 2, rounding_mode="floor").softmax(-1) @ v,
        "spelling not known: the product matmul at",
    ),
    "scores under the fraction": (
        lambda q, k, v: (1 / (q @ k.mT)).softmax(-1) @ v,
        "spelling not known: the product matmul at",
    ),
    "added to the result": (
        lambda q, k, v: torch.baddbmm(flat(v), (flat(q) @ flat(k).mT).softmax(-1), flat(v)),
        "spelling not known: the product baddbmm at",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_spelling_knows_is_reported(name: str) -> None:
    fn, reason = UNKNOWN[name]
    assert_kept(fn, *qkv(), because=reason)


class Router(torch.nn.Module):
    """A gate over experts, or a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.randn(D, 4))
        self.experts = torch.nn.Parameter(torch.randn(4, D))


ROUTERS: dict[str, Callable[..., Tensor]] = {
    "gate and experts": lambda router, x, y: (x @ router.gate).softmax(-1) @ router.experts,
    "gate on inputs": lambda router, x, y: (x @ router.gate).softmax(-1) @ y,
    "gate behind a view": lambda router, x, y: (x @ router.gate.reshape(4, D).T).softmax(-1) @ y,
    "gate in einsum": lambda router, x, y: torch.einsum(
        "bne,ed->bnd", torch.einsum("bnd,de->bne", x, router.gate).softmax(-1), y
    ),
    "gate with a norm": lambda router, x, y: (x @ (router.gate / router.gate.norm(dim=0))).softmax(-1) @ y,
}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", ROUTERS)
def test_a_product_with_a_parameter_is_no_attention(name: str) -> None:
    router = Router()
    assert_no_site(lambda x, y: ROUTERS[name](router, x, y), torch.randn(2, N, D), torch.randn(4, D))


def test_channel_attention_is_attention_over_the_channels() -> None:
    """Restormer's: the tokens are what is summed over, and the channels what is attended to. Exact all the same."""
    backend = assert_used(lambda q, k, v: (q.mT @ k).softmax(-1) @ v.mT, *qkv())
    site = backend.report.used[0].site
    assert (site.q_len, site.kv_len, site.head_dim) == (D, D, N)


@pytest.mark.parametrize("dim", [-2, 1, 0])
def test_softmax_over_another_dim_is_right_through_inductor(dim: int) -> None:
    """Inductor's own fusion takes it for the last dim (torch 2.13, relative error 0.23)."""
    fn = lambda q, k, v: torch.softmax(q @ k.mT / 8, dim=dim) @ v  # noqa: E731
    inputs = qkv(1, 2, 24, 64)
    actual, report = compiled(fn, *inputs)
    assert not report.used
    assert relative_error(actual, fn(*inputs)) < 1e-5


def test_a_site_that_needs_a_gradient_is_kept() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    backend = assert_kept(lambda q, k, v: USED["operators"](q * 1, k, v), q, k, v, because="")
    assert backend.report.entries == backend.report.kept
