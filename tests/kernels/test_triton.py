"""The Triton kernels on a GPU, against attention in float64.

In: a grid of shapes with the reason for each, layouts, special values, streams and graphs.
Out: the relative L2 error, or the places that are not finite.
"""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Relative L2 error against float64, for N(0,1) inputs with a bias of 3 on every channel of K.
LIMITS = {"qk_int8_pv_fp16": 0.02, "qk_int8_pv_fp8": 0.045}
FORMATS = tuple(LIMITS)

LENGTHS = {
    1: "a single token",
    9: "less than a tensor-core tile",
    63: "one less than a tile of keys",
    127: "one less than a block of scales",
    128: "exactly one block",
    129: "one token in the second block",
    700: "a prompt; no power of two near",
    1001: "odd, several blocks",
    2047: "one less than whole blocks",
    2048: "whole blocks only: no masked tile unless causal",
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
    8: "narrower than a tensor-core step",
    40: "padded to 64",
    64: "native",
    72: "padded to 96",
    80: "padded to 96",
    96: "native, two parts",
    128: "native",
}


@pytest.fixture(autouse=True)
def needs_capability(request: pytest.FixtureRequest) -> None:
    from sagecompile.kernels.triton import FORMATS as minimum

    format = request.node.callspec.params.get("format") if hasattr(request.node, "callspec") else None
    if format and torch.cuda.get_device_capability() < minimum[format]:
        pytest.skip(f"{format} needs a GPU of compute capability {minimum[format]}")
    torch.manual_seed(0)


def inputs(batch=1, q_heads=2, kv_heads=2, q_len=700, kv_len=700, dim=64, dtype=torch.float16):
    """q: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D); K has a bias of 3 on every channel."""
    q = torch.randn(batch, q_heads, q_len, dim, device="cuda").to(dtype)
    k = (torch.randn(batch, kv_heads, kv_len, dim, device="cuda") + 3 * torch.randn(dim, device="cuda").sign()).to(
        dtype
    )
    v = torch.randn(batch, kv_heads, kv_len, dim, device="cuda").to(dtype)
    return q, k, v


def attend(q, k, v, *, format, causal=False, scale=None, out=None):
    from sagecompile.kernels.triton import attention

    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    out.fill_(float("nan"))
    before = k.clone()
    attention(q, k, v, out, scale=q.shape[-1] ** -0.5 if scale is None else scale, is_causal=causal, format=format)
    assert torch.equal(k.nan_to_num(7), before.nan_to_num(7)), "K was modified"
    return out


