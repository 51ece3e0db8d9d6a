"""What cannot run costs a reason and a log line, never a crash: missing and broken packages, failing and wrong kernels.

A provider whose kernel the test chooses stands in for Triton on the CPU; everything else is the real way through.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sagecompile import formats
from sagecompile.errors import UnsupportedError
from sagecompile.kernels import available, hopper, sageattention
from sagecompile.kernels.call import Call
from sagecompile.kernels.cpu import build
from sagecompile.kernels.hopper import runtime
from sagecompile.ops import reference
from sagecompile.report import recording
from sagecompile.site import AttentionSite, Device, Prologue

SITE = AttentionSite("layers.0", "model.py:1", "sdpa", 1, 2, 2, 64, 64, 64, 64, "float32", "cpu")


@pytest.fixture(autouse=True)
def forget_trials():
    available._trial.cache_clear()
    yield
    available._trial.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Offer a kernel as the provider `triton` on the CPU."""

    def put(kernel):
        row = replace(formats.PROVIDERS["triton"], devices=("cpu",))
        monkeypatch.setitem(formats.PROVIDERS, "triton", row)
        monkeypatch.setattr(available, "version", lambda provider: "1.0")
        monkeypatch.setattr(available, "launcher", lambda provider: kernel)

    return put


def sdpa(call: Call, out, *, format):
    result = F.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale, is_causal=call.is_causal)
    out.copy_(result)


def broken(call, out, *, format):
    raise RuntimeError("ptxas fatal: no such instruction")


def wrong(call, out, *, format):
    out.copy_(call.v)


def test_a_kernel_that_works_is_not_refused(install):
    install(sdpa)
    assert available.refusal(SITE, "qk_int8_pv_fp16", "triton", cuda_graphs=False) is None


def test_a_kernel_that_fails_is_refused_with_the_compilers_message_and_logged_once(install, caplog):
    install(broken)
    with caplog.at_level(logging.WARNING, logger="sagecompile"):
        reasons = {available.refusal(SITE, "qk_int8_pv_fp16", "triton", cuda_graphs=False) for _ in range(3)}
    assert reasons == {"triton failed: RuntimeError: ptxas fatal: no such instruction"}
    assert len(caplog.records) == 1


def test_a_kernel_that_is_wrong_on_this_device_is_refused(install):
    install(wrong)
    reason = available.refusal(SITE, "qk_int8_pv_fp16", "triton", cuda_graphs=False)
    assert reason.startswith("triton wrong: relative error") and reason.endswith("needs at most 0.04")


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(available, "version", lambda provider: None)
    reason = available.refusal(SITE, "qk_int8_pv_fp16", "sageattention", cuda_graphs=False)
    assert reason == "sageattention not installed: pip install sageattention"


def test_a_missing_package_of_another_name_is_named(monkeypatch):
    """The rows that Hopper's kernels leave to the exact one are computed by Triton."""
    monkeypatch.setattr(available, "version", lambda provider: None)
    reason = available.refusal(SITE, "qk_int8_pv_fp16", "hopper", cuda_graphs=False)
    assert reason == "triton not installed: pip install triton"


@pytest.mark.parametrize(
    ("found", "shown"), [((8, 0), "8.0"), ((10, 0), "10.0"), ((12, 0), "12.0"), (None, "none")], ids=str
)
@pytest.mark.parametrize("format", formats.FORMATS)
def test_another_compute_capability_is_refused_before_anything_is_compiled(monkeypatch, format, found, shown):
    monkeypatch.setattr(available, "version", lambda provider: "1.0")
    monkeypatch.setattr(available, "device", lambda name: Device("cuda", "a GPU", found))
    monkeypatch.setattr(available, "_trial", lambda *_: pytest.fail("tried"))
    reason = available.refusal(SITE, format, "hopper", cuda_graphs=False)
    assert reason == f"compute capability {shown}: hopper needs 9.0"


def test_a_hopper_gpu_without_a_compiler_is_refused_with_what_to_install(monkeypatch, caplog):
    """The launcher is the real one, up to the compiler that it does not find."""

    missing = "no libnvrtc.so.13: pip install the nvidia-cuda-nvrtc of CUDA 13.0"

    def no_nvrtc():
        raise UnsupportedError(missing)

    monkeypatch.setattr(available, "version", lambda provider: "1.0")
    monkeypatch.setattr(available, "device", lambda name: Device("cuda", "NVIDIA H200", (9, 0)))
    monkeypatch.setattr(hopper, "_check_limits", lambda *_: None)  # the site's device is the CPU after all
    monkeypatch.setattr(runtime, "_version", no_nvrtc)
    with caplog.at_level(logging.WARNING, logger="sagecompile"):
        reasons = {available.refusal(SITE, "qk_int8_pv_fp8", "hopper", cuda_graphs=False) for _ in range(2)}
    assert reasons == {f"hopper failed: UnsupportedError: {missing}"}
    assert len(caplog.records) == 1


