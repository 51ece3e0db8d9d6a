"""`sagecompile bench attention`: who takes part, how each is called, and the figures made of the times."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from support import exact_attention, relative_error

import sagecompile.cli.bench.attention as bench_attention
import sagecompile.cli.bench.flash_attention_3 as fa3
import sagecompile.cli.bench.kernel_only as kernel_only
from sagecompile import formats
from sagecompile.cli import main
from sagecompile.cli.bench.attention import attention_rows, error_against_float64, quantization_row
from sagecompile.cli.bench.measure import Measurement
from sagecompile.cli.bench.plot import curves, draw
from sagecompile.cli.bench.shapes import Shape, inputs

CPU = torch.device("cpu")
SHAPE = Shape("bfloat16", 64, False, 32, 2, 3)
SMALL = ["--device", "cpu", "--lengths", "32", "--head-dims", "64", "--heads", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prints_ratios_beside_error_and_json_last(capsys, folder):
    assert main(["bench", "attention", *SMALL, "--reference", "--json", "rows.json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert last["rows"] == len(rows)
    plain = {"sdpa", "sdpa flash", "sdpa math"}
    assert plain | {"qk_int8_pv_fp16 reference", "qk_int8_pv_fp8 reference"} <= {row["what"] for row in rows}
    for causal in (False, True):
        same_shape = [row for row in rows if row["is_causal"] == causal]
        best = min((row for row in same_shape if not row["quantized"]), key=lambda row: row["us"])
        sdpa = next(row for row in same_shape if row["what"] == "sdpa")
        for row in same_shape:
            assert row["quantized"] == (row["what"] not in plain) and row["error"] < 0.045
            assert row["ratio_to_best"] == pytest.approx(best["us"] / row["us"], rel=0.01, abs=1e-4)
            assert row["ratio_to_sdpa"] == pytest.approx(sdpa["us"] / row["us"], rel=0.01, abs=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_error_sees_a_wrong_answer_in_the_first_and_in_the_last_head(is_causal):
    q, k, v = (x.float() for x in inputs(SHAPE, CPU))
    error = error_against_float64(q, k, v, is_causal)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert error(out) < 1e-5 < 0.5 < error(F.scaled_dot_product_attention(q, k, v, is_causal=not is_causal))
    for head in ((0, 0), (-1, -1)):
        wrong = out.clone()
        wrong[head][7] = math.nan
        assert math.isnan(error(wrong))


def test_both_layouts_have_the_same_inputs():
    for heads_first, tokens_first in zip(inputs(SHAPE, CPU), inputs(SHAPE, CPU, tokens_first=True), strict=True):
        assert torch.equal(heads_first, tokens_first.transpose(1, 2)) and tokens_first.is_contiguous()


def test_rows_compare_with_the_fastest_that_does_not_quantize_and_with_sdpa():
    times = {"sdpa": 40.0, "sdpa cudnn": 20.0, "qk_int8_pv_fp8 triton": 10.0}
    measured = {name: Measurement(us, 0.01, "graph") for name, us in times.items()}
    rows = list(attention_rows(SHAPE, measured, {"sdpa", "sdpa cudnn"}))
    assert [row["ratio_to_best"] for row in rows] == [0.5, 1.0, 2.0]
    assert [row["ratio_to_sdpa"] for row in rows] == [1.0, 2.0, 4.0]
    assert rows[2]["tflops"] == pytest.approx(4 * 2 * 3 * 32 * 32 * 64 / 10e-6 / 1e12, abs=1e-3)


def test_a_causal_shape_has_half_the_work():
    assert dataclasses.replace(SHAPE, is_causal=True).flops == SHAPE.flops / 2


def test_without_sdpa_there_is_no_row(capsys):
    assert not list(attention_rows(SHAPE, {"sdpa flash": Measurement(1.0, 0.0, "eager")}, {"sdpa flash"}))
    assert "SDPA itself did not run" in capsys.readouterr().out


# FlashAttention-3

SCHEMA = """fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out,
Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k,
Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale,
Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,
bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux,
int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""
"""As the library of vLLM 0.20.2 has it (`strings _vllm_fa3_C.abi3.so`)."""


