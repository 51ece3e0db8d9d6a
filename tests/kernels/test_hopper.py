"""What only Hopper's kernels have: quantization apart from attention, and exact rows where others stay quantized.

Everything that Triton's kernels promise as well is in test_gpu_attention.py.
In: K and V quantized once; projections that RMSNorm and RoPE still have to be applied to. Out: bit for bit the same as
the two together; how far a value that is not finite reaches; the same as with norm and RoPE in front, within the error.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import FAST, TOLERANCE

from sagecompile.errors import UnsupportedError
from sagecompile.kernels import counts, hopper
from sagecompile.kernels.call import Call
from sagecompile.kernels.hopper import parameters, relaunch, runtime
from sagecompile.kernels.hopper.cut import cut_rows, even
from sagecompile.kernels.prologue import Prologue
from sagecompile.kernels.triton import exact

hopper_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a CUDA GPU of compute capability (9, 0)",
)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def inputs(q_len=700, kv_len=700, dim=64, dtype=torch.bfloat16):
    """q: (2, 4, Nq, D); k, v: (2, 2, Nk, D)."""
    q = torch.randn(2, 4, q_len, dim, device="cuda").to(dtype)
    k, v = torch.randn(2, 2, 2, kv_len, dim, device="cuda").to(dtype)
    return q, k, v


def attention(q, k, v, *, causal, format):
    out = torch.full_like(q, float("nan"))
    hopper.attention(Call(q, k, v, 0.1, 0 if causal else None), out, format=format)
    return out


@pytest.mark.gpu
@hopper_gpu
class TestApart:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [40, 64, 96, 128])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("format", TOLERANCE)
    def test_quantize_and_attend_are_attention(self, format, causal, dim, dtype):
        q, k, v = inputs(dim=dim, dtype=DTYPES[dtype])
        out = torch.full_like(q, float("nan"))
        quantized = hopper.quantize(k, v, format=format)
        hopper.attend(Call(q, k, v, 0.1, 0 if causal else None), quantized, out, format=format)
        assert torch.equal(out, attention(q, k, v, causal=causal, format=format))

    @pytest.mark.parametrize("format", TOLERANCE)
    def test_quantized_once_for_many_queries(self, format):
        _, k, v = inputs()
        quantized = hopper.quantize(k, v, format=format)
        for q_len in (1, 193, 700):
            q = inputs(q_len=q_len)[0]
            out = torch.full_like(q, float("nan"))
            hopper.attend(Call(q, k, v, 0.1), quantized, out, format=format)
            assert torch.equal(out, attention(q, k, v, causal=False, format=format))


@pytest.mark.gpu
@hopper_gpu
class TestExactRows:
    """The exact kernel works on 128 rows at a time, 32 in float32: where one has a flag, and nowhere else."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format", TOLERANCE)
    def test_of_a_nan_in_q(self, format, dtype):
        q, k, v = inputs(dtype=DTYPES[dtype])
        clean = attention(q, k, v, causal=False, format=format)
        q[1, 2, 300, 7] = float("nan")
        changed = attention(q, k, v, causal=False, format=format) != clean
        first, last = (288, 320) if dtype == "float32" else (256, 384)
        changed[1, 2, first:last] = False
        assert not changed.any()

    @pytest.mark.parametrize("format", TOLERANCE)
    def test_of_an_inf_in_v_that_the_mask_hides(self, format):
        """Token 300 is in the third tile, which the first 128 rows never load, and none of the sampled tokens."""
        q, k, v = inputs()
        clean = attention(q, k, v, causal=True, format=format)
        v[0, 1, 300, 7] = float("inf")
        result = attention(q, k, v, causal=True, format=format)
        assert result[:, :, :300].isfinite().all()
        assert torch.equal(result[:, :, :128], clean[:, :, :128])
        assert torch.equal(result[1], clean[1]) and torch.equal(result[0, :2], clean[0, :2])

    @pytest.mark.parametrize("causal", [False, True])
    def test_of_steep_scores(self, causal):
        """Sixteen steep rows and their tile are exact, all others stay quantized."""
        q, k, v = inputs(dtype=torch.float16)
        clean = attention(q, k, v, causal=causal, format=FAST)
        q[0, 0, 512:528] *= 500
        result = attention(q, k, v, causal=causal, format=FAST)
        scores = q[0, 0, 512:528].double() @ k[0, 0].double().mT * 0.1
        if causal:
            hidden = torch.arange(700, device="cuda") > torch.arange(512, 528, device="cuda")[:, None]
            scores.masked_fill_(hidden, float("-inf"))
        torch.testing.assert_close(
            result[0, 0, 512:528].double(), scores.softmax(-1) @ v[0, 0].double(), rtol=5e-3, atol=5e-3
        )
        changed = result != clean
        changed[0, 0, 512:640] = False
        assert not changed.any()


