"""When the installed `sageattention` package may be called (tested anywhere), and that it is then right (on a GPU).

In: versions and the facts of a call. Out: the reason for a refusal, or the relative L2 error.
"""

import sys
import types

import pytest
import torch

from sagecompile.kernels import sageattention
from sagecompile.kernels.call import Call

FIXED = "2.2.0+fixed.sm90"
ACCEPTED = {
    "format": "qk_int8_pv_fp16", "head_dim": 128, "batch": 2, "q_len": 1024, "kv_len": 1024, "heads": 8, "kv_heads": 2,
    "is_causal": True, "dtype": "bfloat16", "capability": (9, 0), "cuda_graphs": False,
}  # fmt: skip
FP8 = {"format": "qk_int8_pv_fp8"}

# what is tried: (version, what differs from ACCEPTED, part of the reason)
REFUSED = {
    "unknown version": ("1.0.4", {}, "never compared"),
    "2.1": ("2.1.1", FP8, "never compared"),
    "the tag 2.2.0": ("2.2.0", FP8, "uninitialised memory"),
    "another GPU": ("1.0.6", {"capability": (8, 6)}, "8.6: tried on 9.0 only"),
    "FP8 from 1.0.6": ("1.0.6", FP8, "runs qk_int8_pv_fp16"),
    "16 bits from 2.2": (FIXED, {}, "runs qk_int8_pv_fp8"),
    "head dim 96 in 1.0.6": ("1.0.6", {"head_dim": 96}, "head_dim 96: .* needs one of 64, 128"),
    "head dim 80": (FIXED, {**FP8, "head_dim": 80}, "head_dim 80: .* needs one of 64, 96, 128"),
    "float32 in 2.2": (FIXED, {**FP8, "dtype": "float32"}, "float32: .* needs one of float16, bfloat16"),
    "float64": ("1.0.6", {"dtype": "float64"}, "dtype float64"),
    "uneven group": ("1.0.6", {"heads": 7}, "7 query heads on 2"),
    "causal, unequal": (FIXED, {**FP8, "kv_len": 2048}, "1024 queries and 2048 keys: .* equal lengths"),
    "tail of Q": ("1.0.6", {"q_len": 1000, "is_causal": False}, "multiples of 128 and 64"),
    "tail of K": ("1.0.6", {"kv_len": 1025, "is_causal": False}, "multiples of 128 and 64"),
    "32-bit offsets": ("1.0.6", {"batch": 2048}, r"fewer than 2\^31"),
    "grid": (FIXED, {**FP8, "batch": 65536, "q_len": 1, "kv_len": 1}, "65535"),
    "CUDA graph": (FIXED, {**FP8, "cuda_graphs": True}, "default stream"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_value_seen_and_needed(case):
    version, changed, reason = REFUSED[case]
    refusal = sageattention.refusal_of(version, **{**ACCEPTED, **changed})
    assert refusal is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal)


@pytest.mark.parametrize(
    ("version", "changed"),
    [
        ("1.0.6", {}),
        ("1.0.6", {"cuda_graphs": True}),
        ("1.0.6", {"q_len": 128, "kv_len": 192, "is_causal": False, "dtype": "float32"}),
        (FIXED, FP8),
        (FIXED, {**FP8, "q_len": 9, "kv_len": 1001, "is_causal": False, "head_dim": 96}),
    ],
)
def test_accepted(version, changed):
    assert sageattention.refusal_of(version, **{**ACCEPTED, **changed}) is None


def test_missing_package_keeps_the_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    version, why = sageattention.installed()
    assert version is None and "sageattention" in why


@pytest.mark.parametrize("fixed", [False, True])
def test_the_tag_and_the_main_branch_are_told_apart(monkeypatch, fixed):
    name = "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf"

    def operator(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    binding = types.ModuleType("sageattention.sm90_compile")
    setattr(
        binding,
        name,
        torch.library.custom_op("sagecompile_test::binding", operator, mutates_args=()) if fixed else operator,
    )
    monkeypatch.setitem(sys.modules, "sageattention", types.ModuleType("sageattention"))
    monkeypatch.setitem(sys.modules, "sageattention.sm90_compile", binding)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.2.0+cu130torch2.11")
    assert sageattention.installed()[0] == (FIXED if fixed else "2.2.0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestPackage:
    """Whichever version is installed, in a call that `refusal` lets pass."""

    LIMITS = {"qk_int8_pv_fp16": 0.02, "qk_int8_pv_fp8": 0.045}  # noqa: RUF012

    def run(self, q, k, v, causal, scale):
        version, text = sageattention.installed()
        if version is None:
            pytest.skip(f"sageattention is not installed: {text}")
        format = "qk_int8_pv_fp16" if version == "1.0.6" else "qk_int8_pv_fp8"
        facts = {
            "format": format, "head_dim": q.shape[3], "batch": q.shape[0], "q_len": q.shape[2], "kv_len": k.shape[2],
            "heads": q.shape[1], "kv_heads": k.shape[1], "is_causal": causal,
            "dtype": str(q.dtype).removeprefix("torch."),
            "capability": torch.cuda.get_device_capability(), "cuda_graphs": False,
        }  # fmt: skip
        refusal = sageattention.refusal_of(version, **facts)
        if refusal:
            pytest.skip(refusal)
        before, out = k.clone(), torch.full_like(q, float("nan"))
        sageattention.attention(Call(q, k, v, scale, 0 if causal else None), out, format=format)
        assert torch.equal(k.nan_to_num(7), before.nan_to_num(7)), "K was modified"
        return out.double(), self.LIMITS[format]

    def inputs(self, dtype, dim):
        torch.manual_seed(0)
        q = torch.randn(2, 512, 8, dim, device="cuda").to(dtype).transpose(1, 2)
        k, v = (torch.randn(2, 2, 512, dim, device="cuda").to(dtype) for _ in range(2))
        return q, k + 3, v

    @staticmethod
    def expected(q, k, v, causal, scale):
        k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, is_causal=causal, scale=scale)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("dim", [64, 96, 128])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("scale", [0.125, 0.01, -0.1])
    def test_against_float64(self, causal, dim, dtype, scale):
        q, k, v = self.inputs(dtype, dim)
        reference = self.expected(q, k, v, causal, scale)
        result, limit = self.run(q, k, v, causal, scale)
        assert (result - reference).norm() <= limit * reference.norm()

    def test_values_past_float16(self):
        q, k, v = self.inputs(torch.bfloat16, 128)
        v *= 1e6
        reference = self.expected(q, k, v, True, 0.1)
        result, limit = self.run(q, k, v, True, 0.1)
        assert (result - reference).norm() <= limit * reference.norm()

    def test_nan_in_one_query(self):
        q, k, v = self.inputs(torch.float16, 64)
        q[1, 3, 100, 5] = float("nan")
        result, _ = self.run(q, k, v, False, 0.125)
        poisoned = result.isnan().all(-1)
        assert poisoned.sum() == 1 and poisoned[1, 3, 100] and result.isnan().any(-1).sum() == 1

    def test_another_stream(self):
        q, k, v = self.inputs(torch.bfloat16, 128)
        reference = self.expected(q, k, v, False, 0.1)
        self.run(q, k, v, False, 0.1)
        late = [torch.zeros_like(x) for x in (q, k, v)]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            for x, y in zip(late, (q, k, v), strict=True):
                x.copy_(y)
            result, limit = self.run(*late, False, 0.1)
        stream.synchronize()
        assert (result - reference).norm() <= limit * reference.norm()
