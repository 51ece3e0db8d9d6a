"""What torch.export, make_fx and other tools write is compiled like the model itself: `exported.module()`."""

import pytest
import torch
import torch.nn.functional as F
from support import compiled, relative_error
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.usefixtures("no_grad")


class Block(nn.Module):
    """Attention by SDPA, by a softmax, and by PyTorch's module, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.module = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = ((q @ x.mT) / 4).softmax(-1) @ v
        x = x.transpose(1, 2).flatten(2)
        return self.module(x, x, x, need_weights=False)[0]


def exported(block: Block, x: Tensor) -> nn.Module:
    return torch.export.export(block, (x,)).module()


def exported_for_any_length(block: Block, x: Tensor) -> nn.Module:
    return torch.export.export(block, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", min=2, max=64)},)).module()


def decomposed(block: Block, x: Tensor) -> nn.Module:
    return torch.export.export(block, (x,)).run_decompositions().module()


def traced(block: Block, x: Tensor) -> nn.Module:
    return make_fx(block)(x)


@pytest.mark.parametrize("tool", [exported, exported_for_any_length, traced], ids=lambda tool: tool.__name__)
def test_all_sites_of_the_model_are_used(tool) -> None:  # type: ignore[no-untyped-def]
    block, x = Block().eval(), torch.randn(2, 20, 64)
    actual, report = compiled(tool(block, x), x)
    assert (len(report.used), report.kept) == (3, ())
    assert relative_error(actual, block(x)) <= 0.04


def test_decomposed_sdpa_is_reported() -> None:
    """Its softmax puts zeros where all keys are masked, in six calls that no spelling knows."""
    block, x = Block().eval(), torch.randn(2, 20, 64)
    actual, report = compiled(decomposed(block, x), x)
    reasons = [entry.decision.reason for entry in report.kept]
    assert len(report.used) == 1
    assert [reason.partition(" at ")[0] for reason in reasons] == ["spelling not known: where"] * 2
    assert relative_error(actual, block(x)) <= 0.02


def test_names_are_those_of_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    model, x = Model().eval(), torch.randn(2, 20, 64)
    _, report = compiled(torch.export.export(model, (x,)).module(), x)
    names = [entry.site.name for entry in report.used]
    assert names == ["layers.0", "layers.0", "layers.0.module", "layers.1", "layers.1", "layers.1.module"]


def test_aotinductor_takes_our_op_and_none_of_our_options(tmp_path) -> None:  # type: ignore[no-untyped-def]
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            how = {"scale": None, "ahead": 0, "format": "qk_int8_pv_fp16", "tokens_first": False}
            return torch.ops.sagecompile.attention(q, k, v, provider="reference", **how)

    inputs = tuple(torch.randn(1, 2, 20, 64) for _ in range(3))
    program = torch.export.export(Attend(), inputs)
    with pytest.raises(AttributeError, match=r"config.sage.policy does not exist"):
        torch._inductor.aoti_compile_and_package(program, inductor_configs={"sage.policy": "always"})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attend.pt2"))
    actual = torch._inductor.aoti_load_package(package)(*inputs)
    assert relative_error(actual, F.scaled_dot_product_attention(*inputs, is_causal=True)) <= 0.02