def tables(batch, length, dim, dtype):
    """cos and sin of turns that differ in every channel, so that a wrong channel or a swapped half shows."""
    turns = torch.rand(batch, length, dim, device="cuda") * 6.3
    return turns.cos().to(dtype), turns.sin().to(dtype)


def error(out, q, k, v, prologues, *, causal):
    """Relative L2, against float64 with the prologues in front."""
    q, k = (Prologue.apply(prologue, x).double() for prologue, x in zip(prologues, (q, k), strict=True))
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * 0.1
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(1), float("-inf"))
    expected = scores.softmax(-1) @ v
    return float((out.double() - expected).norm() / expected.norm())


def fused(q, k, v, prologues, *, causal, format):
    out = torch.full_like(q, float("nan"))
    hopper.attention(Call(q, k, v, 0.1, 0 if causal else None, *prologues), out, format=format)
    return out


@pytest.mark.gpu
@hopper_gpu
class TestPrologue:
    @pytest.mark.parametrize(
        ("norm", "rope", "table"),
        [
            ("none", "half", "same"),
            ("none", "interleaved", "float32"),
            ("plain", "none", "same"),
            ("weight", "half", "same"),
            ("weight", "interleaved", "float32"),
            ("float32 weight", "half", "float32"),
        ],
    )
    @pytest.mark.parametrize("dim", [64, 96, 128])
    @pytest.mark.parametrize("format", TOLERANCE)
    def test_against_float64(self, format, dim, norm, rope, table):
        """700 tokens are no multiple of a tile; a bias makes K worth smoothing; the tables differ by sequence."""
        q, k, v = inputs(dim=dim)
        k = k + torch.randn(dim, device="cuda").to(k.dtype)
        cos, sin = tables(2, 700, dim, torch.float32 if table == "float32" else q.dtype)
        weights = torch.rand(2, dim, device="cuda").add(0.5).to(torch.float32 if "32" in norm else q.dtype)
        prologues = [
            Prologue(
                None if norm == "none" else 1e-6, weight if "weight" in norm else None, rope,
                *((cos, sin) if rope != "none" else (None, None)),
            )
            for weight in weights
        ]  # fmt: skip
        out = fused(q, k, v, prologues, causal=dim == 64, format=format)
        assert error(out, q, k, v, prologues, causal=dim == 64) <= TOLERANCE[format]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", [1, 9, 127, 129, 1001])
    @pytest.mark.parametrize("format", TOLERANCE)
    def test_lengths_and_dtypes(self, format, length, dtype):
        """One table for all sequences, of a wider tensor: its rows are not adjacent."""
        q, k, v = inputs(length, length, 128, DTYPES[dtype])
        cos, sin = (x[..., :128] for x in tables(1, length, 256, torch.float32))
        prologues = [Prologue(1e-5, None, "half", cos, sin)] * 2
        out = fused(q, k, v, prologues, causal=False, format=format)
        assert error(out, q, k, v, prologues, causal=False) <= TOLERANCE[format]

    @pytest.mark.parametrize("which", range(2), ids="qk")
    def test_of_one_alone(self, which):
        q, k, v = inputs(129, 700, 64)
        cos, sin = tables(1, (129, 700)[which], 64, torch.float32)
        prologues = [Prologue(), Prologue()]
        prologues[which] = Prologue(1e-6, None, "interleaved", cos, sin)
        out = fused(q, k, v, prologues, causal=False, format=FAST)
        assert error(out, q, k, v, prologues, causal=False) <= TOLERANCE[FAST]

    def test_of_tensors_that_are_not_aligned(self):
        """Channels apart, tables and a weight that start between multiples of 16 bytes."""
        q, k, v = inputs(dim=64)
        q = q.transpose(2, 3).contiguous().transpose(2, 3)
        cos, sin = (x[..., 1:] for x in tables(1, 700, 65, torch.float32))
        prologues = [Prologue(1e-6, torch.randn(65, device="cuda")[1:], "half", cos, sin)] * 2
        out = fused(q, k, v, prologues, causal=True, format=FAST)
        assert error(out, q, k, v, prologues, causal=True) <= TOLERANCE[FAST]

    @pytest.mark.parametrize("rope", ["half", "interleaved"])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("dim", [64, 96, 128])
    def test_exact_rows(self, dim, causal, rope):
        """Steep scores after the norm: what INT8 cannot hold is as right as SDPA, which also rounds to 16 bits."""
        q, k, v = inputs(dim=dim, dtype=torch.float16)
        cos, sin = tables(2, 700, dim, torch.float16)
        weight = torch.full((dim,), 24.0, device="cuda", dtype=torch.float16)
        prologues = [Prologue(1e-6, weight, rope, cos, sin)] * 2
        out = fused(q, k, v, prologues, causal=causal, format=FAST)
        assert error(out, q, k, v, prologues, causal=causal) <= 0.02

    def test_not_finite(self):
        """A NaN in a row of Q is that row's, one in K everybody's; a NaN in a table likewise."""
        q, k, v = inputs(dim=128)
        cos, sin = tables(1, 700, 128, torch.float32)
        prologues = [Prologue(1e-6, None, "half", cos, sin)] * 2
        q[1, 2, 300, 7] = float("nan")
        out = fused(q, k, v, prologues, causal=True, format=FAST)
        assert out[1, 2, 300].isnan().all() and int(out.isnan().any(-1).sum()) == 1
        cos[0, 500, 3] = float("nan")
        out = fused(q, k, v, prologues, causal=True, format=FAST)
        assert not out[:, :, 500:].isfinite().any() and out[0, :, :500].isfinite().all()

    def test_narrow_heads_are_refused(self):
        q, k, v = inputs(dim=40)
        with pytest.raises(ValueError, match="head_dim 40: a prologue needs 64, 96 or 128"):
            fused(q, k, v, [Prologue(1e-6), None], causal=False, format=FAST)


