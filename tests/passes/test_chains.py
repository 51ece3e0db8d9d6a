"""Sites that read each other's results: the compiled code calls ours as often as the report says, and no old one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import detached, relative_error
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

from sagecompile import report
from sagecompile.report import Report

pytestmark = pytest.mark.usefixtures("no_grad")
sdpa = F.scaled_dot_product_attention
THEIRS = (
    "_transformer_encoder_layer_fwd",
    "_native_multi_head_attention",
    "_scaled_dot_product",
    "softmax",
    "extern_kernels.bmm",
)
"""In the code of what was not rewritten, with or without a kernel of Inductor's own."""
WIDTH = 64


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 20, WIDTH))


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 8).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) / 8).softmax(-1), v)


def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (y.reshape(b * h, n, d) for y in (q, k, v))
    scores = torch.baddbmm(torch.empty(1, n, n), q, k.mT, beta=0, alpha=0.125).view(b, h, n, n)
    return torch.bmm(scores.softmax(-1).view(b * h, n, n), v).view(b, h, n, d)


def encoder(norm_first: bool = False, layers: int = 6) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


class Attentions(nn.Module):
    """nn.MultiheadAttention layers without anything between them."""

    def __init__(self, layers: int, **how: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, **how) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x, x, x, need_weights=False)
        return x


def decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 64, batch_first=True)
    return nn.TransformerDecoder(layer, 2).eval()


def in_turn(*attentions: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for attend in attentions:
            x = attend(x, x, x)
        return x

    return run


def branches(x: Tensor, flag: Tensor) -> Tensor:
    two = in_turn(sdpa, sdpa)
    return sdpa(*[torch.cond(flag, lambda x: two(x), lambda x: two(x + 1), (sdpa(x, x, x),))] * 3)


CHAINS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "TransformerEncoder": (encoder(), (x(),), 6),
    "TransformerEncoder, norm first": (encoder(norm_first=True), (x(),), 6),
    "TransformerDecoder": (decoder(), (x(), x(2, 9, WIDTH)), 4),
    "MultiheadAttention": (Attentions(3).eval(), (x(),), 3),
    "MultiheadAttention, batch first": (Attentions(3, batch_first=True).eval(), (x(),), 3),
    "MultiheadAttention, training": (Attentions(3), (x(),), 3),
    "sdpa is q, k and v": (in_turn(sdpa, sdpa, sdpa), (x(2, 4, 20, 64),), 3),
    "sdpa is q": (lambda q, k, v: sdpa(sdpa(q, k, v), k, v), (x(2, 4, 20, 64),) * 3, 2),
    "sdpa is k": (lambda q, k, v: sdpa(q, sdpa(q, k, v), v), (x(2, 4, 20, 64),) * 3, 2),
    "sdpa is v": (lambda q, k, v: sdpa(q, k, sdpa(q, k, v)), (x(2, 4, 20, 64),) * 3, 2),
    "transposed sdpa is k": (
        lambda q, k, v: sdpa(q, sdpa(q.mT, k.mT, v.mT).mT, v).transpose(1, 2),
        (x(2, 4, 64, 64),) * 3,
        2,
    ),
    "sdpa of fewer heads, repeated, is k and v": (
        lambda q, k: sdpa(q, *[sdpa(k, k, k).repeat_interleave(2, 1)] * 2),
        (x(2, 4, 20, 64), x(2, 2, 20, 64)),
        2,
    ),
    "matmul": (in_turn(matmul, matmul), (x(2, 4, 20, 64),), 2),
    "einsum": (in_turn(einsum, einsum), (x(2, 4, 20, 64),), 2),
    "batch and heads joined": (in_turn(joined, joined), (x(2, 4, 20, 64),), 2),
    "of every kind": (in_turn(sdpa, matmul, einsum, joined, sdpa), (x(2, 4, 20, 64),), 5),
    "weights before v": (
        lambda q, k, v: [w := (q @ k.mT / 8).softmax(-1), y := sdpa(q, k, v), w @ y][-1],
        (x(2, 4, 20, 64),) * 3,
        2,
    ),
    "normed": (lambda x: sdpa(*[F.rms_norm(sdpa(x, x, x), (64,))] * 2, x), (x(2, 4, 20, 64),), 2),
    "checkpointed": (
        lambda x: in_turn(sdpa, matmul)(checkpoint(in_turn(sdpa, sdpa), sdpa(x, x, x), use_reentrant=False)),
        (x(2, 4, 20, 64),),
        5,
    ),
    "in branches": (branches, (x(2, 4, 20, 64), torch.tensor(True)), 6),
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_rewrite_happens(name: str) -> None:
    fn, inputs, sites = CHAINS[name]
    expected = fn(*detached(inputs))
    torch._dynamo.reset()
    with report.recording() as reports:
        compiled = torch.compile(fn, backend="sage_inductor", options={"sage.policy": "always"})
        actual, code = run_and_get_code(compiled, *inputs)
    done = sum(reports, Report(graphs=0))
    assert (len(done.used), done.kept) == (sites, ())
    text = "\n".join(code)
    ours = text.count("torch.ops.sagecompile.attention.default(") + text.count(
        "torch.ops.sagecompile.qk_norm_rope_attention.default("
    )
    assert ours == sites, text
    assert [what for what in THEIRS if what in _calls(text)] == []
    assert relative_error(actual, expected) <= 0.06  # of several in a row


def _calls(code: str) -> str:
    """The lines that run something, without what Inductor says of where they come from."""
    return "\n".join(line for line in code.splitlines() if not line.strip().startswith("#"))
