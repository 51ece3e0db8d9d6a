"""The CPU kernel against attention in float64 and, where it leaves a head to SDPA, against SDPA.

In: a grid of shapes with the reason for each, layouts, special values, threads. Out: the relative L2 error.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sagecompile.errors import UnsupportedError
from sagecompile.kernels import compiler, cpu
from sagecompile.kernels.call import Call
from sagecompile.kernels.cpu import build
from tests.support import ACCURATE, TOLERANCE, exact_attention, relative_error

HERE = pytest.mark.skipif(build.why_not() is not None, reason=f"the CPU kernel cannot run here: {build.why_not()}")

LENGTHS = {
    1: "a single token",
    9: "fewer than the 12 queries and 32 keys of the micro-kernel",
    12: "exactly its queries",
    13: "one query more",
    63: "one less than a block of K",
    64: "exactly one block",
    65: "one token in the second block",
    96: "the most queries of a block",
    97: "one query in the second block",
    255: "one less than a tile of keys",
    257: "one key in the second tile",
    700: "a prompt; no power of two near",
    1001: "odd, several tiles",
    1025: "K's mean comes from every fifth token",
}
PAIRS = {
    (1, 2048): "decoding",
    (64, 700): "more keys than queries",
    (700, 64): "more queries than keys: causal rows past the last key",
    (129, 1001): "both odd",
    (1001, 1): "one key: the result is V",
}
HEAD_DIMS = {
    1: "the narrowest",
    3: "less than a word of 4 INT8",
    8: "less than a vector",
    33: "one dimension in the second panel of V, and in the third vector",
    40: "not a multiple of 16",
    64: "usual",
    72: "not a multiple of 32",
    80: "a multiple of 16 alone",
    96: "three panels of V",
    128: "usual",
    256: "the widest: scores stay below 2^22",
}


@pytest.fixture(params=["bf16", "float32"])
def pv(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PV in bfloat16, if this CPU can, and in float32, as on CPUs that cannot."""
    if request.param == "bf16" and "avx512_bf16" not in build.features():
        pytest.skip("needs a CPU with avx512_bf16")
    kernel = build.function(bf16=request.param == "bf16")
    monkeypatch.setattr(cpu, "function", lambda: kernel)


def inputs(batch=1, q_heads=2, kv_heads=2, q_len=700, kv_len=700, dim=64, dtype=torch.float32):
    """q: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D); K has a bias of 3 on every channel."""
    q = torch.randn(batch, q_heads, q_len, dim).to(dtype)
    k = (torch.randn(batch, kv_heads, kv_len, dim) + 3 * torch.randn(dim).sign()).to(dtype)
    v = torch.randn(batch, kv_heads, kv_len, dim).to(dtype)
    return q, k, v