@pytest.fixture(scope="module")
def flash_attention_3_op():
    """A stand-in for the op of that library: variable-length attention, one sequence after the other."""

    def fwd(q, k, v, k_new, v_new, q_v, out, starts_q, starts_k, *rest):
        names = [argument.name for argument in torch.ops._vllm_fa3_C.fwd.default._schema.arguments]
        given = dict(zip(names[9:], rest, strict=True))
        used = {name: value for name, value in given.items() if value is not None}
        assert (used.pop("max_seqlen_q"), used.pop("max_seqlen_k")) == (SHAPE.length, SHAPE.length)
        scale, is_causal = used.pop("softmax_scale"), used.pop("is_causal")
        # What flash_attn_varlen_func of vLLM 0.20.2 passes where its caller says nothing.
        assert used == {
            "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True,
            "num_splits": 0, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
        }  # fmt: skip
        assert k_new is v_new is q_v is out is None and starts_q.dtype == starts_k.dtype == torch.int32
        parts = []
        for start, end in zip(starts_q.tolist()[:-1], starts_q.tolist()[1:], strict=True):
            one = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))  # (1, H, N, D)
            parts.append(F.scaled_dot_product_attention(*one, is_causal=is_causal, scale=scale)[0].transpose(0, 1))
        return [torch.cat(parts), q.new_empty(0)]

    library = torch.library.Library("_vllm_fa3_C", "DEF")
    library.define(SCHEMA)
    library.impl("fwd", fwd, "CompositeExplicitAutograd")
    yield
    library._destroy()


@pytest.mark.usefixtures("flash_attention_3_op")
@pytest.mark.parametrize("is_causal", [False, True])
def test_flash_attention_3_is_called_as_vllm_does(is_causal):
    q, k, v = inputs(SHAPE, CPU)
    out = fa3.packed(q, k, v, is_causal)()
    assert out.shape == q.shape
    assert relative_error(out, exact_attention(q, k, v, is_causal=is_causal)) < 0.01


@pytest.mark.usefixtures("flash_attention_3_op")
def test_flash_attention_3_takes_part_in_the_table(capsys, folder, monkeypatch):
    (folder / "fa3.so").touch()
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(fa3.available, "device", lambda name: types.SimpleNamespace(
        name="H200", type="cpu", compute_capability=(9, 0), threads=None))  # fmt: skip
    arguments = ["bench", "attention", *SMALL, "--tokens", "64", "--flash-attention-3", "fa3.so", "--json", "rows.json"]
    assert main(arguments) == 0
    assert loaded == ["fa3.so"]
    rows = [row for row in json.loads((folder / "rows.json").read_text())["rows"] if row["what"] == fa3.NAME]
    assert len(rows) == 2 and all(row["error"] < 0.01 and not row["quantized"] and row["batch"] == 2 for row in rows)


def test_another_version_of_flash_attention_3_is_said(monkeypatch):
    op = types.SimpleNamespace(_schema=types.SimpleNamespace(arguments=[types.SimpleNamespace(name="q")]))
    found = types.SimpleNamespace(fwd=types.SimpleNamespace(default=op))
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", found, raising=False)
    with pytest.raises(ValueError, match="another version: fwd has no cp_rank"):
        fa3.packed(*inputs(SHAPE, CPU), False)


@pytest.mark.parametrize(
    ("capability", "library", "said"),
    [
        ((8, 0), "fa3.so", "it needs compute capability 9.0, this is cuda (8, 0)"),
        ((9, 0), None, "vllm is not installed; --flash-attention-3 FILE takes"),
        ((9, 0), "fa3.so", "left out: OSError"),  # no library
    ],
)
def test_why_flash_attention_3_is_left_out(capability, library, said, capsys, folder, monkeypatch):
    (folder / "fa3.so").write_text("no library")
    monkeypatch.setattr(fa3, "_installed", lambda: None)
    monkeypatch.setattr(fa3.available, "device", lambda name: types.SimpleNamespace(compute_capability=capability))
    assert not fa3.load(library and folder / library, torch.device("cuda"))
    assert said in capsys.readouterr().out


