"""RMSNorm and RoPE in front of q and k go into the op: which spellings do, which lookalikes do not, and the values.

Most tests take the quantization out of the reference, so that a formula that is only nearly the same is seen.
"""

from collections.abc import Callable
from typing import Any

import diffusers.models.normalization
import pytest
import torch
import torch.nn.functional as F
import transformers.models.gemma.modeling_gemma as gemma
import transformers.models.llama.modeling_llama as llama
from diffusers.models.embeddings import apply_rotary_emb
from support import EXACT, FAST, TOLERANCE, compiled, detached, relative_error, rewritten
from torch import Tensor, nn

from sagecompile.cli.bench.block import Block, angles

B, N, H, KV, D = 2, 24, 4, 2, 64
EPS = 1e-4
"""As large as the mean square of what is normed here, so that an eps that is forgotten or misplaced shows."""
ALL = "QK-norm and RoPE"
Make = Callable[..., Tensor]
Attention = Callable[..., Tensor]
pytestmark = pytest.mark.usefixtures("no_grad")


def projected(size: float = 1.0, kv_heads: int = H, kv_len: int = N) -> list[Tensor]:
    """q, k, v (B, N, H, D) as projections leave them."""
    shapes = ((N, H), (kv_len, kv_heads), (kv_len, kv_heads))
    return [size * torch.randn(B, length, heads, D) for length, heads in shapes]


def tables(batch: int = 1, length: int = N) -> list[Tensor]:
    """cos and sin (batch, N, D) without structure: each channel has its own."""
    turns = torch.randn(batch, length, D)
    return [turns.cos(), turns.sin()]


def weights() -> list[Tensor]:
    return [*(1 + torch.randn(2, D))]


def fused(fn: Attention, *args: Any, error: float = 1e-5, **how: Any) -> str:
    """What the report says is fused into the one site of `fn(*args)`, whose result is `fn`'s."""
    expected = fn(*detached(args))
    actual, backend = rewritten(fn, *detached(args), formats=(FAST,), **how)
    (entry,) = backend.report.entries
    said = entry.to_dict()["decision"]["fused"]
    assert ("qk_norm_rope_attention.default" in backend.targets) == bool(said)
    assert ("attention.default" in backend.targets) != bool(said)
    assert (f"; {said} fused" in str(backend.report)) == bool(said)
    assert relative_error(actual, expected) < error
    return said or ""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on tensors (B, N, H, D)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)


class Spelled(nn.Module):
    """A norm from a function of x and a weight."""

    def __init__(self, formula: Make) -> None:
        super().__init__()
        self.formula, self.weight = formula, nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight)