class TestTensor:
    """What the kernels are told of a tensor."""

    VARIANT = parameters.Variant(64, torch.bfloat16, True)

    def told(self, x):
        found = parameters.tensor_of(x, self.VARIANT)
        return found.batch, found.head, found.token, found.channel, bool(found.vectors)

    def test_strides_in_bytes(self):
        x = torch.empty(2, 700, 3, 64, dtype=torch.bfloat16).transpose(1, 2)
        assert self.told(x) == (700 * 3 * 128, 128, 3 * 128, 2, True)
        assert parameters.tensor_of(x, self.VARIANT).data == x.data_ptr()

    def test_one_entry_has_no_stride(self):
        assert self.told(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))[:3] == (0, 0, 0)

    @pytest.mark.parametrize(
        "x",
        [
            torch.empty(1, 2, 9, 65, dtype=torch.bfloat16)[..., 1:],
            torch.empty(1, 2, 9, 65, dtype=torch.bfloat16)[..., :64],
            torch.empty(1, 2, 9, 128, dtype=torch.bfloat16)[..., ::2],
            torch.empty(1, 2, 9, 40, dtype=torch.bfloat16),
            torch.empty(1, 2, 64, 9, dtype=torch.bfloat16).mT,
        ],
        ids=["one element in", "rows of 130 bytes", "every other channel", "narrow", "channels apart"],
    )
    def test_rows_that_cannot_be_read_by_16_bytes(self, x):
        assert not self.told(x)[4]


