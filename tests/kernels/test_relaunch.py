"""Launches by C++ from an op's second call on: which calls are alike, and what the driver is given.

In: relaunch.cpp built for CPU tensors and ops of these tests, with a driver that writes down what it is asked. On a GPU
the ops of the project themselves.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from ctypes import CFUNCTYPE, POINTER, c_int, c_void_p
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sagecompile.formats import FORMATS
from sagecompile.kernels import compiler
from sagecompile.kernels.hopper import relaunch, runtime
from sagecompile.kernels.hopper.runtime import LaunchConfig
from sagecompile.ops.attention import IN_PYTHON, SCHEMAS

pytestmark = pytest.mark.skipif(compiler.why_none() is not None, reason=str(compiler.why_none()))

OPS = "sagetest_relaunch"
STREAM, COUNTS = 4321, 8000


class Driver:
    """What the C++ takes for CUDA's."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, tuple[int, ...], list[bytes]]] = []
        self.sizes: dict[int, list[int]] = {}
        """Of parameters, by function."""
        self.context, self.result = 1, 0
        launch_type = CFUNCTYPE(c_int, POINTER(LaunchConfig), c_void_p, POINTER(c_void_p), c_void_p)
        self.cuLaunchKernelEx = launch_type(self._launch)
        self.cuCtxGetCurrent = CFUNCTYPE(c_int, POINTER(c_void_p))(self._context)
        self.current_stream = CFUNCTYPE(c_int, ctypes.c_int32, POINTER(c_void_p))(self._stream)

    def _launch(self, config: Any, function: int, parameters: Any, extra: Any) -> int:
        given, asked = [ctypes.string_at(parameters[i], n) for i, n in enumerate(self.sizes[function])], config[0]
        where = asked.gridDimX, asked.gridDimY, asked.blockDimX, asked.sharedMemBytes, asked.hStream, asked.numAttrs
        self.launches.append((function, where, given))
        return self.result

    def _context(self, to: Any) -> int:
        to[0] = self.context
        return 0

    def _stream(self, device: int, to: Any) -> int:
        to[0] = STREAM
        return 0


