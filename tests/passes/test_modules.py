"""PyTorch's own attention modules, in evaluation and training, with every argument they take."""

from typing import Any

import pytest
import torch
from support import assert_kept, assert_used, compiled, relative_error, rewritten
from torch import Tensor, nn

B, N, E, H = 2, 24, 64, 4
TOLERANCE = 0.02
CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(N)

pytestmark = pytest.mark.usefixtures("no_grad")


def mha(**how: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(E, H, **how).eval()


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (B, N, E))


class Output(nn.Module):
    """An attention module of which only the output is used."""

    def __init__(self, attention: nn.MultiheadAttention, **how: Any) -> None:
        super().__init__()
        self.attention, self.how = attention, how

    def forward(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **how: Any) -> Tensor:
        k = q if k is None else k
        return self.attention(q, k, k if v is None else v, **self.how, **how)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention(batch_first: bool, need_weights: bool, bias: bool, training: bool) -> None:
    """Weights that are asked for but not used do no harm; training without dropout and gradient is evaluation."""
    module = Output(mha(batch_first=batch_first, bias=bias), need_weights=need_weights).train(training)
    site = assert_used(module, x()).report.used[0].site
    assert (site.spelling, site.heads, site.head_dim) == ("nn.MultiheadAttention", H, E // H)
    assert (site.batch, site.q_len) == ((B, N) if batch_first else (N, B))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim, vdim", [(None, None), (32, 48)])
def test_cross_attention(batch_first: bool, kdim: int | None, vdim: int | None) -> None:
    module = Output(mha(batch_first=batch_first, kdim=kdim, vdim=vdim))
    shape = (B, 9) if batch_first else (9, B)
    q = x(B, N, E) if batch_first else x(N, B, E)
    site = assert_used(module, q, x(*shape, kdim or E), x(*shape, vdim or E)).report.used[0].site
    assert (site.q_len, site.kv_len) == (N, 9)


def test_key_and_value_differ() -> None:
    assert_used(Output(mha(batch_first=True)), x(), x(B, 9, E), x(B, 9, E))


KEPT = {
    "key_padding_mask": (
        {"batch_first": True, "bias": False},
        {"key_padding_mask": torch.arange(N).expand(B, N) > 20},
        "key_padding_mask: needs none",
    ),
    "bias_k": ({"batch_first": True, "add_bias_kv": True}, {}, "bias_k: needs none"),
    "zero attention": ({"batch_first": True, "add_zero_attn": True}, {}, "add_zero_attn: needs False"),
    "a mask": ({"batch_first": True, "bias": False}, {"attn_mask": torch.randn(N, N)}, "mask float32 (24, 24)"),
    "a mask, fast path": ({"batch_first": True}, {"attn_mask": torch.rand(N, N) > 2}, "mask "),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    build, how, reason = KEPT[name]
    module = Output(mha(**build), **how)
    assert_kept(module, x(), because=reason)


def test_weights_that_are_used() -> None:
    module = mha(batch_first=True)
    fn = lambda q: torch.cat([*module(q, q, q)], -1)  # noqa: E731
    assert_kept(fn, x(), because="attention weights: used elsewhere (by ")


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first: bool) -> None:
    site = assert_used(Output(mha(batch_first=batch_first)), x(N, E), x(9, E)).report.used[0].site
    assert (site.batch, site.heads, site.q_len, site.kv_len) == (1, H, N, 9)


def test_dropout_in_training() -> None:
    module = Output(mha(dropout=0.5, batch_first=True)).train()
    _, backend = rewritten(module, x())
    assert [entry.decision.reason for entry in backend.report.entries] == ["dropout_p 0.5: needs 0 (model.eval())"]


def test_a_causal_hint_is_believed_where_pytorch_believes_it() -> None:
    module = Output(mha(batch_first=True), attn_mask=CAUSAL, is_causal=True, need_weights=False)
    assert assert_used(module, x()).report.used[0].site.mask.is_causal


def test_a_causal_hint_is_not_believed_where_pytorch_reads_the_mask() -> None:
    """With need_weights, F.multi_head_attention_forward ignores the hint."""
    module = Output(mha(batch_first=True), attn_mask=torch.zeros(N, N), is_causal=True, need_weights=True)
    assert_kept(module, x(), because="mask float32 (24, 24)")


def test_a_causal_mask_made_in_the_graph() -> None:
    module = mha(batch_first=True)

    def causal(q: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=torch.bool).triu(1)  # True: masked
        return module(q, q, q, attn_mask=mask, need_weights=False)[0]

    assert assert_used(causal, x()).report.used[0].site.mask.is_causal


def encoder_layer(**how: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, 128, batch_first=how.pop("batch_first", True), **how).eval()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layer(activation: str, norm_first: bool, batch_first: bool) -> None:
    assert_used(encoder_layer(activation=activation, norm_first=norm_first, batch_first=batch_first), x())


def test_encoder_layer_without_bias() -> None:
    assert_used(encoder_layer(bias=False), x())


def test_encoder_layer_in_training() -> None:
    layer = encoder_layer(dropout=0.5).train()
    _, backend = rewritten(layer, x())
    assert [entry.decision.reason for entry in backend.report.entries] == ["dropout_p 0.5: needs 0 (model.eval())"]


def test_encoder_layer_that_trains() -> None:
    """Kept, with the gradients of eager."""
    layer = encoder_layer(dropout=0.0).train()
    with torch.enable_grad():
        out, report = compiled(layer, q := x())
        assert report.kept[0].decision.reason.startswith("needs a gradient")
        actual = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        expected = torch.autograd.grad(layer(q).square().sum(), list(layer.parameters()))
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("how", [{}, {"is_causal": True}], ids=["mask", "mask and hint"])
def test_encoder_layer_with_a_causal_mask_as_input(how: dict[str, Any]) -> None:
    layer = encoder_layer()
    out, backend = rewritten(lambda q, m: layer(q, src_mask=m, **how), q := x(), CAUSAL)
    assert backend.report.kept[0].decision.reason.startswith("mask float32 (2, 4, 24, 24)")
    assert relative_error(out, layer(q, src_mask=CAUSAL, **how)) < 1e-6


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_with_a_causal_mask_made_in_the_graph(norm_first: bool) -> None:
    """As PyTorch's documentation has it; its fast path takes what is not 0 in a mask of floats for masked."""
    encoder = nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 2, enable_nested_tensor=False).eval()

    def causal(q: Tensor) -> Tensor:
        return encoder(q, mask=nn.Transformer.generate_square_subsequent_mask(N), is_causal=True)

    assert [str(entry.site.mask) for entry in assert_used(causal, x(), sites=2).report.used] == ["causal"] * 2