class TestPrepare:
    """What the kernels are told of a prologue; needs no GPU."""

    X = torch.empty(2, 3, 9, 64, dtype=torch.bfloat16)
    VARIANT = parameters.Variant(64, torch.bfloat16, True)

    def prepared(self, **facts):
        return parameters.prepare(Prologue(**facts), self.X, self.VARIANT)

    @pytest.mark.parametrize("which", range(2), ids=["cos", "sin"])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_one_table_that_starts_between_multiples_of_16_bytes(self, which, batch):
        """It is copied, and then both must be, as they are read with the same strides."""
        wide = torch.rand(2, batch, 9, 128)
        tables = [x[..., :64] for x in wide]
        tables[which] = wide[which][..., 1:65]
        found = self.prepared(rope="half", cos=tables[0], sin=tables[1])
        cos, sin = found.prologue.cos, found.prologue.sin
        assert torch.equal(cos, tables[0]) and torch.equal(sin, tables[1])
        assert cos.stride() == sin.stride() and found.parameters.token == cos.stride(1) * 4
        assert found.parameters.cos == cos.data_ptr() and found.parameters.sin == sin.data_ptr()
        assert (cos.data_ptr() | sin.data_ptr() | found.parameters.token | found.parameters.batch) % 16 == 0

    def test_tables_for_all_sequences_may_differ_in_the_stride_between_them(self):
        cos, sin = torch.rand(1, 9, 64), torch.rand(3, 9, 64)[:1]
        sin = sin.as_strided(sin.shape, (9999, 64, 1))
        found = self.prepared(rope="half", cos=cos, sin=sin)
        assert found.prologue.cos is cos and found.prologue.sin is sin and found.parameters.batch == 0

    def test_a_table_for_all_sequences_is_not_copied(self):
        turns = torch.rand(1, 9, 64)
        found = self.prepared(rope="half", cos=turns, sin=turns)
        assert found.prologue.cos is turns and found.parameters.batch == 0 and found.parameters.token == 256

    def test_other_dtypes_become_float32(self):
        turns = torch.rand(1, 9, 64, dtype=torch.float64)
        found = self.prepared(eps=1e-6, weight=torch.ones(64).double(), rope="half", cos=turns, sin=turns)
        assert dict(found.defines)["WEIGHT"] == dict(found.defines)["TABLE"] == 2

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({"eps": 1e-6, "weight": torch.ones(3)}, r"weight \(3,\): needs \(64,\)"),
            ({"rope": "half", "cos": torch.ones(1, 5, 64), "sin": torch.ones(1, 5, 64)}, r"cos or sin \(1, 5, 64\)"),
            ({"rope": "half", "cos": torch.ones(1, 9, 64), "sin": torch.ones(2, 9, 64)}, "need them alike"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, facts, message):
        with pytest.raises(ValueError, match=message):
            self.prepared(**facts)