class Ops:
    """The test's ops, whose Python leaves a plan of two launches."""

    def __init__(self, library: Any, driver: Driver) -> None:
        self.driver, self.library = driver, library
        self.calls = 0
        self.leaves, self.error = True, ""

    def python(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor | None:
        self.calls += 1
        if self.error:
            raise ValueError(self.error)
        out = rest[0] if len(rest) == 1 else torch.zeros_like(q.transpose(1, 2).contiguous()).transpose(1, 2)
        if self.leaves:
            tables = {(2, 8): "q_weight", (2, 16): "cos"} if len(rest) > 1 else {}
            self.driver.sizes |= {11: [24], 22: [8, 4, 24, 8]}
            first = relaunch.Launch(11, 7, 128, 1000, False, [bytes(24)], {(0, 0): "k", (0, 8): "v", (0, 16): "tiles"})
            second = relaunch.Launch(
                22, 9, 256, 0, True, [bytes(8), struct.pack("i", 5), bytes(24), bytes(8)],
                {(0, 0): "flags", (2, 0): "q", **(tables or {(2, 16): "out"}), (3, 0): "counts"},
            )  # fmt: skip
            relaunch.Plan(self.library, out, (48, 640, 64), [first, second]).leave()
        return None if len(rest) == 1 else out


@pytest.fixture(scope="module")
def ops() -> Iterator[Ops]:
    library = torch.library.Library(OPS, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.define(name + IN_PYTHON + schema)
    path = relaunch.build(f"-DOPS={OPS}", "-DDEVICE=CPU")
    driver = Driver()
    found = Ops(relaunch.load(path, driver, driver.current_stream), driver)
    relaunch.count_at(found.library, -1, "", COUNTS)
    for name in SCHEMAS:
        library.impl(name + IN_PYTHON, found.python, "CompositeExplicitAutograd")
    yield found


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    if "ops" in request.fixturenames:
        found = request.getfixturevalue("ops")
        found.calls, found.leaves, found.error = 0, True, ""
        found.driver.launches, found.driver.context, found.driver.result = [], 1, 0


HOW = {"scale": 0.125, "ahead": None, "format": "qk_int8_pv_fp8", "provider": "hopper", "tokens_first": True}


def tensors(seed: int = 0, length: int = 8, **how: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, 16, generator=generator).to(**how) for _ in range(3)]


def attention(*inputs: torch.Tensor, **how: Any) -> torch.Tensor:
    return getattr(torch.ops, OPS).attention(*inputs, **(HOW | how))


def test_the_second_call_is_launched_for_its_own_tensors(ops):
    attention(*tensors(0))
    assert ops.calls == 1 and not ops.driver.launches
    q, k, v = tensors(1)
    out = attention(q, k, v)
    assert ops.calls == 1
    assert (out.shape, out.stride(), out.dtype) == ((2, 3, 8, 16), (384, 16, 48, 1), torch.float32)
    (one, where_one, (pointers,)), (two, where_two, (flags, number, others, counts)) = ops.driver.launches
    assert (one, where_one) == (11, (7, 1, 128, 1000, STREAM, 0))
    assert (two, where_two) == (22, (9, 1, 256, 0, STREAM, 1))
    assert struct.unpack("PPP", pointers)[:2] == (k.data_ptr(), v.data_ptr())
    assert struct.unpack("PPP", others) == (q.data_ptr(), 0, out.data_ptr())
    assert struct.unpack("i", number) == (5,) and struct.unpack("P", counts) == (COUNTS,)
    tiles, flags = struct.unpack("P", pointers[16:]) + struct.unpack("P", flags)
    assert tiles and flags - tiles >= 640 and tiles % 16 == flags % 16 == 0


def test_optional_tensors_and_a_plan_that_python_forgot(ops):
    q, k, v = tensors()
    weight, cos, sin = torch.ones(16), *torch.rand(2, 1, 8, 16)
    how = HOW | {"q_eps": 1e-6, "k_eps": None, "q_rope": "half", "k_rope": "half"}
    for _ in range(2):
        getattr(torch.ops, OPS).qk_norm_rope_attention(q, k, v, weight, None, cos, sin, **how)
    assert ops.calls == 1
    assert struct.unpack("PPP", ops.driver.launches[1][2][2]) == (q.data_ptr(), weight.data_ptr(), cos.data_ptr())


def test_a_tensor_that_is_there_is_written(ops):
    q, k, v = tensors()
    how = {name: value for name, value in HOW.items() if name not in ("tokens_first", "ahead")}
    into = getattr(torch.ops, OPS).attention_into
    for out in (torch.empty_like(q), torch.empty_like(q)):
        assert into(q, k, v, out, **how, ahead=3) is None
    assert ops.calls == 1
    assert struct.unpack("PPP", ops.driver.launches[1][2][2]) == (q.data_ptr(), 0, out.data_ptr())
    into(q, k, v, out, **how, ahead=4)
    assert ops.calls == 2


def test_sites_share_a_plan_and_each_is_counted_by_itself(ops):
    """Python is asked where a site's calls are counted, once for each."""
    attention(*tensors(length=26))
    for site in ("layers.0.self_attn", "layers.1.self_attn"):
        calls = ops.calls
        attention(*tensors(length=26), site=site)
        assert ops.calls == calls + 1 and not ops.driver.launches
    relaunch.count_at(ops.library, -1, "layers.0.self_attn", 16)
    relaunch.count_at(ops.library, -1, "layers.1.self_attn", 48)
    for length in (26, 27):
        attention(*tensors(length=length))
        ops.calls = 0
        ops.driver.launches.clear()
        for site in ("layers.1.self_attn", "layers.0.self_attn", "layers.1.self_attn"):
            attention(*tensors(length=length), site=site)
        found = [struct.unpack("P", given[-1]) for function, _, given in ops.driver.launches if function == 22]
        assert ops.calls == 0 and found == [(48,), (16,), (48,)]
    relaunch.count_at(ops.library, 0, "layers.2.self_attn", 80)
    attention(*tensors(length=26), site="layers.2.self_attn")
    assert ops.calls == 1, "that was another device's"


UNLIKE: dict[str, Callable[[], torch.Tensor]] = {
    "length": lambda: attention(*tensors(length=9)),
    "dtype": lambda: attention(*tensors(dtype=torch.bfloat16)),
    "strides": lambda: attention(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors())),
    "alignment": lambda: attention(torch.randn(2 * 3 * 8 * 16 + 1)[1:].view(2, 3, 8, 16), *tensors()[1:]),
    "scale": lambda: attention(*tensors(), scale=0.25),
    "no scale": lambda: attention(*tensors(), scale=None),
    "causal": lambda: attention(*tensors(), ahead=0),
    "format": lambda: attention(*tensors(), format="qk_int8_pv_fp16"),
    "a longer name": lambda: attention(*tensors(), provider="hopper, and more than eight letters"),
    "no name": lambda: attention(*tensors(), provider=""),
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_python_does_what_is_not_alike_once(ops, unlike):
    attention(*tensors())
    calls = ops.calls
    ops.driver.launches.clear()
    UNLIKE[unlike]()
    assert ops.calls == calls + 1 and not ops.driver.launches
    UNLIKE[unlike]()
    assert ops.calls == calls + 1 and len(ops.driver.launches) == 2


def test_what_leaves_no_plan_stays_with_python(ops):
    ops.leaves = False
    for _ in range(2):
        attention(*tensors(length=21))
    assert ops.calls == 2 and not ops.driver.launches


def test_a_gradient_is_pythons_to_refuse(ops):
    q, k, v = tensors(length=22)
    for _ in range(2):
        attention(q, k, v)
    q.requires_grad_(True)
    with torch.no_grad():
        attention(q, k, v)
    assert ops.calls == 1
    attention(q, k, v)
    assert ops.calls == 2


def test_a_thread_without_context_goes_to_python(ops):
    attention(*tensors(length=23))
    ops.driver.context = None
    attention(*tensors(length=23))
    assert ops.calls == 2 and not ops.driver.launches


def test_errors_of_both_sides(ops):
    ops.error = "bad format"
    with pytest.raises(ValueError, match="bad format"):
        attention(*tensors(length=24))
    ops.error = ""
    attention(*tensors(length=24))
    ops.driver.result = 700
    with pytest.raises(RuntimeError, match=r"could not be launched on cpu \(CUDA error 700\)"):
        attention(*tensors(length=24))


def test_threads_at_once(ops):
    """Each launch has the addresses of one call."""
    attention(*tensors(length=25))
    mine: list[set[tuple[int, int]]] = [set() for _ in range(4)]

    def work(seen: set[tuple[int, int]], seed: int) -> None:
        _, k, v = kept = tensors(seed, length=25)
        seen.add((k.data_ptr(), v.data_ptr()))
        for _ in range(50):
            attention(*kept)
        seen.add((kept[0].data_ptr(), 0))  # kept until here

    threads = [threading.Thread(target=work, args=(seen, i)) for i, seen in enumerate(mine)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    firsts = [struct.unpack("PP", given[0][:16]) for function, _, given in ops.driver.launches if function == 11]
    assert ops.calls == 1 and len(firsts) == 200
    assert set(firsts) <= set().union(*mine)


def compiled(**metadata: Any) -> Any:
    names = {"Q": "*bf16", "length": "i32", "one": "constexpr", "stride": "i64", "scale": "fp32", "ROWS": "constexpr"}
    plain = {"num_warps": 8, "num_ctas": 1, "shared": 512, "global_scratch_size": 0, "profile_scratch_size": 0}
    src = SimpleNamespace(fn=SimpleNamespace(arg_names=list(names)), signature=names)
    return SimpleNamespace(src=src, function=99, metadata=SimpleNamespace(**(plain | metadata)))


VALUES = ("q", 1000, 1, 1 << 40, 0.5, 64)


def test_a_triton_kernel_as_cuda_takes_it(monkeypatch):
    monkeypatch.setattr(relaunch, "parameter_sizes", {99: [8, 4, 8, 4, 8, 8]}.get)
    found = relaunch.of_triton(compiled(), 12, VALUES, overlap=True)
    assert found == relaunch.Launch(
        99, 12, 256, 512, True,
        [bytes(8), struct.pack("i", 1000), struct.pack("q", 1 << 40), struct.pack("f", 0.5), bytes(8), bytes(8)],
        {(0, 0): "q"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "metadata"),
    [([8, 4, 8, 4, 8], {}), ([8, 4, 8, 4, 8, 8], {"global_scratch_size": 16}), ([8, 4, 8, 4, 8, 8], {"num_ctas": 2})],
)
def test_a_triton_kernel_that_is_not_as_expected(sizes, metadata, monkeypatch, caplog):
    monkeypatch.setattr(relaunch, "parameter_sizes", lambda function: sizes)
    relaunch._say_that_python_launches.cache_clear()
    assert relaunch.of_triton(compiled(**metadata), 12, VALUES, overlap=True) is None
    assert "Python launches it: Triton's kernels" in caplog.text


def test_sizes_of_parameters_are_the_drivers(monkeypatch):
    def info(function: Any, index: Any, offset: Any, size: Any) -> int:
        if index.value == 2:
            return 1
        size._obj.value = (8, 4)[index.value]
        return 0

    monkeypatch.setattr(runtime, "_driver", lambda: SimpleNamespace(cuFuncGetParamInfo=info))
    assert runtime.parameter_sizes(99) == [8, 4]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
class TestOnGpu:
    """The project's own ops."""

    @pytest.fixture(autouse=True)
    def loaded(self) -> None:
        relaunch.LIBRARY.now()
        compiler.settle()
        assert relaunch.LIBRARY.now() is not None

    @staticmethod
    def inputs(seed: int, length: int = 700, heads: int = 4, kv_heads: int = 2, head_dim: int = 128, **how: Any) -> Any:
        generator = torch.Generator("cuda").manual_seed(seed)
        shapes = [(2, length, h, head_dim) for h in (heads, kv_heads, kv_heads)]
        make = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
        return [torch.randn(shape, **(make | how)).transpose(1, 2) for shape in shapes]

    @staticmethod
    def called(op: Any, *given: Any, **how: Any) -> tuple[int, torch.Tensor]:
        """How often that was Python's, and the result."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = op(*given, **how)
        return sum(event.name.endswith(IN_PYTHON) for event in profile.events()), found

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
    def test_the_same_numbers(self, format, is_causal, head_dim):
        how, ours = HOW | {"format": format, "ahead": 0 if is_causal else None}, torch.ops.sagecompile
        for seed in (1, 2, 3):
            inputs = self.inputs(seed, head_dim=head_dim)
            by_python, found = self.called(ours.attention, *inputs, **how)
            assert by_python == (seed == 1)
            expected = ours.attention_in_python(*inputs, **how)
            assert torch.equal(found, expected) and found.stride() == expected.stride()

    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("rope", ["half", "interleaved"])
    def test_prologues(self, norm, rope):
        ours, eps = torch.ops.sagecompile, 1e-6 if norm else None
        how = HOW | {"q_eps": eps, "k_eps": eps, "q_rope": rope, "k_rope": rope}
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            weights = [torch.rand(128, device="cuda", dtype=torch.bfloat16) if norm else None for _ in "qk"]
            given = (*self.inputs(seed), *weights, *torch.rand(2, 1, 700, 128, device="cuda"))
            by_python, found = self.called(ours.qk_norm_rope_attention, *given, **how)
            assert by_python == (seed == 1)
            assert torch.equal(found, ours.qk_norm_rope_attention_in_python(*given, **how))

    def test_into_a_tensor_that_is_there(self):
        """The last queries of a prompt, as vLLM has them."""
        ours, how = torch.ops.sagecompile, {name: value for name, value in HOW.items() if name != "tokens_first"}
        for seed in (1, 2, 3):
            q, k, v = self.inputs(seed, 611)
            out, expected = (torch.full_like(q[:, :, 200:], float("nan")) for _ in range(2))
            given = {**how, "ahead": 200}
            by_python, _ = self.called(ours.attention_into, q[:, :, 200:], k, v, out, **given)
            assert by_python == (seed == 1)
            ours.attention_into_in_python(q[:, :, 200:], k, v, expected, **given)
            assert torch.equal(out, expected) and not out.isnan().any()

    def test_rows_that_need_exact_ones(self):
        ours = torch.ops.sagecompile
        ours.attention(*self.inputs(1, 333), **HOW)
        q, k, v = self.inputs(2, 333)
        q[0, 1, 100] = float("nan")
        k[1, 0, 5] = float("inf")
        found, expected = ours.attention(q, k, v, **HOW), ours.attention_in_python(q, k, v, **HOW)
        assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)

    @pytest.mark.parametrize("aligned", [True, False])
    def test_rows_that_need_exact_ones_behind_norm_and_rope(self, aligned):
        """Tables that are not aligned must be copied, which is Python's."""
        op, how = torch.ops.sagecompile.qk_norm_rope_attention, {"q_eps": 1e-6, "k_eps": 1e-6}
        how |= HOW | {"q_rope": "half", "k_rope": "half", "ahead": 0}
        for seed in (1, 2, 3):
            q, k, v = self.inputs(seed, 444)
            q[1, 2, 100 * seed] *= 3000
            k[0, 1, 130 * seed, 5] = float("inf")
            turns = [torch.rand(1, 444, 129, device="cuda")[..., :128] if not aligned else x for x in self.turns(seed)]
            by_python, found = self.called(op, q, k, v, None, None, *turns, **how)
            assert by_python == (seed == 1 or not aligned)
            expected = torch.ops.sagecompile.qk_norm_rope_attention_in_python(q, k, v, None, None, *turns, **how)
            assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)

    @staticmethod
    def turns(seed: int) -> torch.Tensor:
        return torch.rand(2, 1, 444, 128, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")

    def test_another_stream_and_thread_and_a_graph(self):
        ours = torch.ops.sagecompile
        ours.attention(*self.inputs(1, 555), **HOW)
        inputs = self.inputs(2, 555)
        expected, found = ours.attention_in_python(*inputs, **HOW), []
        torch.cuda.synchronize()

        def work() -> None:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                found.extend(ours.attention(*inputs, **HOW) for _ in range(3))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        torch.cuda.synchronize()
        assert all(torch.equal(one, expected) for one in found) and len(found) == 3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ours.attention(*inputs, **HOW)
        captured.fill_(0)
        graph.replay()
        assert torch.equal(captured, expected)