def attend(q, k, v, *, causal=False, scale=None, out=None, offset=0):
    """The kernel's result; `out` starts as NaN, and q, k and v must not change."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    out.fill_(float("nan"))
    before = [x.clone() for x in (q, k, v)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cpu.attention(Call(q, k, v, scale, offset if causal else None), out, format=ACCURATE)
    for x, copy in zip((q, k, v), before, strict=True):
        assert torch.equal(x.nan_to_num(7), copy.nan_to_num(7)), "an input was modified"
    return out


def sdpa(q, k, v, *, causal=False, scale=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


def assert_accurate(q, k, v, *, causal=False, scale=None, out=None):
    result = attend(q, k, v, causal=causal, scale=scale, out=out)
    error = relative_error(result, exact_attention(q, k, v, is_causal=causal, scale=scale))
    assert error <= TOLERANCE[ACCURATE]
    return result


@HERE
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(pv, length, dim, causal):
    assert_accurate(*inputs(q_len=length, kv_len=length, dim=dim), causal=causal)


@HERE
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), PAIRS)
def test_unequal_lengths(pv, q_len, kv_len, causal):
    assert_accurate(*inputs(q_len=q_len, kv_len=kv_len, dim=96), causal=causal)


@HERE
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(pv, dim, causal):
    assert_accurate(*inputs(dim=dim, batch=2, q_len=300, kv_len=300), causal=causal)


@HERE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_groups_and_dtypes(pv, group, dtype):
    q, k, v = inputs(batch=2, q_heads=2 * group, kv_heads=2, q_len=301, kv_len=301, dim=128, dtype=dtype)
    assert_accurate(q, k, v, causal=True)


def tokens_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_apart(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def with_offset(x):
    larger = x.new_full((x.shape[0], x.shape[1], x.shape[2] + 5, x.shape[3] + 3), float("nan"))
    larger[:, :, 5:, 3:] = x
    return larger[:, :, 5:, 3:]


def every_other(x):
    larger = x.new_full((*x.shape[:3], 2 * x.shape[3]), float("nan"))
    larger[..., ::2] = x
    return larger[..., ::2]


def one_head_expanded(x):
    return x[:, :1].expand_as(x)


def one_token_expanded(x):
    return x[:, :, :1].expand_as(x)


LAYOUTS = (tokens_first, channels_apart, with_offset, every_other, one_head_expanded, one_token_expanded)


@HERE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    q, k, v = inputs(batch=2, q_heads=4, kv_heads=4, q_len=301, kv_len=301, dim=72, dtype=dtype)
    assert_accurate(*map(layout, (q, k, v)), causal=True)


@HERE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [tokens_first, channels_apart])
def test_output_strides(layout, dtype):
    q, k, v = inputs(batch=2, q_len=301, kv_len=301, dim=72, dtype=dtype)
    assert_accurate(q, k, v, out=layout(torch.empty_like(q)))


@HERE
def test_a_stray_write_is_seen():
    """Nothing but `out` is written: its neighbours in memory keep their value."""
    q, k, v = inputs(q_len=77, kv_len=77, dim=40)
    around = torch.full((1, 2, 79, 42), 5.0)
    assert_accurate(q, k, v, out=around[:, :, 1:-1, 1:-1])
    around[:, :, 1:-1, 1:-1] = 5.0
    assert (around == 5.0).all()


@HERE
@pytest.mark.parametrize("scale", [0.0, -0.125, 1.0, 1e-6, 1e-38])
def test_scales(pv, scale):
    q, k, v = inputs(dim=8)
    # A uniform softmax averages N(0,1) to nearly nothing, which no relative error can be measured against.
    assert_accurate(q, k, v + 1.0, scale=scale)


@HERE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1.0, -3e-7, 65504.0])
def test_constant_inputs(pv, fill, causal, dtype):
    q, k, v = (torch.full_like(x, fill) for x in inputs(q_len=200, kv_len=200, dtype=dtype))
    torch.testing.assert_close(attend(q, k, v, causal=causal), v, rtol=4e-3, atol=0)


@HERE
def test_constant_v(pv):
    """The weights are divided by the sum of what they were rounded to, so that a constant comes out as it went in."""
    q, k, v = inputs(dtype=torch.float16)
    v.fill_(65504.0)
    assert torch.equal(attend(q, k, v), v)


@HERE
def test_outlier_channel_of_k(pv):
    """The mean takes a constant outlier away, however large."""
    q, k, v = inputs()
    k[..., 7] += 1e4
    assert_accurate(q, k, v)


@HERE
def test_outlier_rows(pv):
    """Rows of Q, blocks of K, channels of V and whole heads cannot spoil their neighbours."""
    q, k, v = inputs(dim=128)
    expected = exact_attention(q, k, v)
    q[:, :, 5], v[..., 9], v[:, 1] = 30 * q[:, :, 5], 1e6 * v[..., 9], 1e6 * v[:, 1]
    result = attend(q, k, v)
    rows, channels = torch.arange(700) != 5, torch.arange(128) != 9
    assert relative_error(result[:, 0][:, rows][..., channels], expected[:, 0][:, rows][..., channels]) <= 0.02
    assert relative_error(result[:, 1][:, rows], exact_attention(q, k, v)[:, 1][:, rows]) <= 0.02


@HERE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gain", [30.0, 1e3])
def test_steep_scores(gain, dtype):
    """Scores so large that INT8 rounding would pick the wrong key: such heads are SDPA's, others are not."""
    q, k, v = inputs(q_heads=4, kv_heads=2, dtype=dtype)
    q[:, 2] *= gain
    k[:, 1] *= 10
    result = attend(q, k, v)
    torch.testing.assert_close(result[:, 2], sdpa(q, k, v)[:, 2])
    assert relative_error(result[:, :2], exact_attention(q, k, v)[:, :2]) <= TOLERANCE[ACCURATE]


