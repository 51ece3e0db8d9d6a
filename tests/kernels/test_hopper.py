"""What only Hopper's kernels have: quantization apart from attention, and exact rows where others stay quantized.

Everything that Triton's kernels promise as well is in test_gpu_attention.py.
In: K and V quantized once. Out: bit for bit the same as the two together; how far a value that is not finite reaches.
"""

from __future__ import annotations

import pytest
import torch
from support import FAST, TOLERANCE

from sagecompile.errors import UnsupportedError
from sagecompile.kernels import hopper
from sagecompile.kernels.hopper import runtime

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
    hopper.attention(q, k, v, out, scale=0.1, is_causal=causal, format=format)
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
        hopper.attend(q, k, v, quantized, out, scale=0.1, is_causal=causal, format=format)
        assert torch.equal(out, attention(q, k, v, causal=causal, format=format))

    @pytest.mark.parametrize("format", TOLERANCE)
    def test_quantized_once_for_many_queries(self, format):
        _, k, v = inputs()
        quantized = hopper.quantize(k, v, format=format)
        for q_len in (1, 193, 700):
            q = inputs(q_len=q_len)[0]
            out = torch.full_like(q, float("nan"))
            hopper.attend(q, k, v, quantized, out, scale=0.1, is_causal=False, format=format)
            assert torch.equal(out, attention(q, k, v, causal=False, format=format))


@pytest.mark.gpu
@hopper_gpu
class TestExactRows:
    """The exact kernel works on 64 rows at a time, 32 in float32: of those with a flag among them, and of no others."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format", TOLERANCE)
    def test_of_a_nan_in_q(self, format, dtype):
        q, k, v = inputs(dtype=DTYPES[dtype])
        clean = attention(q, k, v, causal=False, format=format)
        q[1, 2, 300, 7] = float("nan")
        changed = attention(q, k, v, causal=False, format=format) != clean
        first, last = (288, 320) if dtype == "float32" else (256, 320)
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
        changed[0, 0, 512:576] = False
        assert not changed.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_every_variant_fits_in_shared_memory(monkeypatch, dim, dtype, format, causal):
    """What a multiprocessor of compute capability 9.0 gives one block, with at least two tiles of K and V in flight."""
    asked = {}
    monkeypatch.setattr(hopper, "kernel", lambda *_, **how: asked.update(how))
    variant = hopper._variant(dim, dtype, format)
    hopper._attend_kernel.__wrapped__(variant, causal, 0)
    assert asked["shared_bytes"] <= 227 * 1024 and dict(asked["defines"])["STAGES"] >= 2
    assert asked["threads"] <= 1024
    hopper._quantize_kernel.__wrapped__(variant, 0)
    assert asked["shared_bytes"] <= 113 * 1024  # two blocks on a multiprocessor


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_no_variant_waits_after_every_wgmma(monkeypatch, tmp_path, caplog, dim, format, causal):
    """The compiler says so, and then multiplies one after the other, where it finds registers used in a wrong way."""
    try:
        if runtime._version() < (12, 8) and (dim, format) == (64, FAST):
            pytest.skip("NVRTC 12.6 does so; 12.8 and 13.0 do not")
    except UnsupportedError as error:
        pytest.skip(f"needs NVRTC: {error}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    asked = {}
    monkeypatch.setattr(hopper, "kernel", lambda *_, **how: asked.update(how))
    hopper._attend_kernel.__wrapped__(hopper._variant(dim, torch.bfloat16, format), causal, 0)
    with caplog.at_level("DEBUG", logger="sagecompile"):
        runtime.compile_cubin("attention.cu", asked["defines"])
    assert "registers" in caplog.text and "serialized" not in caplog.text
