"""Where a rewrite could be wrong or crash: transforms, subclasses, subgraphs, functions that have torch's names."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_kept, assert_no_site, assert_used, compiled, relative_error, rewritten
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

sdpa = F.scaled_dot_product_attention


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 24, 16)


def attend(x: Tensor) -> Tensor:
    return sdpa(x, x * 2, x)


def attend_unfused(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


@pytest.mark.parametrize("fn", [attend, attend_unfused])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_is_kept(x: Tensor, fn, dim: int) -> None:  # type: ignore[no-untyped-def]
    assert_kept(lambda x: torch.vmap(fn, in_dims=dim)(x), x, because="inside a torch.func transform")


def test_softmax_over_another_dim_inside_vmap(x: Tensor) -> None:
    fn = lambda x: torch.vmap(lambda x: (x @ x.mT / 8).softmax(-2) @ x)(x)  # noqa: E731
    actual, _ = compiled(fn, x)
    assert relative_error(actual, fn(x)) < 1e-5


def test_func_grad_is_kept(x: Tensor) -> None:
    fn = lambda x: torch.func.grad(lambda x: attend_unfused(x).sum())(x)  # noqa: E731
    assert_kept(fn, x, because="inside a torch.func transform")


def test_checkpointed_blocks(x: Tensor) -> None:
    fn = lambda x: checkpoint(attend, x, use_reentrant=False)  # noqa: E731
    assert_used(fn, x)
    assert_kept(fn, x.requires_grad_(), because="needs a gradient")


def test_branches(x: Tensor) -> None:
    fn = lambda x: torch.cond(x.sum() > -1e9, lambda x: attend(x).clone(), lambda x: x.sin(), (x,))  # noqa: E731
    assert_used(fn, x)
    assert_kept(fn, x.requires_grad_(), because="needs a gradient")


def test_an_autograd_function_is_left_to_its_author(x: Tensor) -> None:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return sdpa(x, x, x)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad

    assert_no_site(lambda x: Attention.apply(x), x.requires_grad_())


def test_a_subclass_that_wraps_tensors_is_kept(x: Tensor) -> None:
    _, backend = rewritten(attend, TwoTensor(x, x.clone()))
    assert backend.report.kept[0].decision.reason == "tensor type TwoTensor: needs torch.Tensor"


class Named(torch.Tensor):
    """A subclass without behaviour of its own."""


def test_a_plain_subclass(x: Tensor) -> None:
    out, _ = rewritten(attend, x.as_subclass(Named))
    assert relative_error(out, attend(x)) < 0.02


def test_a_parameter_as_query(x: Tensor) -> None:
    queries = nn.Parameter(x[:, :, :5].clone())
    with torch.no_grad():
        assert_used(lambda x: sdpa(queries, x, x), x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(x: Tensor) -> None:
    nested = torch.nested.nested_tensor([torch.randn(5, 4, 16), torch.randn(7, 4, 16)], layout=torch.jagged)

    def fn(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return sdpa(x, x, x).transpose(1, 2).values()

    out, backend = rewritten(fn, nested)
    assert not backend.report.used
    assert relative_error(out, fn(nested)) < 1e-6


def test_a_custom_op_named_softmax(x: Tensor) -> None:
    library = torch.library.Library("sagecompile_tests", "DEF")
    library.define("softmax(Tensor x, int dim) -> Tensor")
    library.impl("softmax", lambda x, dim: x * 0.1, "CPU")
    torch.library.register_fake("sagecompile_tests::softmax", lambda x, dim: torch.empty_like(x), lib=library)
    assert_no_site(lambda x: torch.ops.sagecompile_tests.softmax(x @ x.mT, -1) @ x, x)


@torch.compiler.allow_in_graph
def softmax(x: Tensor, dim: int) -> Tensor:
    return x * 0.1


def test_a_function_named_softmax(x: Tensor) -> None:
    assert_no_site(lambda x: softmax(x @ x.mT, -1) @ x, x)


def test_several_graphs(x: Tensor) -> None:
    def broken(x: Tensor) -> Tensor:
        x = attend(x)
        torch._dynamo.graph_break()
        return attend(x)

    backend = assert_used(broken, x, sites=2, tolerance=0.03)
    assert len(backend.graphs) == 2


def test_export_is_not_affected(x: Tensor) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attend(x)

    compiled(attend, x)
    program = torch.export.export(Model(), (x,))
    assert "scaled_dot_product_attention" in str(program.graph)


def test_unused_attention_inside_a_used_one(x: Tensor) -> None:
    def fn(x: Tensor) -> Tensor:
        _ = attend(x).sum()
        return attend_unfused(x / 4)

    assert_used(fn, x)


def test_a_mutated_result(x: Tensor) -> None:
    def fn(x: Tensor) -> Tensor:
        out = attend(x)
        out += 1
        out[:, :, 0] = 0
        return out

    assert_used(fn, x)


def test_a_query_written_between_two_sites(x: Tensor) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.clone()
        first = sdpa(y, y, y)
        y.mul_(0.5)
        return first + sdpa(y, y, y)

    assert_used(fn, x, sites=2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_what_eager_refuses_is_refused_alike(dtype: torch.dtype) -> None:
    x = torch.ones(1, 2, 9, 16, dtype=dtype)
    with pytest.raises(Exception):  # noqa: B017 (whatever eager raises)
        attend(x)
    with pytest.raises(Exception):  # noqa: B017
        rewritten(attend, x)