@HERE
def test_far_apart_scores_take_no_longer():
    """Weights below 2^-126 are as many as the others here; each product with one would take a hundred times as long."""
    q, k, v = inputs(batch=2, q_heads=8, kv_heads=8, q_len=512, kv_len=512, dim=64)
    gains, out = (1.0, 16.0, 40.0), torch.empty_like(q)
    times = {gain: [] for gain in gains}
    attend(q, k, v)
    compiler.settle()
    for _, gain in product(range(12), gains):
        start = time.perf_counter()
        cpu.attention(Call(gain * q, k, v, 0.125), out, format=ACCURATE)
        times[gain].append(time.perf_counter() - start)
    assert max(min(times[16.0]), min(times[40.0])) < 5 * min(times[1.0])  # 2 by itself: all rows are exact
    for gain in gains:
        assert relative_error(attend(gain * q, k, v), exact_attention(gain * q, k, v)) < 0.2


@HERE
def test_without_its_ops_python_calls_the_kernel(monkeypatch, caplog):
    def refuse():
        raise UnsupportedError("no headers")

    library = compiler.Background(refuse, None, "each attention of a CPU takes longer")
    monkeypatch.setattr(cpu, "OPS_LIBRARY", library)
    q, k, v = inputs()
    for _ in range(2):
        assert relative_error(attend(q, k, v), exact_attention(q, k, v)) <= TOLERANCE[ACCURATE]
        compiler.settle()
    assert library.now() is None and caplog.text.count("takes longer: no headers") == 1


@HERE
@pytest.mark.parametrize("threads", [1, 3])
def test_the_callers_own_denormals_stay(threads):
    """A kernel may set its threads to take them for 0, but must set them back."""
    q, k, v = inputs(q_len=300, kv_len=300)
    before, tiny = torch.get_num_threads(), torch.full((1 << 20,), 1e-40)
    torch.set_num_threads(threads)
    try:
        attend(q, k, v)
        assert (tiny * 0.5 > 0).all()
    finally:
        torch.set_num_threads(before)


@HERE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("causal", [False, True])
def test_not_finite(causal, where, value, dtype):
    """The heads that hold the value are SDPA's; the others keep their accuracy."""
    q, k, v = inputs(q_heads=4, kv_heads=2, q_len=200, kv_len=230, dtype=dtype)
    clean = exact_attention(q, k, v, is_causal=causal)
    {"q": q, "k": k, "v": v}[where][0, 1, 100, 5] = value
    result, expected = attend(q, k, v, causal=causal), sdpa(q, k, v, causal=causal)
    touched = [1] if where == "q" else [2, 3]
    torch.testing.assert_close(result[:, touched], expected[:, touched], equal_nan=True)
    others = [head for head in range(4) if head not in touched]
    assert relative_error(result[:, others], clean[:, others]) <= TOLERANCE[ACCURATE]


@HERE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e6, 1e28, 3e38])
def test_large_values(size, dtype):
    """Past float16's range, near the most that is summed in float32, and near the most that it holds: SDPA's again."""
    q, k, v = inputs(dtype=dtype)
    v = (v.sign() * size).to(dtype)
    result = attend(q, k, v)
    if size < 1e29:
        assert relative_error(result, exact_attention(q, k, v)) <= TOLERANCE[ACCURATE]
    else:
        torch.testing.assert_close(result, sdpa(q, k, v), equal_nan=True)