class TestLaunches:
    """What is launched, recorded, and what C++ is told of it; needs no GPU."""

    @pytest.fixture
    def launched(self, monkeypatch):
        """Of each kernel, in turn: its parameters; of the exact one the addresses."""
        found = []

        class Kernel:
            function, threads, dynamic_shared_bytes = 5, 384, 1000

            def __call__(self, blocks, parameters, stream, overlap=False):
                found.append(parameters)

        def recompute(call, out, flags, **how):
            tables = map(parameters.addresses_of, (call.q_prologue, call.k_prologue))
            found.append((tuple(x.data_ptr() for x in (call.q, call.k, call.v, out, flags)), *tables))
            return exact.Repeated("Triton's", 7, lambda *values: values)

        monkeypatch.setattr(relaunch.LIBRARY, "now", lambda: None)
        monkeypatch.setattr(hopper, "_check_limits", lambda q, k: None)
        monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
        monkeypatch.setattr(hopper, "kernel", lambda source, device: Kernel())
        monkeypatch.setattr(hopper, "_begin_all", lambda *_: [])
        monkeypatch.setattr(exact, "recompute_flagged", recompute)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        return found

    @pytest.fixture
    def plans(self, monkeypatch):
        """That were left for C++: the arguments of each."""
        found = []
        monkeypatch.setattr(relaunch.LIBRARY, "now", lambda: "C++")
        monkeypatch.setattr(relaunch, "of_triton", lambda *given, overlap: given)
        plan = lambda *given: SimpleNamespace(leave=lambda: found.append(given))  # noqa: E731
        monkeypatch.setattr(relaunch, "Plan", plan)
        monkeypatch.setattr(relaunch, "count_at", lambda *given: None)
        return found

    def tensors(self, batch=2, length=90):
        """q, k, v, out (B, H, N, 64), and cos, sin."""
        attended = [torch.empty(batch, heads, length, 64, dtype=torch.bfloat16) for heads in (4, 2, 2, 4)]
        return [*attended, *(torch.empty(1, length, 64) for _ in range(2))]

    def attention(self, q, k, v, out, cos, sin, *, fused=True, site=""):
        prologue = Prologue(1e-6, None, "half", cos, sin) if fused else None
        call = Call(q, k, v, 0.1, q_prologue=prologue, k_prologue=prologue, site=site)
        hopper.attention(call, out, format=FAST)

    @pytest.mark.parametrize("fused", [False, True])
    def test_each_reads_what_the_one_before_wrote(self, launched, plans, fused):
        q, k, v, out, *turns = self.tensors()
        self.attention(q, k, v, out, *turns, fused=fused)
        quantize, attend, (tensors, *tables) = launched
        assert (quantize.k.data, quantize.v.data) == (k.data_ptr(), v.data_ptr())
        assert (attend.q.data, attend.out.data, attend.tiles) == (q.data_ptr(), out.data_ptr(), quantize.tiles)
        assert tensors == (*(x.data_ptr() for x in (q, k, v, out)), attend.flags)
        expected = (0, *(x.data_ptr() for x in turns)) if fused else (0, 0, 0)
        assert tables == [expected] * 2
        for prologue in (quantize.prologue, attend.prologue):
            assert tuple(getattr(prologue, name) or 0 for name in ("weight", "cos", "sin")) == expected

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_plan_names_every_address(self, launched, plans, fused):
        tensors = self.tensors()
        self.attention(*tensors, fused=fused)
        ((library, out, tiles_bytes, flags_bytes, (quantize, attend, repeated)),) = plans
        turns = {"cos", "sin"} if fused else set()
        tables = (None, "cos", "sin") if fused else (None, None, None)
        assert library == "C++" and out is tensors[3]
        assert tiles_bytes == 4 * parameters.tiles_shape(tensors[1], parameters.variant_of(64, out.dtype, FAST))[2]
        assert flags_bytes == 4 * 8 * 6  # int32, of 8 heads, of each 16 of 90 rows
        assert set(quantize.addresses.values()) == {"k", "v", "tiles"} | turns and not quantize.overlap
        assert set(attend.addresses.values()) == {"q", "out", "tiles", "flags"} | turns and attend.overlap
        assert repeated == ("Triton's", 7, (("q", "k", "v", "out", "flags", "counts"), tables, tables))

    def test_where_a_site_is_counted_is_said_to_c(self, launched, plans, monkeypatch):
        said = []
        monkeypatch.setattr(relaunch, "count_at", lambda *given: said.append(given))
        self.attention(*self.tensors(), site="layers.0")
        assert said == [("C++", None, "layers.0", counts.slot(torch.device("cpu"), "layers.0").data_ptr())]

    def test_tables_that_must_be_copied_are_pythons_each_time(self, launched, plans):
        for _ in range(3):
            cos, sin = (torch.empty(1, 90, 65)[..., 1:] for _ in range(2))
            self.attention(*self.tensors()[:4], cos, sin)
            _, q_tables, k_tables = launched[-1]
            assert not {cos.data_ptr(), sin.data_ptr()} & {*q_tables, *k_tables}
            assert all(address % 16 == 0 for address in (*q_tables, *k_tables))
        assert not plans

    def test_without_a_library_there_is_no_plan(self, launched, plans, monkeypatch):
        monkeypatch.setattr(relaunch.LIBRARY, "now", lambda: None)
        self.attention(*self.tensors())
        assert len(launched) == 3 and not plans