def expected(q, k, v, *, causal=False, scale=None):
    """Attention in float64. A row meets the NaN and Inf of V that it sees, and none that the mask hides from it."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    visible = visible.tril() if causal else visible
    result = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v.nan_to_num(0, 0, 0)
    for value in (float("inf"), float("-inf"), float("nan")):
        at = v.isnan() if value != value else v == value
        result[visible.double() @ at.double() > 0] = value
    return result


def error(result, reference):
    assert result.isfinite().all()
    return ((result.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("format", FORMATS)
def test_lengths(format, length, dim, causal):
    q, k, v = inputs(q_len=length, kv_len=length, dim=dim)
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= LIMITS[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), PAIRS)
@pytest.mark.parametrize("format", FORMATS)
def test_unequal_lengths(format, q_len, kv_len, causal):
    q, k, v = inputs(q_len=q_len, kv_len=kv_len, dim=96)
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= LIMITS[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("format", FORMATS)
def test_head_dims(format, dim, causal):
    q, k, v = inputs(dim=dim, batch=2)
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= LIMITS[format]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("format", FORMATS)
def test_groups_and_dtypes(format, group, dtype):
    q, k, v = inputs(batch=2, q_heads=8, kv_heads=8 // group, q_len=301, kv_len=301, dim=128, dtype=dtype)
    assert error(attend(q, k, v, format=format, causal=True), expected(q, k, v, causal=True)) <= LIMITS[format]


def tokens_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_apart(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def with_offset(x):
    larger = x.new_full((x.shape[0], x.shape[1], x.shape[2] + 5, x.shape[3] + 3), float("nan"))
    larger[:, :, 5:, 3:] = x
    return larger[:, :, 5:, 3:]


def expanded(x):
    return x[:, :1].expand_as(x)


def every_other(x):
    larger = x.new_full((*x.shape[:3], 2 * x.shape[3]), float("nan"))
    larger[..., ::2] = x
    return larger[..., ::2]


@pytest.mark.parametrize("layout", [tokens_first, channels_apart, with_offset, expanded, every_other])
@pytest.mark.parametrize("format", FORMATS)
def test_strides(format, layout):
    q, k, v = map(layout, inputs(batch=2, q_heads=4, kv_heads=4, q_len=301, kv_len=301, dim=72))
    assert error(attend(q, k, v, format=format, causal=True), expected(q, k, v, causal=True)) <= LIMITS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_output_strides(format):
    q, k, v = inputs(batch=2, q_len=301, kv_len=301)
    out = torch.empty(2, 301, 2, 64, device="cuda", dtype=q.dtype).transpose(1, 2)
    assert error(attend(q, k, v, format=format, out=out), expected(q, k, v)) <= LIMITS[format]


@pytest.mark.parametrize("scale", [0.0, -0.125, 1.0, 1e-6])
@pytest.mark.parametrize("format", FORMATS)
def test_scales(format, scale):
    q, k, v = inputs(dim=8, dtype=torch.float32)
    v += 1.0  # a uniform softmax averages N(0,1) to nearly nothing, which no relative error can be measured against
    assert error(attend(q, k, v, format=format, scale=scale), expected(q, k, v, scale=scale)) <= LIMITS[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1.0, -3e-7, 65504.0])
@pytest.mark.parametrize("format", FORMATS)
def test_constant_inputs(format, fill, causal):
    q, k, v = (torch.full_like(x, fill) for x in inputs(q_len=200, kv_len=200))
    torch.testing.assert_close(attend(q, k, v, format=format, causal=causal), v, rtol=1e-3, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_outlier_channel_of_k(format):
    """The mean takes a constant outlier away, however large."""
    q, k, v = inputs(dtype=torch.float32)
    k[..., 7] += 1e4
    assert error(attend(q, k, v, format=format), expected(q, k, v)) <= LIMITS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_outlier_rows(format):
    """Rows of Q, channels of V and whole heads have scales of their own, so none can spoil its neighbours."""
    q, k, v = inputs(dtype=torch.float32, dim=128)
    reference = expected(q, k, v)
    q[:, :, 5], v[..., 9], v[:, 1] = 1e4 * q[:, :, 5], 1e6 * v[..., 9], 1e6 * v[:, 1]
    result, reference_9 = attend(q, k, v, format=format).double(), expected(q, k, v)
    assert result.isfinite().all()
    rows = torch.arange(700, device="cuda") != 5
    channels = torch.arange(128, device="cuda") != 9
    assert error(result[:, 0][:, rows][..., channels], reference[:, 0][:, rows][..., channels]) <= LIMITS[format]
    assert (
        error(result[:, 0][:, rows][..., 9], reference_9[:, 0][:, rows][..., 9]) <= 1.5 * LIMITS[format]
    )  # one channel: fewer samples
    assert error(result[:, 1][:, rows], reference_9[:, 1][:, rows]) <= LIMITS[format]


@pytest.mark.parametrize("gain", [30.0, 1e3, 5e3])
@pytest.mark.parametrize("format", FORMATS)
def test_steep_scores(format, gain):
    """Scores so large that INT8 rounding would pick the wrong key: such heads are computed exactly, others are not."""
    q, k, v = inputs(kv_heads=2, dtype=torch.float16)
    q[:, 0] *= gain
    k[:, 0] *= gain
    reference = expected(q, k, v)
    result = attend(q, k, v, format=format)
    assert error(result[:, 0], reference[:, 0]) <= 0.002
    assert error(result[:, 1], reference[:, 1]) <= LIMITS[format]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_not_finite(format, causal, where, value, dtype):
    """The rows that see the value are not finite where float64's are not; other rows and heads keep their accuracy."""
    q, k, v = inputs(q_heads=4, kv_heads=2, q_len=200, kv_len=230, dtype=dtype)
    {"q": q, "k": k, "v": v}[where][0, 1, 100, 5] = value
    reference = expected(q, k, v, causal=causal)
    result = attend(q, k, v, format=format, causal=causal).double()
    finite = reference.isfinite()
    assert (result.isfinite() == finite).all()
    assert (result.isnan() == reference.isnan()).all()
    assert (result[~finite & ~reference.isnan()] == reference[~finite & ~reference.isnan()]).all()
    assert ((result - reference)[finite].norm() / reference[finite].norm()).item() <= LIMITS[format]


def test_bfloat16_values_past_float16():
    q, k, v = inputs(dtype=torch.bfloat16)
    v *= 1e6
    assert error(attend(q, k, v, format="qk_int8_pv_fp16"), expected(q, k, v)) <= LIMITS["qk_int8_pv_fp16"]