def test_flash_attention_3_of_an_installed_vllm_is_found(folder, monkeypatch):
    (folder / "vllm/vllm_flash_attn").mkdir(parents=True)
    (folder / "vllm/__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "vllm" / fa3.LIBRARY).touch()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert fa3._installed() == folder / "vllm" / fa3.LIBRARY


# --kernel-only


@pytest.fixture
def provider(monkeypatch):
    """A provider that offers quantize and attend: K in INT8, V in 16 bits."""

    def quantize(k, v, *, format):
        scale = k.abs().amax() / 127
        return (k / scale).round().to(torch.int8), v.clone(), scale

    def attend(call, quantized, out, *, format):
        k_int8, v_copy, k_scale = quantized
        k = k_int8.to(out.dtype) * k_scale
        how = {"is_causal": call.is_causal, "scale": call.scale}
        out.copy_(F.scaled_dot_product_attention(call.q, k, v_copy, **how))

    def broken(k, v, *, format):
        raise RuntimeError("no such kernel")

    for name, functions in {
        "good": {"quantize": quantize, "attend": attend},
        "broken": {"quantize": broken, "attend": attend},
        "whole": {},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"sagecompile.kernels.{name}", module)
    for name in ("good", "broken", "whole", "missing"):
        row = dataclasses.replace(formats.PROVIDERS["cpu"], name=name, module=f"sagecompile.kernels.{name}", devices=())
        monkeypatch.setitem(formats.PROVIDERS, name, row)


@pytest.mark.usefixtures("provider")
def test_kernels_are_taken_apart_where_they_offer_it(capsys):
    q, k, v = inputs(SHAPE, CPU)
    runners = [("qk_int8_pv_fp16", name) for name in ("good", "broken", "whole", "reference", "missing")]
    (found,) = kernel_only.take_apart(q, k, v, True, runners).values()
    assert relative_error(found.attend(), exact_attention(q, k, v, is_causal=True)) < 0.1
    assert found.least_bytes == k.numel() * (2 + 1 + 2 + 2)
    said = capsys.readouterr().out
    assert "qk_int8_pv_fp16 broken: left out: RuntimeError: no such kernel" in said and said.count("\n") == 1


@pytest.mark.usefixtures("provider")
def test_kernel_only_times_attention_and_quantization(capsys, folder, monkeypatch):
    cpu = sys.modules["sagecompile.kernels.good"]
    monkeypatch.setitem(sys.modules, "sagecompile.kernels.cpu", cpu)
    monkeypatch.setattr(bench_attention.available, "refusal", lambda *_, **__: None)
    monkeypatch.setattr(kernel_only, "COPY_BYTES", 1 << 20)
    assert main(["bench", "attention", *SMALL, "--kernel-only", "--json", "rows.json"]) == 0
    found = json.loads((folder / "rows.json").read_text())
    kernels = [row for row in found["rows"] if row["quantized"]]
    assert [row["what"] for row in kernels] == ["qk_int8_pv_fp16 cpu"] * 2
    assert all(0.005 < row["error"] < 0.1 for row in kernels)
    for row in found["quantization"]:
        assert row["least_bytes"] == 2 * 32 * 64 * 7
        assert row["gb_per_s"] == pytest.approx(row["least_bytes"] / row["us"] * 1e-3, rel=0.05, abs=0.06)
    assert "x the floor of" in capsys.readouterr().out


def test_the_floor_of_a_quantization():
    row = quantization_row(SHAPE, "qk_int8_pv_fp8 hopper", Measurement(20.0, None, "graph"), 40_000_000, 4000.0)
    assert (row["floor_us"], row["ratio_to_floor"], row["gb_per_s"]) == (10.0, 2.0, 2000.0)


@dataclasses.dataclass
class Quantized:
    tiles: torch.Tensor
    scales: torch.Tensor


def test_only_what_is_copied_counts_as_moved():
    k, v = torch.zeros(2, 4, 256, 64, dtype=torch.bfloat16), torch.zeros(2, 4, 256, 64, dtype=torch.bfloat16)
    n, scales = k.numel(), torch.zeros(8)
    k8, v8 = k.to(torch.int8), v.to(torch.float8_e4m3fn)
    in_one = Quantized(torch.zeros(2 * n, dtype=torch.uint8), scales)
    assert kernel_only.least_bytes(k, v, (k8, v8, scales), "qk_int8_pv_fp8") == (2 + 1 + 2 + 1) * n
    assert kernel_only.least_bytes(k, v, in_one, "qk_int8_pv_fp8") == (2 + 1 + 2 + 1) * n
    assert kernel_only.least_bytes(k, v, (k8, v.clone()), "qk_int8_pv_fp16") == (2 + 1 + 2 + 2) * n
    assert kernel_only.least_bytes(k, v, {"k": k8, "v": v[:, 1:]}, "qk_int8_pv_fp16") == (2 + 1) * n
    assert kernel_only.least_bytes(k, v, k8, "qk_int8_pv_fp16") == (2 + 1) * n


# --plot

ROWS = [
    {"dtype": "bfloat16", "head_dim": d, "is_causal": c, "length": n, "what": w, "quantized": w != "sdpa", "us": n / d,
     "ratio_to_best": 1.0}
    for d in (64, 128) for c in (False, True) for n in (1024, 512) for w in ("sdpa", "qk_int8_pv_fp8 triton")
]  # fmt: skip


def test_a_plot_has_a_curve_for_each_contestant_by_length():
    found = curves(ROWS, "us")
    assert len(found) == 4
    assert found["bfloat16, head_dim 64, causal"]["sdpa"] == [(512, 8.0), (1024, 16.0)]


def test_the_plot_is_a_png(folder):
    pytest.importorskip("matplotlib")
    draw(ROWS, "GPU", folder / "plot.png")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
