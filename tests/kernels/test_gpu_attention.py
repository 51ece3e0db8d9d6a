"""The kernels of our own for CUDA GPUs, Triton's and Hopper's alike, against attention in float64.

In: a grid of shapes with the reason for each, layouts, special values, streams and graphs.
Out: the relative L2 error, or the places that are not finite.
"""

import pytest
import torch
from support import ACCURATE, FAST, TOLERANCE

from sagecompile import formats, kernels
from sagecompile.kernels.call import Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORMATS = tuple(TOLERANCE)

LENGTHS = {
    1: "a single token",
    9: "less than a tensor-core tile",
    63: "one less than a tile of keys",
    127: "one less than a block of scales",
    128: "exactly one block",
    129: "one token in the second block",
    191: "one less than Hopper's 192 query rows",
    192: "exactly those rows",
    193: "one row past them",
    700: "a prompt; no power of two near",
    1001: "odd, several blocks",
    2047: "one less than whole blocks",
    2048: "whole blocks only: no masked tile unless causal",
    2049: "17 tiles of keys: their sums leave Hopper's registers",
}
PAIRS = {
    (1, 2048): "decoding",
    (64, 700): "more keys than queries",
    (700, 64): "more queries than keys: causal rows past the last key",
    (129, 1001): "both odd",
    (1001, 1): "one key: the result is V",
    (193, 4200): "33 tiles of keys and a masked one: sums leave Hopper's registers",
}
HEAD_DIMS = {
    1: "the narrowest",
    8: "narrower than a tensor-core step",
    17: "odd: rows of 16 bits begin at every second byte",
    40: "padded to 64",
    64: "native",
    72: "padded to 96",
    80: "padded to 96",
    96: "native, two parts",
    127: "one less than the widest",
    128: "native",
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(params=("triton", "hopper"))
def attention(request):
    """The launcher under test, `attention(call, out, *, format)`, where the GPU can run it."""
    format = request.node.callspec.params.get("format", FORMATS[0])
    capability = torch.cuda.get_device_capability()
    only, least = formats.PROVIDERS[request.param].compute_capability, formats.FORMATS[format].compute_capability
    if only not in (None, capability):
        pytest.skip(f"{request.param} needs a GPU of compute capability {only}")
    if capability < least:
        pytest.skip(f"{format} needs a GPU of compute capability {least}")
    return kernels.launcher(request.param)


@pytest.fixture
def attend(attention):
    """The launcher with an output that holds NaN before, and with inputs that must be the same afterwards."""

    def run(q, k, v, *, format, causal=False, scale=None, out=None):
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        out.fill_(float("nan"))
        before = [x.clone() for x in (q, k, v)]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        attention(Call(q, k, v, scale, 0 if causal else None), out, format=format)
        for name, x, was in zip("qkv", (q, k, v), before, strict=True):
            assert torch.equal(x.nan_to_num(7), was.nan_to_num(7)), f"{name} was modified"
        return out

    return run


def inputs(batch=1, q_heads=2, kv_heads=2, q_len=700, kv_len=700, dim=64, dtype=torch.float16):
    """q: (B, Hq, Nq, D); k, v: (B, Hkv, Nk, D); K has a bias of 3 on every channel."""
    q = torch.randn(batch, q_heads, q_len, dim, device="cuda").to(dtype)
    k = (torch.randn(batch, kv_heads, kv_len, dim, device="cuda") + 3 * torch.randn(dim, device="cuda").sign()).to(
        dtype
    )
    v = torch.randn(batch, kv_heads, kv_len, dim, device="cuda").to(dtype)
    return q, k, v


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
        if at.any():
            result[visible.double() @ at.double() > 0] = value
    return result


def error(result, reference):
    """Relative L2 error of what must be finite."""
    assert result.isfinite().all()
    return ((result.double() - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def error_where_finite(result, reference):
    """Relative L2 error where the reference is finite; elsewhere the same NaN or Inf must stand."""
    result, finite = result.double(), reference.isfinite()
    torch.testing.assert_close(result[~finite], reference[~finite], equal_nan=True)
    return error(result[finite], reference[finite])


# Shapes and dtypes.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("format", FORMATS)
def test_lengths(attend, format, length, dim, causal):
    q, k, v = inputs(q_len=length, kv_len=length, dim=dim)
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= TOLERANCE[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("q_len", "kv_len"), PAIRS)
@pytest.mark.parametrize("format", FORMATS)
def test_unequal_lengths(attend, format, q_len, kv_len, dim, causal):
    q, k, v = inputs(q_heads=8, kv_heads=4, q_len=q_len, kv_len=kv_len, dim=dim)
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= TOLERANCE[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("format", FORMATS)
def test_head_dims(attend, format, dim, causal):
    q, k, v = inputs(batch=2, q_heads=16, kv_heads=16, dim=dim)
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= TOLERANCE[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 72, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_dtypes(attend, format, dtype, dim, causal):
    """With whole rows and narrower ones: kernels that compile differently."""
    q, k, v = inputs(q_heads=4, kv_heads=2, q_len=301, kv_len=301, dim=dim, dtype=DTYPES[dtype])
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= TOLERANCE[format]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("format", FORMATS)
def test_groups(attend, format, group, dtype):
    q, k, v = inputs(2, q_heads=24, kv_heads=24 // group, q_len=301, kv_len=301, dim=128, dtype=DTYPES[dtype])
    assert error(attend(q, k, v, format=format, causal=True), expected(q, k, v, causal=True)) <= TOLERANCE[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_more_tiles_than_multiprocessors(attend, format, dim, causal):
    """Blocks that stay take several query tiles each, of several heads, and not all blocks as many."""
    q, k, v = inputs(3, q_heads=20, kv_heads=10, q_len=1001, kv_len=901, dim=dim, dtype=torch.bfloat16)
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_many_heads(attend, format):
    """More heads than a grid's second dimension can count."""
    q, k, v = (torch.randn(2, 40_000, 3, 8, device="cuda", dtype=torch.float16) for _ in range(3))
    assert error(attend(q, k, v, format=format), expected(q, k, v)) <= TOLERANCE[format]


# Strides.


def tokens_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_apart(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def with_offset(x):
    larger = x.new_full((x.shape[0], x.shape[1], x.shape[2] + 5, x.shape[3] + 3), float("nan"))
    larger[:, :, 5:, 3:] = x
    return larger[:, :, 5:, 3:]


def one_element_in(x):
    """The strides of whole rows, but no row begins at a multiple of 16 bytes."""
    larger = x.new_full((x.numel() + 1,), float("nan"))
    larger[1:] = x.flatten()
    return larger[1:].view(x.shape)


def expanded_heads(x):
    return x[:, :1].expand_as(x)


def expanded_batch(x):
    return x[:1].expand_as(x)


def every_other_channel(x):
    larger = x.new_full((*x.shape[:3], 2 * x.shape[3]), float("nan"))
    larger[..., ::2] = x
    return larger[..., ::2]


def every_third_token(x):
    larger = x.new_full((*x.shape[:2], 3 * x.shape[2], x.shape[3]), float("nan"))
    larger[:, :, ::3] = x
    return larger[:, :, ::3]


LAYOUTS = (
    tokens_first,
    channels_apart,
    with_offset,
    one_element_in,
    expanded_heads,
    expanded_batch,
    every_other_channel,
    every_third_token,
)


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_strides(attend, format, layout, dim):
    q, k, v = map(layout, inputs(batch=2, q_heads=4, kv_heads=4, q_len=301, kv_len=301, dim=dim))
    assert error(attend(q, k, v, format=format, causal=True), expected(q, k, v, causal=True)) <= TOLERANCE[format]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("format", FORMATS)
def test_one_of_the_inputs_is_not_aligned(attend, format, which, dtype):
    given = list(inputs(q_heads=4, kv_heads=2, q_len=301, kv_len=301, dtype=DTYPES[dtype]))
    given[which] = one_element_in(given[which])
    assert error(attend(*given, format=format), expected(*given)) <= TOLERANCE[format]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 64, 96, 128])
@pytest.mark.parametrize("layout", [tokens_first, channels_apart, with_offset, one_element_in, every_other_channel])
@pytest.mark.parametrize("format", FORMATS)
def test_output_strides(attend, format, layout, dim, dtype):
    """Nothing is written beside the output: its storage holds NaN there, before and after."""
    q, k, v = inputs(batch=2, q_len=301, kv_len=301, dim=dim, dtype=DTYPES[dtype])
    out = layout(torch.empty_like(q))
    storage = torch.empty(0, dtype=q.dtype, device=q.device).set_(out.untyped_storage())
    assert error(attend(q, k, v, format=format, out=out), expected(q, k, v)) <= TOLERANCE[format]
    assert storage.isnan().sum() == storage.numel() - out.numel()


# Values.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.125, 1.0, 1e-6])
@pytest.mark.parametrize("format", FORMATS)
def test_scales(attend, format, scale, causal):
    q, k, v = inputs(dim=8, dtype=torch.float32)
    v += 1.0  # a uniform softmax averages N(0,1) to nearly nothing, which no relative error can be measured against
    result = attend(q, k, v, format=format, scale=scale, causal=causal)
    assert error(result, expected(q, k, v, scale=scale, causal=causal)) <= TOLERANCE[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1.0, -3e-7, 65504.0])
@pytest.mark.parametrize("format", FORMATS)
def test_constant_inputs(attend, format, fill, causal):
    """The result is V itself; FP8's accumulator of 14 bits cuts sums off, so that one-sided ones come out smaller."""
    q, k, v = (torch.full_like(x, fill) for x in inputs(q_len=200, kv_len=200))
    rtol = 1e-3 if format == ACCURATE else 1e-2
    torch.testing.assert_close(attend(q, k, v, format=format, causal=causal), v, rtol=rtol, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_outlier_channel_of_k(attend, format):
    """The mean takes a constant outlier away, however large."""
    q, k, v = inputs(dtype=torch.float32)
    k[..., 7] += 1e4
    assert error(attend(q, k, v, format=format), expected(q, k, v)) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_outlier_row_of_q_and_head_of_v(attend, format):
    """Both have scales of their own, so that none can spoil its neighbours."""
    q, k, v = inputs(dtype=torch.float32, dim=128)
    q[:, :, 5], v[:, 1] = 1e4 * q[:, :, 5], 1e6 * v[:, 1]
    result, reference = attend(q, k, v, format=format), expected(q, k, v)
    others = torch.arange(700, device="cuda") != 5
    for head in (0, 1):
        assert error(result[:, head, others], reference[:, head, others]) <= TOLERANCE[format]
        assert error(result[:, head, 5], reference[:, head, 5]) <= TOLERANCE[format]  # one key has all the weight


@pytest.mark.parametrize("gain", [300.0, 1e6])
@pytest.mark.parametrize("format", FORMATS)
def test_outlier_channel_of_v(attend, attention, format, gain):
    """The other channels keep their accuracy: they have scales of their own, or share one within e4m3's range."""
    if gain > 1e3 and format == FAST and "hopper" in attention.__module__:
        pytest.skip("hopper's FP8 has one scale for all channels: one may be hundreds of times larger, no more")
    q, k, v = inputs(dtype=torch.float32, dim=128)
    v[..., 9] *= gain
    result, reference = attend(q, k, v, format=format), expected(q, k, v)
    others = torch.arange(128, device="cuda") != 9
    assert error(result[..., others], reference[..., others]) <= TOLERANCE[format]
    assert error(result[..., 9], reference[..., 9]) <= 1.5 * TOLERANCE[format]  # one channel: fewer samples


def with_mean(v):
    return v + 5


def with_mean_of_a_channel(v):
    v[..., 3] += 20
    return v


def with_outlier_tokens(v):
    """The first, which a sample of evenly spaced tokens contains, and one that such a sample misses."""
    v[:, :, [0, 333]] *= 1e3
    return v


def with_a_block_of_zeros(v):
    v[:, :, 128:256] = 0
    return v


def with_small_and_large_blocks(v):
    v[:, :, :128] *= 1e-3
    v[:, :, 256:384] *= 30
    return v


def all_zero(v):
    return torch.zeros_like(v)


def tiny(v):
    return v * 1e-6


def vanishing(v):
    return v * 1e-30


def huge(v):
    return v.clamp(-2, 2) * 3e4


VALUES = {
    with_mean: DTYPES,
    with_mean_of_a_channel: DTYPES,
    with_outlier_tokens: ("bfloat16", "float32"),  # past float16 now and then
    with_a_block_of_zeros: DTYPES,
    with_small_and_large_blocks: DTYPES,
    all_zero: DTYPES,
    tiny: ("bfloat16", "float32"),  # in float16 the result itself is rounded to nothing
    vanishing: ("bfloat16", "float32"),
    huge: DTYPES,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("values", "dtype"), [(values, dtype) for values in VALUES for dtype in VALUES[values]])
@pytest.mark.parametrize("format", FORMATS)
def test_values(attend, format, values, dtype, dim, causal):
    q, k, v = inputs(q_heads=4, kv_heads=2, dim=dim, dtype=DTYPES[dtype])
    v = values(v.float()).to(v.dtype)
    assert error(attend(q, k, v, format=format, causal=causal), expected(q, k, v, causal=causal)) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_see_no_outlier_of_v(attend, format):
    """An outlier that the mask hides may cost the rows before it some accuracy, as it shares their tile's scale."""
    q, k, v = inputs(dtype=torch.float32)
    v[:, :, 333] *= 300
    result, reference = attend(q, k, v, format=format, causal=True), expected(q, k, v, causal=True)
    assert error(result[:, :, :256], reference[:, :, :256]) <= TOLERANCE[format]
    assert error(result[:, :, 256:333], reference[:, :, 256:333]) <= 2 * TOLERANCE[format]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gain", [30.0, 1e3, 5e3])
@pytest.mark.parametrize("format", FORMATS)
def test_steep_scores(attend, format, gain, causal):
    """Scores so large that INT8 rounding would pick the wrong key: such rows are computed exactly, others are not."""
    q, k, v = inputs(q_heads=4, kv_heads=4)
    q[:, 0] *= gain
    k[:, 0] *= gain
    reference = expected(q, k, v, causal=causal)
    result = attend(q, k, v, format=format, causal=causal)
    assert error(result[:, 0], reference[:, 0]) <= 0.002
    assert error(result[:, 1:], reference[:, 1:]) <= TOLERANCE[format]


def test_bfloat16_values_past_float16(attend):
    q, k, v = inputs(dtype=torch.bfloat16)
    v *= 1e6
    assert error(attend(q, k, v, format=ACCURATE), expected(q, k, v)) <= TOLERANCE[ACCURATE]


# NaN and Inf.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", range(3), ids="qkv")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_not_finite(attend, format, causal, where, value, dtype):
    """What sees the value is what it is in float64; other rows keep their accuracy, and other heads every bit."""
    given = inputs(q_heads=4, kv_heads=2, q_len=200, kv_len=230, dtype=DTYPES[dtype])
    clean = attend(*given, format=format, causal=causal)
    given[where][0, 1, 100, 5] = value
    result = attend(*given, format=format, causal=causal)
    assert error_where_finite(result, expected(*given, causal=causal)) <= TOLERANCE[format]
    others = slice(2, 4) if where == 0 else slice(0, 2)  # head 1 of q is in the first group, of k and v the second
    assert torch.equal(result[:, others], clean[:, others])


@pytest.mark.parametrize("dim", [40, 96, 128])
@pytest.mark.parametrize("token", [0, 127, 128, 229])
@pytest.mark.parametrize("where", range(3), ids="qkv")
@pytest.mark.parametrize("format", FORMATS)
def test_where_a_nan_stands(attend, format, where, token, dim):
    """The first and last token of a tile and of all, and the last channel."""
    given = inputs(q_len=230, kv_len=230, dim=dim, dtype=torch.bfloat16)
    given[where][0, 1, token, dim - 1] = float("nan")
    result = attend(*given, format=format, causal=True)
    assert error_where_finite(result, expected(*given, causal=True)) <= TOLERANCE[format]


@pytest.mark.parametrize("zero", ["scale", "q"])
@pytest.mark.parametrize("where", range(3), ids="qkv")
@pytest.mark.parametrize("format", FORMATS)
def test_zero_times_not_finite(attend, format, where, zero):
    """0 * NaN and 0 * Inf are NaN: where all scores are zero, a value that is not finite still comes through."""
    given = inputs(q_len=200, kv_len=230, dtype=torch.float32)
    scale = 0.0 if zero == "scale" else 0.125
    if zero == "q":
        given[0].zero_()
    given[2].add_(1.0)  # a uniform softmax averages N(0,1) to nearly nothing
    given[where][0, 1, 100, 5] = float("inf")
    result = attend(*given, format=format, scale=scale)
    assert error_where_finite(result, expected(*given, scale=scale)) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_first_a_tile_that_no_row_sees(attend, format):
    """Equal keys in it have the smallest scale there is, and what is not seen must not become what others relate to."""
    q, k, v = inputs(q_len=256, kv_len=256, dtype=torch.float16)
    q.fill_(-2.5)
    k.zero_()
    k[:, :, 0], k[:, :, 2] = 1, -1
    result = attend(q, k, v, format=format, causal=True, scale=0.125)
    assert error(result, expected(q, k, v, causal=True, scale=0.125)) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_everything_not_finite(attend, format):
    q, k, v = (torch.full_like(x, float("nan")) for x in inputs(q_len=200, kv_len=230))
    assert attend(q, k, v, format=format).isnan().all()


# Streams, graphs, devices.


@pytest.mark.parametrize("format", FORMATS)
def test_graph_capture_and_replay(attention, format):
    q, k, v = inputs(q_heads=4, kv_heads=2)
    out = torch.empty_like(q)

    def run():
        attention(Call(q, k, v, 0.125, ahead=0), out, format=format)

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
        assert reference.isfinite().all() == (not poison)
        assert error_where_finite(out, reference) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_current_stream(attend, format):
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
    assert error(result, reference) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_calls_in_a_row(attention, format):
    """The next call's launches follow at once: none may read or overwrite what the one before still uses."""
    given = [inputs(q_heads=8, kv_heads=8, q_len=1001, kv_len=1001, dtype=torch.bfloat16) for _ in range(4)]
    outs = [torch.full_like(q, float("nan")) for q, _, _ in given]
    for _ in range(5):
        for (q, k, v), out in zip(given, outs, strict=True):
            attention(Call(q, k, v, 0.125), out, format=format)
    for (q, k, v), out in zip(given, outs, strict=True):
        assert error(out, expected(q, k, v)) <= TOLERANCE[format]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("format", FORMATS)
def test_device_of_the_tensors(attend, format):
    """On a device that is not the current one, and in turn with the first."""
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        q, k, v = (x.to(device) for x in inputs())
        assert torch.cuda.current_device() == 0
        assert error(attend(q, k, v, format=format), expected(q, k, v)) <= TOLERANCE[format]


# Sizes.


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_200k_tokens(attend, format, dim, bias):
    """A running sum in an accumulator of 14 bits would lose small steps: with a mean in V, the result would shrink."""
    q, k, v = inputs(q_heads=1, kv_heads=1, q_len=256, kv_len=200_000, dim=dim, dtype=torch.bfloat16)
    v += bias
    reference = torch.cat([expected(rows, k, v) for rows in q.split(64, 2)], 2)
    assert error(attend(q, k, v, format=format), reference) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_200k_queries(attend, format):
    """As many rows, causal: the rows with the longest sums among them."""
    length = 200_000
    q, k, v = inputs(q_heads=1, kv_heads=1, q_len=length, kv_len=length, dim=128, dtype=torch.bfloat16)
    result = attend(q, k, v, format=format, causal=True)
    for row in (0, 127, 5_000, 131_071, length - 1):
        seen = slice(row + 1)
        reference = expected(q[:, :, row : row + 1], k[:, :, seen], v[:, :, seen])
        assert error(result[:, :, row : row + 1], reference) <= 1.5 * TOLERANCE[format]  # one row: fewer samples


def needs_memory(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


FAR_APART = {
    "batch": ((2, 1, 140, 64), (2**31, 64, 64, 1)),
    "head": ((1, 2, 140, 64), (64, 2**31, 64, 1)),
    "token": ((1, 1, 140, 64), (64, 64, 2**24, 1)),
    "channel": ((1, 1, 140, 72), (140, 140, 1, 2**25)),
}
"""Shape and strides, in elements: the last of a dimension begins beyond 2^31."""


@pytest.mark.parametrize("which", FAR_APART)
@pytest.mark.parametrize("format", FORMATS)
def test_offsets_past_32_bits(attend, format, which):
    """In the inputs and in the output, which lie side by side in one storage."""
    needs_memory(12)
    shape, strides = FAR_APART[which]
    room = 16_384  # more than all other dimensions take
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    storage = torch.empty(last + 4 * room, device="cuda", dtype=torch.bfloat16)
    q, k, v, out = (storage.as_strided(shape, strides, i * room) for i in range(4))
    batch, heads, tokens, dim = shape
    for x, fresh in zip((q, k, v), inputs(batch, heads, heads, tokens, tokens, dim, torch.bfloat16), strict=True):
        x.copy_(fresh)
    assert error(attend(q, k, v, format=format, out=out), expected(q, k, v)) <= TOLERANCE[format]


@pytest.mark.parametrize("format", FORMATS)
def test_quantized_offsets_past_32_bits(attention, format):
    """The quantized K and V pass 2^31 elements although the caller's, expanded over the heads, do not."""
    needs_memory(24)
    heads, length, dim = 140, 2**17, 128
    q, k, v = inputs(q_heads=1, kv_heads=1, q_len=64, kv_len=length, dim=dim, dtype=torch.bfloat16)
    reference = expected(q, k, v)
    result = torch.full((1, heads, 64, dim), float("nan"), device="cuda", dtype=torch.bfloat16)
    over_heads = [x.expand(-1, heads, -1, -1) for x in (q, k, v)]
    attention(Call(*over_heads, dim**-0.5), result, format=format)
    assert error(result[:, -1:], reference) <= TOLERANCE[format]
    assert (result == result[:, :1]).all()


def test_unknown_format_is_refused(attend):
    q, k, v = inputs(q_len=1, kv_len=1)
    with pytest.raises(ValueError, match="known: qk_int8_pv_fp16, qk_int8_pv_fp8"):
        attend(q, k, v, format="qk_int4")