def test_a_first_call_has_all_formats_compiled_at_once(monkeypatch):
    begun = []
    monkeypatch.setattr(hopper, "begin", begun.append)
    hopper._begin_all.__wrapped__(64, torch.bfloat16, True, NO_PROLOGUE, NORM_AND_ROPE)
    kernels = {(source.file, dict(source.defines)["FP8"], dict(source.defines)["ROPE"]) for source in begun}
    assert kernels == {("quantize.cu", fp8, 1) for fp8 in (False, True)} | {
        ("attention.cu", fp8, 0) for fp8 in (False, True)
    }


class TestCut:
    """How rows of Q become tiles of blocks."""

    @pytest.mark.parametrize("consumers", [2, 3])
    @pytest.mark.parametrize("q_len", [1, 63, 64, 65, 128, 192, 193, 320, 700, 1024, 2048, 8192, 10001])
    @pytest.mark.parametrize("heads", [1, 7, 32, 256])
    def test_covers_every_row_once(self, heads, q_len, consumers):
        rows = 64 * consumers
        for cut in (even(q_len, consumers), cut_rows(q_len, heads, consumers, 132)):
            starts = [i * rows for i in range(cut.whole)]
            starts += [cut.whole * rows + i * cut.tail_rows for i in range(cut.tiles - cut.whole)]
            ends = [start + rows for start in starts[: cut.whole]] + [
                min(q_len, start + cut.tail_rows) for start in starts[cut.whole :]
            ]
            assert starts == [0, *ends[:-1]] and ends[-1] == q_len
            assert cut.tail_rows % 64 == 0 and 0 < cut.tail_rows <= rows

    def test_many_rounds_are_not_simulated(self):
        assert cut_rows(1000, 10_000, 3, 132) == even(1000, 3)

    def test_the_last_round_is_filled(self):
        """43 tiles of 32 heads are 10.4 rounds of 132 blocks: smaller ones at the end take less than an 11th."""
        cut = cut_rows(8192, 32, 3, 132)
        assert cut.tail_rows < 192 and 32 * cut.whole <= 10 * 132


NO_PROLOGUE = parameters.NOTHING.defines
NORM_AND_ROPE = (("NORM", 1), ("NO_WEIGHT", 3), ("WEIGHT", 1), ("ROPE", 1), ("TABLE", 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_every_variant_fits_in_shared_memory(dim, dtype, format, causal):
    """What a multiprocessor of compute capability 9.0 gives one block, with at least two tiles of K and V in flight."""
    variant = parameters.variant_of(dim, dtype, format)
    attend = hopper._attend_source(variant, causal, NO_PROLOGUE)
    assert attend.shared_bytes <= 227 * 1024 and dict(attend.defines)["STAGES"] >= 2 and attend.threads <= 1024
    blocks = 1 if dtype == torch.float32 else 2  # on a multiprocessor, each with 10 KiB of static shared memory
    assert hopper._quantize_source(variant, NO_PROLOGUE).shared_bytes <= 227 * 1024 // blocks - 10 * 1024


@pytest.mark.parametrize("prologue", [NO_PROLOGUE, NORM_AND_ROPE])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_no_variant_waits_after_every_wgmma(monkeypatch, tmp_path, caplog, dim, format, causal, prologue):
    """The compiler says so, and then multiplies one after the other, where it finds registers used in a wrong way."""
    try:
        if runtime._version() < (12, 8) and (dim, format) == (64, FAST):
            pytest.skip("NVRTC 12.6 does so; 12.8 and 13.0 do not")
    except UnsupportedError as error:
        pytest.skip(f"needs NVRTC: {error}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = hopper._attend_source(parameters.variant_of(dim, torch.bfloat16, format), causal, prologue)
    with caplog.at_level("DEBUG", logger="sagecompile"):
        runtime.compile_cubin(source.file, source.defines)
    assert "registers" in caplog.text and "serialized" not in caplog.text
