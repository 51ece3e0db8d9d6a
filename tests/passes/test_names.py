"""What a site is called: the module path and the source line, however the model is put together."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from support import rewritten
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("no_grad")


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


LINE = inspect.getsourcelines(Attention.forward)[1] + 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attn(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.blocks = nn.Sequential(Layer(), nn.Sequential(nn.Identity(), Attention()))
        self.by_name = nn.ModuleDict({"left": Attention()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.by_name["left"](self.blocks(x))


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


INSIDE = ["layers.0.self_attn", "layers.1.self_attn", "blocks.0.self_attn", "blocks.1.1", "by_name.left"]


def names(fn: object, x: Tensor | None = None) -> list[str]:
    _, backend = rewritten(fn, torch.randn(1, 2, 8, 16) if x is None else x)  # type: ignore[arg-type]
    return [entry.site.name for entry in backend.report.entries]


def test_nested_modules() -> None:
    assert names(Wrapped(Model())) == [f"model.{name}" for name in INSIDE]


def test_the_outermost_module() -> None:
    assert names(Model()) == INSIDE


def test_a_module_that_is_the_attention_itself() -> None:
    assert names(Attention()) == ["(top level)"]


def test_a_bound_method() -> None:
    assert names(Model().forward) == INSIDE


def test_a_function_around_a_module() -> None:
    model = Model()
    assert [name.rpartition("model.")[2] for name in names(lambda x: model(x) * 2)] == INSIDE


MODEL = Model()


def test_a_function_around_a_global_module() -> None:
    assert names(lambda x: MODEL(x)) == [f"MODEL.{name}" for name in INSIDE]


def test_a_module_with_its_own_getattr() -> None:
    """As the models of diffusers have."""

    class Own(Model):
        def __getattr__(self, name: str) -> object:
            return super().__getattr__(name)

    assert names(Wrapped(Own())) == [f"model.{name}" for name in INSIDE]


def test_a_plain_function() -> None:
    assert names(lambda x: F.scaled_dot_product_attention(x, x, x)) == ["(top level)"]


def test_a_checkpointed_block() -> None:
    layers = nn.ModuleList([Layer(), Layer()])

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    assert names(Checkpointed()) == ["layers.0.self_attn", "layers.1.self_attn"]


def test_the_source_line_is_the_one_of_the_call() -> None:
    _, backend = rewritten(Model(), torch.randn(1, 2, 8, 16))
    assert {entry.site.source for entry in backend.report.entries} == {f"test_names.py:{LINE}"}
