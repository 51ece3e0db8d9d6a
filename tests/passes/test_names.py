"""What a site is called: the module path and the source line, however the model is put together."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Rewriter, rewritten
from torch import Tensor, nn

from sagecompile import explain, report
from sagecompile.passes.names import module_path

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


# However Dynamo comes to the module, the name is the one that `named_modules()` of the outermost module has for it.


def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As Transformers' @can_return_tuple and @merge_with_config_defaults: Dynamo finds the module in the arguments."""
    return functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


class Decorated(Model):
    forward = decorated(Model.forward)


class Proxy(nn.Module):
    """Like PEFT's models and FSDP's wrappers: what it does not have itself, the model inside has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)


class Reaching(Wrapped):
    """Uses a proxy's modules through its __getattr__."""

    forward = Model.forward

    def __getattr__(self, name: str) -> object:
        found = super().__getattr__
        return getattr(found("model"), name) if name in ("layers", "blocks", "by_name") else found(name)


class Pipeline:
    """Not a module, but callable."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


def patched(model: nn.Module, wrap: Callable[..., Any]) -> nn.Module:
    """Its forward replaced on the instance, as accelerate's hooks do it."""
    model.forward = wrap(model.forward)
    return model


def patched_inside(model: Model) -> Model:
    for layer in model.layers:
        patched(layer, functools.partial)
    return model


def closed_over(held: Any, call: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: call(held, x)


WAYS: dict[str, Callable[[], Callable[..., Any]]] = {
    "a decorated forward": Decorated,
    "a bound method": lambda: Model().forward,
    "a decorated bound method": lambda: Decorated().forward,
    "a partial": lambda: functools.partial(Model()),
    "a partial of a bound method": lambda: functools.partial(Decorated().forward),
    "a partial with the model as argument": lambda: functools.partial(lambda model, x: model(x), Model()),
    "a partial with the model by keyword": lambda: functools.partial(lambda x, model: model(x), model=Model()),
    "a default": lambda: lambda x, model=Model(): model(x),  # noqa: B008
    "a closure": lambda: closed_over(Model(), lambda model, x: model(x)),
    "a closure on a bound method": lambda: closed_over(Decorated().forward, lambda forward, x: forward(x)),
    "a wrapped bound method": lambda: decorated(Model().forward),
    "a closure on a list": lambda: closed_over([Model()], lambda held, x: held[0](x)),
    "a closure on a dict": lambda: closed_over({"unet": (0, Decorated())}, lambda held, x: held["unet"][1](x)),
    "functional_call": lambda: closed_over(Model(), lambda model, x: torch.func.functional_call(model, {}, (x,))),
    "a callable object": lambda: Pipeline(Model()),
    "its method": lambda: Pipeline(Decorated()).__call__,
    "a class with a closure": lambda: type("Any", (), {"__call__": lambda self, x, model=Model(): model(x)})(),  # noqa: B008
    "a forward replaced by a closure": lambda: patched(Model(), decorated),
    "a forward replaced by a partial": lambda: patched(Decorated(), functools.partial),
    "layers whose forward is replaced": lambda: patched_inside(Model()),
    "a model with hooks": lambda: hooked(Model()),
    "a model that was compiled before": lambda: closed_over(torch.compile(Model(), backend="eager"), lambda m, x: m(x)),
}


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda module, inputs: inputs)
    model.register_forward_hook(lambda module, inputs, output: output)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_however_dynamo_comes_to_the_model(way: str) -> None:
    assert names(WAYS[way]()) == INSIDE


@pytest.mark.parametrize("way", WAYS)
def test_explain_says_the_same(way: str) -> None:
    found = explain(WAYS[way](), torch.randn(1, 2, 8, 16))
    assert [entry.site.name for entry in found.entries] == INSIDE


def test_explain_of_a_function_with_a_global_model() -> None:
    """Dynamo reaches that through `__import_test_names`, as it is not a global of what it compiles."""
    for call in (lambda x: MODEL(x), lambda x: torch.func.functional_call(MODEL, {}, (x,))):
        assert [entry.site.name for entry in explain(call, torch.randn(1, 2, 8, 16)).entries] == INSIDE