@pytest.mark.parametrize("format", FORMATS)
def test_graph_capture_and_replay(format):
    from sagecompile.kernels.triton import attention

    q, k, v = inputs(q_heads=4, kv_heads=2)
    out = torch.empty_like(q)

    def run():
        attention(q, k, v, out, scale=0.125, is_causal=True, format=format)

    run()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for poison in (False, True, False):  # a flagged head must not stay flagged in the next replay
        for x, fresh in zip((q, k, v), inputs(q_heads=4, kv_heads=2), strict=True):
            x.copy_(fresh)
        if poison:
            v[0, 1, 300, 3] = float("nan")
        out.fill_(float("nan"))
        graph.replay()
        reference = expected(q, k, v, causal=True)
        finite = reference.isfinite()
        assert (out.isfinite() == finite).all() and finite.all() == (not poison)
        assert ((out.double() - reference)[finite].norm() / reference[finite].norm()).item() <= LIMITS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_current_stream(format):
    """The inputs appear on another stream after a long wait, so a launch on any other stream reads them too early."""
    q, k, v = inputs()
    reference = expected(q, k, v)
    attend(q, k, v, format=format)
    torch.cuda.synchronize()
    late = [torch.zeros_like(x) for x in (q, k, v)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for x, y in zip(late, (q, k, v), strict=True):
            x.copy_(y)
        result = attend(*late, format=format)
    stream.synchronize()
    assert error(result, reference) <= LIMITS[format]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("format", FORMATS)
def test_device_of_the_tensors(format):
    q, k, v = (x.to("cuda:1") for x in inputs())
    assert torch.cuda.current_device() == 0
    assert error(attend(q, k, v, format=format), expected(q, k, v)) <= LIMITS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_many_heads(format):
    """More heads than a grid's second dimension can count."""
    q, k, v = (torch.randn(2, 40_000, 3, 8, device="cuda", dtype=torch.float16) for _ in range(3))
    assert error(attend(q, k, v, format=format), expected(q, k, v)) <= LIMITS[format]


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("format", FORMATS)
def test_200k_tokens(format, bias):
    """A running sum in an accumulator of 14 bits would lose small steps: with a mean in V, the result would shrink."""
    length = 200_000
    q, k, v = inputs(q_heads=1, kv_heads=1, q_len=length, kv_len=length, dim=128, dtype=torch.bfloat16)
    v += bias
    rows = torch.arange(0, length, 997, device="cuda")
    result = attend(q, k, v, format=format)[:, :, rows]
    assert error(result, expected(q[:, :, rows], k, v)) <= LIMITS[format]


def needs_memory(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


@pytest.mark.parametrize("format", FORMATS)
def test_token_offsets_past_32_bits(format):
    """Tokens 2^24 elements apart: the last ones start beyond 2^31, in the inputs and in the output."""
    needs_memory(12)
    tokens, stride, dim = 140, 2**24, 64
    storage = torch.empty(tokens * stride, device="cuda", dtype=torch.bfloat16)
    q, k, v, out = (storage.as_strided((1, 1, tokens, dim), (stride, stride, stride, 1), i * 4096) for i in range(4))
    for x, fresh in zip(
        (q, k, v), inputs(q_heads=1, kv_heads=1, q_len=tokens, kv_len=tokens, dtype=torch.bfloat16), strict=True
    ):
        x.copy_(fresh)
    assert error(attend(q, k, v, format=format, out=out), expected(q, k, v)) <= LIMITS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_head_offsets_past_32_bits(format):
    """The quantized K and V pass 2^31 elements although the caller's, expanded over the heads, do not."""
    needs_memory(24)
    heads, length, dim = 140, 2**17, 128
    q, k, v = inputs(q_heads=1, kv_heads=1, q_len=64, kv_len=length, dim=dim, dtype=torch.bfloat16)
    reference = expected(q, k, v)
    result = torch.empty(1, heads, 64, dim, device="cuda", dtype=torch.bfloat16)
    from sagecompile.kernels.triton import attention

    expanded_over_heads = [x.expand(-1, heads, -1, -1) for x in (q, k, v)]
    attention(*expanded_over_heads, result, scale=dim**-0.5, is_causal=False, format=format)
    assert error(result[:, -1:], reference) <= LIMITS[format]
    assert (result == result[:, :1]).all()


def test_unknown_format_is_refused():
    q, k, v = inputs(q_len=1, kv_len=1)
    with pytest.raises(ValueError, match="known: qk_int8_pv_fp16, qk_int8_pv_fp8"):
        attend(q, k, v, format="qk_int4")