class Normed(nn.Module):
    """Attention on tensors (B, N, H, D), q and k through norms of their own."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.q_norm, self.k_norm = norm(), norm()
        for parameter in self.parameters():
            nn.init.normal_(parameter, 1.0, 1.0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(self.q_norm(q), self.k_norm(k), v)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.RMSNorm(D, eps=EPS),
    "torch, no weight": lambda: nn.RMSNorm(D, eps=EPS, elementwise_affine=False),
    "Llama": lambda: llama.LlamaRMSNorm(D, EPS),
    "Gemma, which adds 1 to the weight": lambda: gemma.GemmaRMSNorm(D, EPS),
    "diffusers": lambda: diffusers.models.normalization.RMSNorm(D, EPS),
    "diffusers, no weight": lambda: diffusers.models.normalization.RMSNorm(D, EPS, elementwise_affine=False),
    "functional": lambda: Spelled(lambda x, w: F.rms_norm(input=x, normalized_shape=[D], eps=EPS, weight=w)),
    "square": lambda: Spelled(lambda x, w: x * (EPS + x.square().mean(3, True)).rsqrt() * w),
    "x * x": lambda: Spelled(lambda x, w: w * (torch.rsqrt((x * x).mean([-1], keepdim=True).add(EPS)) * x)),
    "x ** 2": lambda: Spelled(lambda x, w: (x * torch.rsqrt((x**2).mean(dim=-1, keepdim=True) + EPS)).mul(w)),
    "heads first": lambda: Spelled(lambda x, w: F.rms_norm(x.transpose(1, 2), (D,), w, EPS).transpose(1, 2)),
    "a copy": lambda: Spelled(lambda x, w: F.rms_norm(x.contiguous(), (D,), w, EPS).clone().to(x.dtype)),
}


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    assert fused(Normed(NORMS[name]), *projected(EPS**0.5)) == "QK-norm"


@pytest.mark.usefixtures("not_quantized")
def test_the_eps_that_torch_takes_where_none_is_given() -> None:
    assert fused(Normed(lambda: nn.RMSNorm(D)), *projected(3e-4)) == "QK-norm"


def with_root(root: Make) -> Callable[[], nn.Module]:
    """x * root(mean of x^2) * weight."""
    return lambda: Spelled(lambda x, w: x * root(x.pow(2).mean(-1, keepdim=True)) * w)


NOT_NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(D, eps=EPS),
    "over the heads too": lambda: nn.RMSNorm((H, D), eps=EPS),
    "over the tokens": lambda: Spelled(lambda x, w: F.rms_norm(x.transpose(1, 3), (N,), None, EPS).transpose(1, 3)),
    "mean over the tokens": lambda: Spelled(lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w),
    "mean over heads": lambda: Spelled(lambda x, w: x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + EPS)),
    "sum": lambda: Spelled(lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * w),
    "of x and another": lambda: Spelled(lambda x, w: x * torch.rsqrt((x * x.sign()).mean(-1, keepdim=True) + EPS) * w),
    "another power": lambda: Spelled(lambda x, w: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS) * w),
    "of something else": lambda: Spelled(lambda x, w: x * torch.rsqrt(x.flip(1).pow(2).mean(-1, True) + EPS) * w),
    "eps outside the root": with_root(lambda mean: mean.rsqrt() + EPS),
    "eps on the root": with_root(lambda mean: 1 / (mean.sqrt() + EPS)),
    "no eps": with_root(torch.rsqrt),
    "root, not its inverse": with_root(lambda mean: torch.sqrt(mean + EPS)),
    "twice eps": with_root(lambda mean: torch.rsqrt(torch.add(mean, EPS, alpha=2))),
    "eps is a tensor": with_root(lambda mean: torch.rsqrt(mean + torch.tensor(EPS))),
    "a weight for all": lambda: Spelled(lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS) * w[:1]),
    "a weight for each head": lambda: Spelled(
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS) * w[:H, None]
    ),
    "of one channel": lambda: Spelled(lambda x, w: (y := x[..., :1]) * torch.rsqrt(y.pow(2).mean(-1, True) + EPS) * w),
    "weight added": lambda: Spelled(lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS) + w),
    "float64 inside": lambda: Spelled(lambda x, w: F.rms_norm(x.double(), (D,), w.double(), EPS).float()),
    "bfloat16 inside": lambda: Spelled(lambda x, w: F.rms_norm(x.bfloat16(), (D,), w.bfloat16(), EPS).float()),
}


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("name", NOT_NORMS)
def test_not_norms(name: str) -> None:
    assert fused(Normed(NOT_NORMS[name]), *projected(EPS**0.5)) == ""


@pytest.mark.usefixtures("not_quantized")
def test_a_mean_without_keepdim_that_fits_another_dim() -> None:
    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1) + EPS)

    q, k, v = 0.01 * torch.arange(3 * D**3).reshape(3, 1, D, D, D).sin()
    assert fused(lambda q, k, v: attend(norm(q), norm(k), v), q, k, v) == ""


def turn(x: Tensor, cos: Tensor, sin: Tensor, turned: Tensor) -> Tensor:
    """x (B, N, H, D), cos and sin (1 or B, N, D)."""
    return x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)


def halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1)


def pairs(x: Tensor) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((-imaginary, real), dim=-1).flatten(3)


def flux(x: Tensor, cos: Tensor, sin: Tensor, **how: Any) -> Tensor:
    return apply_rotary_emb(x, (cos[0], sin[0]), **how)  # type: ignore[return-value]


def heads_first(rope: Make) -> Make:
    """`rope` on (B, H, N, D)."""
    return lambda x, cos, sin: rope(x.transpose(1, 2), cos, sin).transpose(1, 2)


ROPES: dict[str, Make] = {
    "Llama": heads_first(lambda x, c, s: llama.apply_rotary_pos_emb(x, x, c, s)[0]),
    "Llama, tokens first": lambda x, c, s: llama.apply_rotary_pos_emb(x, x, c, s, 2)[0],
    "by chunk": lambda x, c, s: turn(x, c, s, torch.cat((-x.chunk(2, -1)[1], x.chunk(2, dim=-1)[0]), -1)),
    "by split": lambda x, c, s: turn(x, c, s, torch.cat((-x.split(32, -1)[1], x.split([32, 32], 3)[0]), -1)),
    "by slices of every dim": lambda x, c, s: turn(x, c, s, torch.cat([-x[:, :, :, 32:64], x[:, :, :, 0:32]], 3)),
    "the other way around": lambda x, c, s: torch.mul(s[:, :, None], halves(x)) + c[:, :, None] * x,
    "Flux": lambda x, c, s: flux(x, c, s, sequence_dim=1),
    "Flux, heads first": heads_first(flux),
    "diffusers, halves": lambda x, c, s: flux(x, c, s, sequence_dim=1, use_real_unbind_dim=-2),
    "every other": lambda x, c, s: turn(x, c, s, torch.stack((-x[..., 1::2], x[..., ::2]), -1).view(x.shape)),
    "tables without a batch": heads_first(lambda x, c, s: x * c[0] + halves(x) * s[0]),
    "cos and sin swapped": lambda x, c, s: turn(x, s, c, pairs(x)),
    "a copy": lambda x, c, s: turn(x.float(), c, s, halves(x.contiguous()).clone()).type_as(x),
}


def roped(rope: Make) -> Attention:
    return lambda q, k, v, cos, sin: attend(rope(q, cos, sin), rope(k, cos, sin), v)


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", ROPES)
def test_ropes(name: str, batch: int) -> None:
    """Those that take the first of a batch of tables do so alike in the op."""
    assert fused(roped(ROPES[name]), *projected(), *tables(batch)) == "RoPE"


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, rest = x[..., : D // 2], x[..., D // 2 :]
    turned = torch.cat((-x[..., D // 4 :], x[..., : D // 4]), -1)
    return torch.cat((turn(x, cos[..., : D // 2], sin[..., : D // 2], turned), rest), -1)


def tokens_last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE that takes the tokens for the channels, x (B, N, H, D)."""
    x = x.transpose(1, 3)
    turned = torch.cat((-x[..., N // 2 :], x[..., : N // 2]), -1)
    return x * cos.mT.unsqueeze(2) + turned * sin.mT.unsqueeze(2)


NOT_ROPES: dict[str, Make] = {
    "subtracted": lambda x, c, s: x * c[:, :, None] - halves(x) * s[:, :, None],
    "the second half negated": lambda x, c, s: turn(x, c, s, torch.cat((x[..., 32:], -x[..., :32]), -1)),
    "halves in their own places": lambda x, c, s: turn(x, c, s, torch.cat((-x[..., :32], x[..., 32:]), -1)),
    "nothing negated": lambda x, c, s: turn(x, c, s, torch.cat((x[..., 32:], x[..., :32]), -1)),
    "both negated": lambda x, c, s: turn(x, c, s, torch.cat((-x[..., 32:], -x[..., :32]), -1)),
    "other slices": lambda x, c, s: turn(x, c, s, torch.cat((-x[..., 31:63], x[..., :32]), -1)),
    "slices of another dim": lambda x, c, s: turn(x, c, s, torch.cat((-x[:, :, 2:], x[:, :, :2]), 2)),
    "halves of something else": lambda x, c, s: turn(x, c, s, halves(x.flip(1))),
    "three parts": lambda x, c, s: turn(x, c, s, torch.cat((-x[..., 32:], x[..., :16], x[..., 16:32]), -1)),
    "the absolute value": lambda x, c, s: turn(x, c, s, torch.cat((x[..., 32:].abs(), x[..., :32]), -1)),
    "halves of two": lambda x, c, s: turn(x, c, s, torch.cat((-x[..., 32:], x.flip(1)[..., :32]), -1)),
    "halves of other tokens": lambda x, c, s: turn(
        x, c, s, torch.cat((-x[:, torch.arange(N).flip(0), :, 32:], x[..., :32]), -1)
    ),
    "one part": lambda x, c, s: turn(x, c, s, torch.cat((-x,), -1)),
    "pairs put together as halves, in x's shape": lambda x, c, s: turn(
        x, c, s, torch.cat((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
    ),
    "the first of a pair twice": lambda x, c, s: turn(x, c, s, torch.stack((-x[..., ::2], x[..., ::2]), -1).flatten(3)),
    "pairs put together as halves": lambda x, c, s: turn(x, c, s, torch.cat((-x[..., 1::2], x[..., ::2]), -1)),
    "halves put together as pairs": lambda x, c, s: turn(
        x, c, s, torch.stack((-x[..., 32:], x[..., :32]), -1).flatten(3)
    ),
    "stacked in front": lambda x, c, s: turn(x, c, s, torch.stack((-x[..., 1::2], x[..., ::2]), -2).flatten(3)),
    "rolled by a half": lambda x, c, s: turn(x, c, s, -x.roll(32, -1)),
    "some channels only": partial,
    "of the tokens": lambda x, c, s: tokens_last(x, c, s).transpose(1, 3),
    "tables that depend on the head": lambda x, c, s: (
        x * torch.stack([c, s, c, s], 2) + halves(x) * torch.stack([s, c, s, c], 2)
    ),
    "a factor for all": lambda x, c, s: x * c[0, 0, 0] + halves(x) * 0.5,
    "a table of one and a table of the other shape": heads_first(lambda x, c, s: x * c + halves(x) * s[:, None]),
    "one position for all": lambda x, c, s: turn(x, c[:, :1], s[:, :1], halves(x)),
    "one angle for all channels": lambda x, c, s: turn(x, c[..., :1], s[..., :1], halves(x)),
    "tables in float64": lambda x, c, s: turn(x, c.double(), s.double(), halves(x)).float(),
    "twice the second": lambda x, c, s: torch.add(x * c[:, :, None], halves(x) * s[:, :, None], alpha=2),
    "scaled": lambda x, c, s: 2 * turn(x, c, s, halves(x)),
    "in place": lambda x, c, s: turn(x, c, s, halves(x)).mul_(2),
    "changed in part": lambda x, c, s: turn(x, c, s, halves(x)).index_fill_(1, torch.tensor([3]), 0.0),
    "then a norm": lambda x, c, s: F.rms_norm(turn(x, c, s, halves(x)), (D,), None, EPS),
}


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("name", NOT_ROPES)
def test_not_ropes(name: str) -> None:
    assert fused(roped(NOT_ROPES[name]), *projected(), *tables()) == ""


@pytest.mark.usefixtures("not_quantized")
def test_a_batch_that_only_the_tables_have() -> None:
    q, k, v = projected()
    assert fused(roped(ROPES["Llama"]), q[:1], k[:1], v, *tables(B)) == ""


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), weight, EPS)


def made(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turn(y := normed(x, weight), cos, sin, pairs(y))


def both(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attend(made(q, wq, cos, sin), made(k, wk, cos, sin), v)


def given(**how: Any) -> list[Tensor]:
    return [*projected(EPS**0.5, **how), *weights(), *tables(B)]


def linear(x: Tensor) -> Tensor:
    return F.linear(x.flatten(2), torch.eye(x.shape[2] * D)).view(x.shape)


@torch.library.custom_op("sagecompile_tests::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor) -> Tensor:
    return x.clone()


quantized_linear.register_fake(torch.empty_like)
library = torch.library.Library("sagecompile_tests", "FRAGMENT")
library.define("doubled(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("doubled", lambda x: x * 2, "CompositeImplicitAutograd")

SOURCES: dict[str, tuple[Make, bool]] = {
    "an input": (lambda x: x, True),
    "linear": (linear, True),
    "matmul": (lambda x: x @ torch.eye(D), True),
    "einsum": (lambda x: torch.einsum("bnhd,de->bnhe", x, torch.eye(D)), True),
    "a part of one product": (
        lambda x: F.linear(x.flatten(2), torch.eye(H * D).repeat(3, 1)).chunk(3, -1)[1].unflatten(-1, (H, D)),
        True,
    ),
    "one of three": (lambda x: torch.stack([x, x]).unbind(0)[1], False),
    "one of a product's three": (
        lambda x: F.linear(x.flatten(2), torch.eye(H * D).repeat(3, 1)).view(B, N, 3, H, D).unbind(2)[2],
        True,
    ),
    "a slice": (lambda x: linear(x)[:, :, :, :], True),
    "a custom op": (quantized_linear, True),
    "a custom op of other ops": (lambda x: torch.ops.sagecompile_tests.doubled(x), False),
    "rows by index": (lambda x: linear(x)[:, torch.arange(N)], False),
    "pointwise": (lambda x: linear(x) + 0.1, False),
    "a norm of all heads": (lambda x: F.rms_norm(linear(x).flatten(2), (H * D,), None, EPS).view(x.shape), False),
    "a cat": (lambda x: torch.cat((linear(x[:, :9]), linear(x[:, 9:])), 1), False),
}


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("name", SOURCES)
def test_only_what_memory_holds_is_read(name: str) -> None:
    source, expected = SOURCES[name]
    done = fused(lambda q, k, *rest: both(source(q), source(k), *rest), *given())
    assert done == (ALL if expected else "")


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("kv_heads", [KV, 1])
def test_grouped_queries(kv_heads: int) -> None:
    """RoPE comes before the repeat, which is undone."""

    def repeated(*args: Tensor) -> Tensor:
        q, k, v, wq, wk, *tables = args
        q, k = made(q, wq, *tables), made(k, wk, *tables)
        return attend(q, *(x.repeat_interleave(H // kv_heads, 2) for x in (k, v)))

    for fn in (repeated, both):
        assert fused(fn, *given(kv_heads=kv_heads)) == ALL


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("name", ["Llama", "Llama, tokens first", "Flux", "Flux, heads first"])
def test_symbolic_sizes(name: str) -> None:
    model = Normed(NORMS["Llama"])

    def whole(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = model.q_norm(q), model.k_norm(k)
        return roped(ROPES[name])(q, k, v, cos, sin)

    assert fused(whole, *projected(EPS**0.5, kv_heads=KV), *tables(), dynamic=True) == ALL


@pytest.mark.usefixtures("not_quantized")
def test_softmax_spelled_out() -> None:
    def spelled(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = made(q, wq, cos, sin).transpose(1, 2), made(k, wk, cos, sin).transpose(1, 2)
        return (q @ k.mT / 8).softmax(-1) @ v.transpose(1, 2)

    assert fused(spelled, *given()) == ALL


@pytest.mark.usefixtures("not_quantized")
def test_inside_a_checkpointed_block() -> None:
    def model(*args: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(both, *args, use_reentrant=False)  # type: ignore[no-any-return]

    args = given()
    actual, backend = rewritten(model, *args, formats=(FAST,))
    assert [entry.decision.fused for entry in backend.report.used] == [ALL]
    assert relative_error(actual, both(*args)) < 1e-5


@pytest.mark.usefixtures("not_quantized")
def test_q_and_k_each_for_itself() -> None:
    q, k, v, wq, wk, cos, sin = given()
    assert fused(lambda q, k, v: attend(made(q, wq, cos, sin), k, v), q, k, v) == "Q-norm and Q-RoPE"
    assert fused(lambda q, k, v: attend(q, made(k, wk, cos, sin), v), q, k, v) == "K-norm and K-RoPE"
    assert fused(lambda q, k, v: attend(turn(q, cos, sin, halves(q)), normed(k, wk), v), q, k, v) == (
        "K-norm and Q-RoPE"
    )
    k, v = projected(kv_len=9)[1:]
    assert fused(lambda q, k, v: attend(made(q, wq, cos, sin), normed(k, wk), v), q, k, v) == "QK-norm and Q-RoPE"


@pytest.mark.usefixtures("not_quantized")
def test_q_and_k_of_other_tables() -> None:
    """The op has one pair of tables: k is left as it is."""

    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return attend(turn(q, cos, sin, pairs(q)), turn(k, 2 * cos, 2 * sin, pairs(k)), v)

    assert fused(model, *projected(), *tables()) == "Q-RoPE"
    assert fused(lambda *args: model(*args[:3], *(args[3] * x for x in args[4:])), *projected(), 2.0, *tables()) == (
        "Q-RoPE"
    )

    def one_way_of_turning_each(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return attend(turn(q, cos, sin, pairs(q)), turn(k, cos, sin, halves(k)), v)

    assert fused(one_way_of_turning_each, *projected(), *tables()) == "RoPE"

    def views_of_one_table(q: Tensor, k: Tensor, v: Tensor, both: Tensor) -> Tensor:
        return attend(turn(q, both[0], both[1], pairs(q)), turn(k, both[1], both[0], pairs(k)), v)

    assert fused(views_of_one_table, *projected(), torch.stack(tables())) == "Q-RoPE"

    def other_rows_of_one_table(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = turn(q, cos[:, :N], sin[:, :N], pairs(q)), turn(k, cos[:, ::2], sin[:, ::2], pairs(k))
        return attend(q, k, v)

    assert fused(other_rows_of_one_table, *projected(), *tables(length=2 * N)) == "Q-RoPE"


COMPUTED_TWICE: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], str]] = {
    "cos and sin": (lambda angles, which: (angles.cos(), angles.sin()), "RoPE"),
    "of halves": (lambda angles, which: ((a := torch.cat([angles[..., :32]] * 2, -1)).cos(), 0.5 * a.sin()), "RoPE"),
    "in another dtype": (lambda angles, which: (angles.float().cos()[:, :N], angles.sin().to(angles.dtype)), "RoPE"),
    "another factor": (lambda angles, which: ((angles * (1 + which)).cos(), angles.sin()), "Q-RoPE"),
    "another slice": (
        lambda angles, which: (angles.cos(), (angles.repeat(1, 2, 1)[:, which : N + which]).sin()),
        "Q-RoPE",
    ),
    "another function": (lambda angles, which: (angles.cos(), (angles.cos if which else angles.sin)()), "Q-RoPE"),
    "not known to give the same again": (lambda angles, which: (angles.cos(), angles.tanh()), "Q-RoPE"),
    "changed in between": (lambda angles, which: (angles.mul_(1 + which), (angles.cos(), angles.sin()))[1], "Q-RoPE"),
}


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("name", COMPUTED_TWICE)
def test_tables_that_q_and_k_compute_each(name: str) -> None:
    tables_of, expected = COMPUTED_TWICE[name]

    def model(q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> Tensor:
        q, k = (turn(x, *tables_of(angles, which), pairs(x)) for which, x in enumerate((q, k)))
        return attend(q, k, v)

    assert fused(model, *projected(), torch.randn(1, N, D)) == expected


@pytest.mark.usefixtures("not_quantized")
def test_a_cast_reads_only_a_dtype_of_its_second_tensor() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        other = v.exp()
        return attend(normed(q, wq).type_as(other), normed(k, wk).to(other), v), other

    assert fused(model, *projected(EPS**0.5), *weights()) == "QK-norm"


@pytest.mark.usefixtures("not_quantized")
def test_a_projection_in_a_wider_dtype() -> None:
    """The kernel would read it twice as wide, and attention has one dtype."""

    def model(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        return attend(normed(q, wq).bfloat16(), normed(k, wk).bfloat16(), v.bfloat16())

    assert fused(model, *projected(EPS**0.5), *weights(), error=EXACT[torch.bfloat16]) == ""


READERS: dict[str, Callable[[dict[str, Tensor], Tensor], Any]] = {
    "k is returned": lambda seen, out: (out, seen["roped"]),
    "its heads are returned": lambda seen, out: (out, seen["roped"].transpose(1, 2)[:, :1]),
    "the normed k is returned": lambda seen, out: (out, seen["normed"]),
    "k is added to the result": lambda seen, out: out + seen["roped"].transpose(1, 2),
    "k is changed after it": lambda seen, out: (seen["roped"].mul_(2), out + 0)[1],
    "k attends to itself": lambda seen, out: out + attend(seen["roped"], seen["roped"], seen["roped"]),
}


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("name", READERS)
def test_k_with_another_reader_is_left(name: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> Any:
        seen = {"normed": normed(k, wk)}
        seen["roped"] = turn(seen["normed"], cos, sin, pairs(seen["normed"]))
        return READERS[name](seen, attend(made(q, wq, cos, sin), seen["roped"], v))

    args = given()
    actual, backend = rewritten(model, *detached(args), formats=(FAST,))
    assert backend.report.entries[0].to_dict()["decision"]["fused"] == "Q-norm and Q-RoPE"
    assert relative_error(actual, model(*detached(args))) < 1e-5


@pytest.mark.usefixtures("not_quantized")
def test_a_result_that_is_thrown_away_is_no_reader() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = made(q, wq, cos, sin), made(k, wk, cos, sin)
        (k + 1).chunk(2, -1)
        return attend(q, k, v)

    assert fused(model, *given()) == ALL


@pytest.mark.usefixtures("not_quantized")
def test_the_projection_may_have_other_readers() -> None:
    assert fused(lambda q, *rest: both(q, *rest).transpose(1, 2) + q, *given()) == ALL


CHANGES: dict[str, tuple[int, str]] = {
    "q": (0, "K-norm and K-RoPE"),
    "k": (1, "Q-norm and Q-RoPE"),
    "q's weight": (3, "K-norm and K-RoPE"),
    "cos": (5, ""),
    "sin": (6, ""),
}


@pytest.mark.usefixtures("not_quantized")
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_before_attention_reads_it(what: str) -> None:
    index, expected = CHANGES[what]

    def model(*args: Tensor) -> Tensor:
        q, k, v, wq, wk, *tables = args
        q, k = made(q, wq, *tables), made(k, wk, *tables)
        args[index][..., 7:] *= -3
        return attend(q, k, v)

    assert fused(model, *given()) == expected


@pytest.mark.usefixtures("not_quantized")
def test_a_copy_of_what_is_changed() -> None:
    def model(q: Tensor, *rest: Tensor) -> Tensor:
        copied = q.clone()
        q.zero_()
        return both(copied, *rest)

    assert fused(model, *given()) == "K-norm and K-RoPE"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_compiled_block(rope: str, dtype: torch.dtype) -> None:
    """Against float64, where the fused is no further away than what is not fused."""
    block = Block(D, rope, is_causal=True)
    for norm in (block.q_norm, block.k_norm):
        nn.init.normal_(norm.weight, 1.0, 0.1)
    q, k, v = (x.to(dtype) for x in projected(3.0))
    args = (q, k, v, *angles(N, D, rope, dtype, torch.device("cpu")).values())
    block = block.to(dtype)
    out, report = compiled(block, *args, formats=(FAST,), fullgraph=True)
    assert [entry.decision.fused for entry in report.used] == [ALL]
    exact = block.double()(*(x.double() for x in args))
    assert out.dtype == dtype and relative_error(out, exact) <= TOLERANCE[FAST]


def test_nothing_of_it_stays_in_the_graph() -> None:
    """Nor the lists that `unbind` makes."""
    _, backend = rewritten(both, *given(), formats=(FAST,))
    assert set(backend.targets) <= {"transpose", "permute", "unsqueeze", "squeeze", "qk_norm_rope_attention.default"}


def test_nothing_is_looked_for_where_no_kernel_does_it() -> None:
    """Reading a norm's eps would make it a guard; under `auto` a CPU has no kernel for it."""
    fn = Normed(NORMS[next(iter(NORMS))])
    for policy, found in (("always", True), ("auto", False), ("never", False)):
        _, backend = rewritten(fn, *projected(EPS**0.5), policy=policy)
        assert [bool(entry.site.prologues) for entry in backend.report.entries] == [found]


def test_the_result_of_another_site_is_no_source() -> None:
    """It is replaced, and what was read before would keep the old call alive."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        first = (q @ k.mT / D**0.5).softmax(-1) @ v
        return F.scaled_dot_product_attention(F.rms_norm(first, (D,), eps=1e-6), k, v)

    given = projected()
    out, backend = rewritten(fn, *given)
    assert len(backend.report.used) == 2 and relative_error(out, fn(*given)) <= 0.02
    assert "softmax" not in backend.targets


def test_a_kernel_that_fails_with_a_prologue_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from sagecompile.kernels import available

    refusal = available.refusal

    def refuses(site: Any, *rest: Any) -> str | None:
        return "ptxas died" if site.prologues else refusal(site, *rest)

    monkeypatch.setattr(available, "refusal", refuses)
    assert fused(Normed(NORMS[next(iter(NORMS))]), *projected(EPS**0.5), error=0.045) == ""