@pytest.mark.parametrize("way", ["torch.compile", "Module.compile"])
def test_the_compilation_itself(way: str) -> None:
    model, options = Decorated(), {"sage.policy": "never"}
    torch._dynamo.reset()
    with report.recording() as reports:
        if way == "Module.compile":
            model.compile(backend="sage_inductor", options=options)
            model(torch.randn(1, 2, 8, 16))
        else:
            torch.compile(model, backend="sage_inductor", options=options)(torch.randn(1, 2, 8, 16))
    assert [entry.site.name for found in reports for entry in found.entries] == INSIDE


def test_a_layer_compiled_on_its_own() -> None:
    """Says what the layer calls it: of what is around it Dynamo knows nothing."""
    by_hand = lambda layer, backend: setattr(layer, "forward", torch.compile(layer.forward, backend=backend))  # noqa: E731
    for compile_it in (nn.Module.compile, by_hand):
        torch._dynamo.reset()
        model, backend = Decorated(), Rewriter()
        compile_it(model.layers[1], backend=backend)
        model(torch.randn(1, 2, 8, 16))
        assert [entry.site.name for entry in backend.report.entries] == ["self_attn"]


def test_layers_that_were_compiled_before() -> None:
    """Regional compilation, and then the whole model: `_orig_mod` is the compiler's, not the user's."""
    model = Decorated()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert names(model) == INSIDE


@pytest.mark.parametrize("inner", [Model, Decorated])
def test_wrappers(inner: type[Model]) -> None:
    expected = {
        nn.DataParallel(inner(), device_ids=[]): "module.",
        Proxy(inner()): "base_model.",
        Proxy(Proxy(inner())): "base_model.base_model.",
        nn.Sequential(inner()): "0.",
        Wrapped(Proxy(inner())): "model.base_model.",
        Reaching(Proxy(inner())): "model.base_model.",
    }
    for model, before in expected.items():
        found = names(model)
        assert found == [f"{before}{name}" for name in INSIDE]
        assert all(isinstance(model.get_submodule(name), Attention) for name in found)


def test_modules_in_containers_that_are_no_modules() -> None:
    """The outermost module has no name for them; they are called by where it keeps them."""

    class Keeping(Decorated):
        def __init__(self) -> None:
            super().__init__()
            self.kept = {"left": [Decorated()], 7: Attention()}
            self.same = (self.layers, {("a", 1): self.layers[1]})

        @decorated
        def forward(self, x: Tensor) -> Tensor:
            x = self.kept[7](self.kept["left"][0](x))
            return self.same[0][0](self.same[1][("a", 1)](x))

    own = [f"kept.left.0.{name}" for name in INSIDE]
    assert names(Keeping()) == [*own, "kept.7", "layers.1.self_attn", "layers.0.self_attn"]


def test_modules_that_are_asked_for_by_name() -> None:
    class Asking(Decorated):
        @decorated
        def forward(self, x: Tensor) -> Tensor:
            for name in ("layers.0.self_attn", "blocks.1.1"):
                x = self.get_submodule(name)(x)
            for layer in self.layers.children():
                x = layer(x)
            return getattr(self, "by_" + "name")["left"](x)

    assert names(Asking()) == ["layers.0.self_attn", "blocks.1.1", INSIDE[0], INSIDE[1], "by_name.left"]


def test_a_layer_that_is_called_again_and_again() -> None:
    """As ALBERT's: one module, one name."""

    class Repeating(Decorated):
        @decorated
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.layers[0](x)
            return x

    assert names(Repeating()) == ["layers.0.self_attn"] * 3


HELD = {"unet": [Decorated()]}
PIPELINE = Pipeline(Decorated())
CALL = functools.partial(Decorated().forward)


def test_globals_that_hold_a_model() -> None:
    assert names(lambda x: HELD["unet"][0](x)) == [f"HELD.unet.0.{name}" for name in INSIDE]
    assert names(lambda x: PIPELINE(x)) == [f"PIPELINE.model.{name}" for name in INSIDE]
    assert names(lambda x: CALL(x)) == [f"CALL.{name}" for name in INSIDE]
    attention = names(lambda x: torch.func.functional_call(MODEL, {}, (x,)))
    assert attention == [f"MODEL.{name}" for name in INSIDE]


def test_without_a_frame() -> None:
    """A graph that is read after Dynamo is done with it: what the expression says."""
    _, backend = rewritten(Decorated(), torch.randn(1, 2, 8, 16), policy="never")
    calls = [node for node in backend.graphs[0].graph.nodes if node.target is F.scaled_dot_product_attention]
    assert [module_path(node).removeprefix("0.") for node in calls] == INSIDE