def test_encoder_layer_with_padding_as_long_as_the_batch() -> None:
    """A mask of (batch, tokens) that has the shape of one of (tokens, tokens)."""
    layer, q = encoder_layer(), torch.randn(N, N, E)
    padded = lambda q: layer(q, src_key_padding_mask=torch.ones(N, N, dtype=torch.bool).triu(1))  # noqa: E731
    assert_kept(padded, q, because="mask ")


def test_a_native_call_with_a_mask_of_no_type_is_refused_as_without_us() -> None:
    module = mha(batch_first=True)
    given = module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias

    def native(q: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=torch.bool).triu(1)
        return torch._native_multi_head_attention(q, q, q, E, H, *given, mask, False, True, None)[0]

    with torch.no_grad(), pytest.raises(RuntimeError, match="Mask Type should be defined"):
        rewritten(native, x())


def test_encoder_layer_with_padding() -> None:
    layer = encoder_layer()
    padding = torch.arange(N).expand(B, N) > 20
    assert_kept(lambda q, p: layer(q, src_key_padding_mask=p), x(), padding, because="mask ")


def test_encoder() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(norm_first=True), 3, enable_nested_tensor=False)
    backend = assert_used(encoder, x(), sites=3)
    assert [entry.site.name for entry in backend.report.used] == [f"layers.{i}" for i in range(3)]


def test_encoder_on_nested_tensors_is_right() -> None:
    """With padding, nn.TransformerEncoder packs the batch into a nested tensor."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    q, padding = x(), torch.arange(N).expand(B, N) > torch.tensor([[20], [N]])
    out, backend = rewritten(lambda q, p: encoder(q, src_key_padding_mask=p), q, padding)
    assert not backend.report.used
    valid = ~padding  # Dynamo does not pack, and leaves what eager sets to zero
    assert relative_error(out[valid], encoder(q, src_key_padding_mask=padding)[valid]) < 1e-5


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_layer(norm_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(E, H, 128, batch_first=True, norm_first=norm_first).eval()
    fn = lambda t, m: layer(t, m, tgt_mask=torch.full((N, N), float("-inf")).triu(1), tgt_is_causal=True)  # noqa: E731
    backend = assert_used(fn, x(), x(B, 9, E), sites=2)
    assert [(entry.site.mask.is_causal, entry.site.kv_len) for entry in backend.report.used] == [(True, N), (False, 9)]


@pytest.mark.parametrize("build", [lambda: Output(mha(batch_first=True)), encoder_layer])
def test_symbolic_lengths(build: Any) -> None:
    assert_used(build(), x(), dynamic=True)


AUTOCAST = {
    "F.multi_head_attention_forward": (lambda: Output(mha(batch_first=False, bias=False)), 1),
    "fast path of nn.MultiheadAttention": (lambda: Output(mha(batch_first=True)), None),
    "fast path of nn.TransformerEncoderLayer": (encoder_layer, 0),
}


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name: str, where: str) -> None:
    """A fast path that autocast does not reach is not replaced by layers that it would reach."""
    build, sites = AUTOCAST[name]
    module, q = build(), x()

    def inside(q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(q)

    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        fn = module if where == "around" else inside
        expected = fn(q)
        actual, backend = rewritten(fn, q)
    assert sites is None or len(backend.report.used) == sites
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) < TOLERANCE


def test_autocast_that_ended_before_the_module() -> None:
    layer = encoder_layer()

    def fn(q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            q = (q @ q.mT).float()[..., :1] * q
        return layer(q)

    assert_used(fn, x() / 8)


@pytest.mark.parametrize("build", [lambda: Output(mha(batch_first=False, bias=False)), encoder_layer])
def test_through_inductor(build: Any) -> None:
    module, q = build(), x()
    actual, report = compiled(module, q, fullgraph=True)
    assert len(report.used) == 1
    assert relative_error(actual, module(q)) < TOLERANCE