@HERE
def test_no_difference_between_thread_counts():
    q, k, v = inputs(batch=2, q_heads=6, kv_heads=3, q_len=333, kv_len=517)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, before):
            torch.set_num_threads(threads)
            results.append(attend(q, k, v, causal=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@HERE
def test_called_from_many_threads():
    """Each Python thread has OpenMP threads of its own; the GIL is released meanwhile."""
    q, k, v = inputs(q_len=200, kv_len=200)
    expected, results = attend(q, k, v), []
    threads = [threading.Thread(target=lambda: results.append(attend(q, k, v))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


@HERE
def test_shares_the_openmp_threads_of_torch():
    """A second OpenMP runtime would have threads of its own, and twice as many as cores would spin."""
    script = """
import os, torch
from sagecompile.kernels import cpu
from sagecompile.kernels.call import Call
from sagecompile.kernels.cpu.build import OPS_LIBRARY
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
OPS_LIBRARY.now()  # in a thread that waits from then on
x, out = torch.ones(1).expand(1, 2, 512, 64), torch.empty(1, 2, 512, 64)
started = threads()
cpu.attention(Call(x, x, x, 1.0), out, format="qk_int8_pv_fp16")
ours = threads()
torch.ones(1 << 22).exp()
print(ours - started, threads() - ours)
maps = {line.split()[-1].rpartition("/")[2] for line in open("/proc/self/maps")}
print([name for name in sorted(maps) if name.startswith(("libgomp", "libomp", "libiomp"))])
"""
    counts, libraries = _run(script).splitlines()
    assert counts == "2 0"
    assert libraries.count(".so") == 1


def _run(script: str, **env: str) -> str:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@HERE
def test_token_offsets_past_32_bits():
    """Tokens 2^24 elements apart: the last start beyond 2^31. The memory is reserved, and nearly none is touched."""
    tokens, stride, dim = 140, 2**24, 64
    storage = torch.empty(tokens * stride, dtype=torch.bfloat16)
    q, k, v, out = (storage.as_strided((1, 1, tokens, dim), (stride, stride, stride, 1), i * 4096) for i in range(4))
    for x, fresh in zip((q, k, v), inputs(1, 1, 1, tokens, tokens, dim, torch.bfloat16), strict=True):
        x.copy_(fresh)
    assert_accurate(q, k, v, out=out)


@HERE
def test_memory_that_cannot_be_had():
    q, k, v = inputs(q_heads=1, kv_heads=1, q_len=1, kv_len=1)
    k, v = (x.expand(-1, -1, 2**46, -1) for x in (k, v))
    with pytest.raises(MemoryError, match="no memory for K"):
        cpu.attention(Call(q, k, v, 1.0), torch.empty_like(q), format=ACCURATE)


def test_unknown_format_is_refused():
    q, k, v = inputs(q_len=1, kv_len=1)
    with pytest.raises(ValueError, match="known: qk_int8_pv_fp16"):
        cpu.attention(Call(q, k, v, 1.0), torch.empty_like(q), format="qk_int8_pv_fp8")


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing remembered of this machine before or after; the cache's place."""
    from torch._inductor.cpp_builder import cpp_compiler_search

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (build.why_not, build.function, cpp_compiler_search)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


def test_a_cpu_without_vnni_gives_a_reason(forgetful, monkeypatch):
    cpuinfo = forgetful / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu fma avx2 avx512f avx512bw avx512dq avx512vl\n")
    monkeypatch.setattr(build, "CPUINFO", cpuinfo)
    reason = build.why_not()
    assert reason is not None and reason.startswith("CPU without avx512_vnni (") and "needs avx512f, " in reason
    with pytest.raises(UnsupportedError, match="CPU without avx512_vnni"):
        build.function()


def test_an_unknown_system_gives_a_reason(forgetful, monkeypatch):
    monkeypatch.setattr(build, "CPUINFO", forgetful / "nowhere")
    assert build.why_not().startswith("CPU without avx512f, avx512bw, ")


@HERE
def test_no_compiler_gives_a_reason(forgetful):
    from torch._inductor import config

    with config.patch({"cpp.cxx": (str(forgetful / "no-such-compiler"),)}):
        assert build.why_not().startswith("no C++ compiler (")


@HERE
def test_a_failing_compiler_is_quoted(forgetful):
    with pytest.raises(UnsupportedError, match="no-such-flag"):
        build.function("--no-such-flag")
    assert not list(forgetful.rglob("*.so"))


@HERE
def test_built_once_with_a_line_in_the_log(forgetful, caplog):
    with caplog.at_level(logging.INFO, "sagecompile"):
        build.function("-O0")
        build.function.cache_clear()
        build.function("-O0")
    (record,) = caplog.records
    assert record.message.startswith("building the CPU attention kernel with ")
    assert len(list(forgetful.rglob("*.so"))) == 1
    assert isinstance(build.function("-O0"), ctypes._CFuncPtr)
