"""The graph before and after: only the attention changed, nothing dead is left, and new nodes carry metadata."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import assert_used, rewritten
from torch import Tensor, nn

import sagecompile.passes as passes
from sagecompile.decide import Keep
from sagecompile.passes.graph import live_nodes, mutates


def block(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = F.linear(x, w).unflatten(-1, (3, 2, 16)).unbind(2)
    k, v = (item.transpose(1, 2).repeat_interleave(2, 1) for item in (k, v))
    q = torch.cat([q, q], 2).transpose(1, 2)
    scores = (q @ k.mT) * 0.25
    weights = F.softmax(scores + torch.full((8, 8), float("-inf")).triu(1), dim=-1)
    return F.gelu((weights @ v).transpose(1, 2).reshape(2, 8, 64)) + 1


GENERATOR = torch.Generator().manual_seed(0)
INPUTS = (torch.randn(2, 8, 32, generator=GENERATOR), torch.randn(96, 32, generator=GENERATOR) / 32**0.5)
REPLACED = {"repeat_interleave", "matmul", "mul", "full", "triu", "softmax", "getattr"}


def test_only_the_attention_changes() -> None:
    before = torch.fx.symbolic_trace(block)  # the calls that the model makes
    backend = assert_used(block, *INPUTS)
    calls = [getattr(node.target, "__name__", node.target) for node in before.graph.nodes if node.op.startswith("call")]
    untouched = [name for name in ("linear", "unflatten", "unbind", "cat", "reshape", "gelu") if name in calls]
    assert [name for name in backend.targets if name in untouched] == untouched
    assert backend.targets.count("attention.default") == 1
    assert not REPLACED & set(backend.targets)


def test_nothing_dead_is_left() -> None:
    (gm,) = assert_used(block, *INPUTS).graphs
    assert set(gm.graph.nodes) == live_nodes(gm.graph)


def test_every_node_has_an_example_value_like_its_real_one() -> None:
    (gm,) = assert_used(block, *INPUTS).graphs

    class Compare(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            real = super().run_node(node)
            if isinstance(real, torch.Tensor):
                fake = node.meta["example_value"]
                assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()), node
            return real

    order = [node.target for node in gm.graph.nodes if node.op == "placeholder"]
    Compare(gm).run(*(INPUTS[0] if "x" in str(name) else INPUTS[1] for name in order))


def test_new_nodes_carry_the_source_of_the_call() -> None:
    (gm,) = assert_used(block, *INPUTS).graphs
    (node,) = [node for node in gm.graph.nodes if "attention" in str(node.target)]
    assert "weights @ v" in node.meta["stack_trace"]


def test_a_kept_graph_is_not_touched() -> None:
    texts = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[object]) -> object:
        texts.append(str(gm.graph))
        passes.run(gm, lambda site: Keep("told so"))
        texts.append(str(gm.graph))
        return gm.forward

    torch.compile(block, backend=backend)(*INPUTS)
    assert texts[0] == texts[1]


def test_a_softmax_that_no_product_feeds_is_not_touched() -> None:
    _, backend = rewritten(lambda x: x.softmax(1), torch.randn(2, 3, 4))
    assert backend.targets == ["softmax"]


@pytest.mark.parametrize(
    "softmax",
    [
        lambda s: torch.softmax(s, 1, torch.float64),
        lambda s: torch.softmax(s, 1, dtype=torch.float64),
        lambda s: F.softmax(s, 1, 3, torch.float64),
        lambda s: torch.softmax(input=s, dim=-2).double(),
    ],
)
def test_a_shielded_softmax_keeps_its_dtype(softmax) -> None:  # type: ignore[no-untyped-def]
    fn = lambda q, v: softmax(q @ q.mT) @ v.double()  # noqa: E731
    inputs = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    actual, backend = rewritten(fn, *inputs)
    assert "transpose" in backend.targets
    torch.testing.assert_close(actual, fn(*inputs))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("x.add_(1)", True),
        ("x.add(1)", False),
        ("x.__setitem__(0, 1)", True),
        ("torch.add(x, 1, out=x)", True),
        ("F.relu(x, inplace=True)", True),
        ("F.relu(x)", False),
        ("F.relu_(x)", True),
        ("x & x", False),
        ("torch.ops.aten.add_.Tensor(x, x)", True),
        ("torch.ops.aten.add.Tensor(x, x)", False),
    ],
)
def test_which_calls_change_a_tensor(name: str, expected: bool) -> None:
    def fn(x: Tensor) -> Tensor:
        result = eval(name, {"x": x, "torch": torch, "F": F})
        return x if result is None else result

    gm = torch.fx.symbolic_trace(fn)
    (node,) = [node for node in gm.graph.nodes if node.op.startswith("call")]
    assert mutates(node) == expected


def test_forty_layers() -> None:
    def layers(x: Tensor) -> Tensor:
        for _ in range(40):
            x = F.scaled_dot_product_attention(x, x, x) + x
        return x

    assert_used(layers, torch.randn(1, 2, 9, 16) / 8, sites=40)


def test_dropout_of_other_layers_and_its_random_numbers_stay() -> None:
    model = nn.Dropout(0.5).train()
    fn = lambda x: F.scaled_dot_product_attention(x, x, x) * 0 + model(x)  # noqa: E731
    x = torch.randn(1, 2, 9, 16)
    torch.manual_seed(1)
    expected = fn(x)
    torch.manual_seed(1)
    actual, backend = rewritten(fn, x)
    assert len(backend.report.used) == 1
    assert torch.equal(actual, expected)


def test_the_folder_refuses_to_be_imported_by_its_own_name() -> None:
    code = "import passes"
    root = Path(passes.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode != 0
    assert "import it by that name" in done.stderr