def test_a_package_that_cannot_be_imported_gives_its_message(monkeypatch):
    monkeypatch.setattr(available, "version", lambda provider: "1.0.6")
    text = "libcudart.so.13: cannot open shared object file"
    monkeypatch.setattr(sageattention, "_installed_once", lambda: (None, text))
    reason = available.refusal(SITE, "qk_int8_pv_fp16", "sageattention", cuda_graphs=False)
    assert reason == f"sageattention cannot be imported: {text}"


def test_a_provider_that_cannot_be_imported_is_refused_with_the_reason(monkeypatch):
    """As Triton may be, where a library of its own is missing."""
    row = replace(formats.PROVIDERS["triton"], devices=("cpu",), module="sagecompile.kernels.nowhere")
    monkeypatch.setitem(formats.PROVIDERS, "triton", row)
    monkeypatch.setattr(available, "version", lambda package: "1.0")
    reason = available.refusal(SITE, "qk_int8_pv_fp16", "triton", cuda_graphs=False)
    assert reason == "triton failed: ModuleNotFoundError: No module named 'sagecompile.kernels.nowhere'"


def test_a_model_still_runs_on_a_broken_kernel(install):
    install(broken)
    torch._dynamo.reset()
    q = torch.randn(1, 2, 64, 64)
    options = {"sage.policy": "always", "sage.formats": "qk_int8_pv_fp8"}

    def model(q):
        return F.scaled_dot_product_attention(q, q, q)

    formats.PROVIDERS["reference"], row = (
        replace(formats.PROVIDERS["reference"], devices=()),
        formats.PROVIDERS["reference"],
    )
    try:
        with recording() as reports:
            out = torch.compile(model, backend="sage_inductor", options=options)(q)
    finally:
        formats.PROVIDERS["reference"] = row
    torch.testing.assert_close(out, model(q))
    assert reports[0].kept[0].decision.reason == "triton failed: RuntimeError: ptxas fatal: no such instruction"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_trial_that_found_no_memory_is_made_again(install, error):
    tried = []

    def hungry(call, out, *, format):
        tried.append(call)
        if len(tried) == 1:
            raise error("no memory left")
        sdpa(call, out, format=format)

    install(hungry)
    reasons = [available.refusal(SITE, "qk_int8_pv_fp16", "triton", cuda_graphs=False) for _ in range(3)]
    assert reasons == ["triton not tried: no memory left", None, None] and len(tried) == 2


def test_the_trial_leaves_the_users_random_numbers_alone(install):
    install(sdpa)
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    available.refusal(SITE, "qk_int8_pv_fp8", "triton", cuda_graphs=False)
    assert torch.equal(torch.randn(3), expected)


def test_the_trial_runs_in_inference_mode_too(install):
    install(sdpa)
    with torch.inference_mode():
        assert available.refusal(SITE, "qk_int8_pv_fp16", "triton", cuda_graphs=False) is None


class TestTrialOfAPrologue:
    SITE = replace(SITE, prologues=(Prologue(True, "float32", "half", "float32"),) * 2)

    @pytest.fixture(autouse=True)
    def hopper_runs_here(self, monkeypatch):
        row = replace(formats.PROVIDERS["hopper"], compute_capability=None)
        monkeypatch.setitem(formats.PROVIDERS, "hopper", row)
        monkeypatch.setattr(available, "version", lambda provider: "1.0")

    def test_a_kernel_that_does_the_prologue_is_trusted(self, monkeypatch):
        """Here the reference stands in for a provider with kernels."""
        monkeypatch.setattr(available, "launcher", lambda provider: reference.attention)
        assert available.refusal(self.SITE, "qk_int8_pv_fp8", "hopper", cuda_graphs=False) is None

    @pytest.mark.parametrize("ignored", ["q_prologue", "k_prologue"])
    def test_one_that_does_not_is_refused(self, monkeypatch, ignored):
        def attention(call, out, *, format):
            reference.attention(replace(call, **{ignored: None}), out, format=format)

        monkeypatch.setattr(available, "launcher", lambda provider: attention)
        refused = available.refusal(self.SITE, "qk_int8_pv_fp8", "hopper", cuda_graphs=False)
        assert refused is not None and "hopper wrong: relative error" in refused


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fma avx512_vnni avx512_bf16 amx_bf16 amx_int8", "Some CPU (AMX)"),
        ("fma avx512_vnni avx512_bf16", "Some CPU (AVX-512 BF16)"),
        ("fma avx512_vnni", "Some CPU (AVX-512 VNNI)"),
        ("fma avx2", "Some CPU"),
    ],
)
def test_cpus_that_virtual_machines_call_alike_have_names_of_their_own(monkeypatch, tmp_path, flags, name):
    """No profile of one is used on another, whose SDPA or kernel is faster."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(build, "CPUINFO", cpuinfo)
    assert available._cpu_name.__wrapped__() == name
