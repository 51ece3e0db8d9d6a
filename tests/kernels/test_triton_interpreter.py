"""The Triton kernels' arithmetic, run by Triton's interpreter on the CPU, against float64.

In: small shapes, each with a reason. Out: the relative L2 error of each.
Why: CI has no GPU. The interpreter must be chosen before triton is imported, so one subprocess runs all the cases.
"""

import json
import os
import subprocess
import sys

import pytest

# name: (B, Hq, Hkv, Nq, Nk, D, dtype, causal, options)
CASES = {
    "one token, one channel": (1, 1, 1, 1, 1, 1, "float16", False, {}),
    "one row past a tile, narrow head": (1, 2, 1, 129, 129, 40, "float16", True, {}),
    "head dim 96 is two halves": (1, 2, 2, 65, 130, 96, "float16", False, {}),
    "head dim 72 pads to 96": (1, 1, 1, 60, 70, 72, "float32", True, {}),
    "whole tiles, group of four": (1, 4, 1, 128, 256, 128, "float16", False, {}),
    "more queries than keys, causal": (2, 2, 2, 150, 70, 64, "float32", True, {}),
    "more keys than queries, causal": (1, 1, 1, 70, 200, 64, "float16", True, {}),
    "bfloat16": (1, 1, 1, 70, 100, 64, "bfloat16", True, {}),
    "tokens before heads": (2, 2, 2, 65, 65, 64, "float16", False, {"layout": "bnhd"}),
    "channels not contiguous": (1, 2, 2, 33, 65, 40, "float16", True, {"layout": "bhdn"}),
    "K and V expanded over heads": (1, 4, 4, 33, 65, 64, "float16", False, {"layout": "expanded"}),
    "negative scale": (1, 1, 1, 40, 150, 64, "float32", False, {"scale": -0.1}),
    "scale zero": (1, 1, 1, 40, 150, 64, "float32", False, {"scale": 0.0}),
    "scores too steep for INT8": (1, 4, 2, 70, 150, 64, "float16", True, {"gain": 1e3}),
    "all zero": (1, 1, 1, 40, 70, 64, "float32", True, {"fill": 0.0}),
    "constant": (1, 1, 1, 40, 70, 64, "float16", True, {"fill": 60000.0}),
    "NaN in K": (1, 2, 1, 70, 70, 64, "float32", True, {"poison": ("k", 40, float("nan"))}),
    "NaN in Q": (1, 2, 2, 70, 70, 64, "float32", False, {"poison": ("q", 3, float("nan"))}),
    "Inf in V": (1, 2, 2, 70, 70, 64, "float16", True, {"poison": ("v", 40, float("inf"))}),
    "Inf in K": (1, 2, 2, 70, 70, 64, "float32", True, {"poison": ("k", 10, float("inf"))}),
}
PLAIN = (False, False, "none")
# For every 16 rows a flag. name: (B, Hq, Hkv, Nq, Nk, D, dtype, causal, flagged (query head of all, row), prologue):
# the prologue of both Q and K is (RMSNorm, with a weight, RoPE)
FLAGGED = {
    "one of two tiles": (1, 2, 1, 128, 70, 64, "float16", False, [(1, 20)], PLAIN),
    "the last rows, fewer than 16": (1, 2, 2, 133, 70, 40, "float16", True, [(0, 132)], PLAIN),
    "tiles of 32 in float32": (1, 1, 1, 100, 130, 96, "float32", True, [(0, 40), (0, 99)], PLAIN),
    "heads of several sequences": (2, 4, 2, 70, 33, 64, "bfloat16", False, [(0, 0), (5, 69), (7, 16)], PLAIN),
    "one row in all": (3, 1, 1, 1, 9, 8, "float32", True, [(1, 0)], PLAIN),
    "RoPE by halves": (2, 2, 1, 70, 70, 96, "bfloat16", False, [(3, 69)], (False, False, "half")),
    "RMSNorm and RoPE by pairs": (2, 2, 2, 70, 70, 64, "float16", True, [(3, 2)], (True, True, "interleaved")),
    "RMSNorm without a weight": (1, 1, 1, 70, 70, 64, "float32", False, [(0, 2)], (True, False, "none")),
    "none": (1, 2, 2, 100, 70, 64, "float16", True, [], PLAIN),
}
LIMITS = {"qk_int8_pv_fp16": 0.02, "qk_int8_pv_fp8": 0.045}


def correct_interpreter() -> None:
    """Round to nearest, and multiply bfloat16 as numbers: Triton 3.9's interpreter truncates, and multiplies bits."""
    import numpy as np
    import torch
    from triton.runtime import interpreter

    types = {"fp8e4nv": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    carriers = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}

    def convert(data, source, target, rounding_mode):
        torch_carrier = carriers[types[source.name].itemsize][0]
        bits = torch.from_numpy(np.ascontiguousarray(data)).view(torch_carrier).view(types[source.name])
        torch_carrier, numpy_carrier = carriers[types[target.name].itemsize]
        return bits.to(types[target.name]).view(torch_carrier).numpy().view(numpy_carrier)

    def number(handle):
        if handle.dtype.scalar.name in ("bf16", "fp8e4nv"):
            return convert(handle.data, handle.dtype.scalar, interpreter.tl.float32, None).view(np.float32)
        return handle.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(number(a), number(b), dtype=d.data.dtype) + d.data
        return interpreter.TensorHandle(product, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot


def run_case(case: str, format: str) -> dict[str, float | bool]:
    """In the interpreter's process: the error, whether the same places are finite, whether the inputs are unchanged."""
    import torch

    from sagecompile.kernels.call import Call
    from sagecompile.kernels.triton import attention

    batch, q_heads, kv_heads, q_len, kv_len, dim, dtype, causal, options = CASES[case]
    torch.manual_seed(0)

    def tensor(heads: int, length: int, bias: float = 0.0) -> torch.Tensor:
        layout = options.get("layout", "bhnd")
        if layout == "bnhd":
            x = torch.randn(batch, length, heads, dim).transpose(1, 2)
        elif layout == "bhdn":
            x = torch.randn(batch, heads, dim, length).transpose(2, 3)
        else:
            x = torch.randn(batch, heads, length, dim)
        x = x + bias * torch.randn(dim)
        if "fill" in options:
            x = torch.full_like(x, options["fill"])
        return x.to(getattr(torch, dtype))

    q, k, v = tensor(q_heads, q_len), tensor(kv_heads, kv_len, bias=3.0), tensor(kv_heads, kv_len)
    if options.get("layout") == "expanded":
        k, v = (x[:, :1].expand_as(x) for x in (k, v))
    if "poison" in options:
        name, token, value = options["poison"]
        {"q": q, "k": k, "v": v}[name][0, 0, token, 5] = value
    scale = options.get("scale", dim**-0.5)
    if "gain" in options:
        q[:, 0] *= options["gain"]
        k[:, 0] *= options["gain"]
    before = [x.clone() for x in (q, k, v)]
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    attention(Call(q, k, v, scale, 0 if causal else None), out, format=format)

    group = q_heads // kv_heads
    kd, vd = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ kd.transpose(-1, -2) * scale
    visible = (
        torch.ones(q_len, kv_len, dtype=torch.bool).tril() if causal else torch.ones(q_len, kv_len, dtype=torch.bool)
    )
    p = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    expected = p @ vd.nan_to_num(0.0, 0.0, 0.0)
    for value in (float("nan"), float("inf")):  # a row meets what it sees, and nothing that a mask hides from it
        at = vd.isnan() if value != value else vd == value
        expected[(visible.double() @ at.double()) > 0] = value
    finite = expected.isfinite()
    error = (out.double() - expected)[finite].norm() / expected[finite].norm().clamp_min(1e-30)
    unchanged = all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip((q, k, v), before, strict=True))
    return {"error": float(error), "same_places": bool((out.isfinite() == finite).all()), "unchanged": unchanged}


def run_flagged(case: str) -> dict[str, float | bool]:
    """In the interpreter's process: the error of the tiles with a flag, whether all others are as they were and all are
    counted.
    """
    import torch

    from sagecompile.kernels import counts
    from sagecompile.kernels.call import Call
    from sagecompile.kernels.prologue import Prologue
    from sagecompile.kernels.triton.exact import recompute_flagged

    batch, q_heads, kv_heads, q_len, kv_len, dim, dtype, causal, flagged, (norm, weighted, rope) = FLAGGED[case]
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, length, dim).to(getattr(torch, dtype))
        for heads, length in ((q_heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    out = torch.full_like(q, 7.0)
    flags = torch.zeros(batch * q_heads, -(-q_len // 16), dtype=torch.int32)
    exact = torch.zeros(batch * q_heads, q_len, dtype=torch.bool)
    tile = 32 if dtype == "float32" else 64
    for head, row in flagged:
        flags[head, row // 16] = 1
        exact[head, row // tile * tile : (row // tile + 1) * tile] = True
    turns = torch.rand(batch, q_len, dim) * 6.3
    turned = {"rope": rope, "cos": turns.cos(), "sin": turns.sin()} if rope != "none" else {}
    prologue = Prologue(1e-6 if norm else None, torch.randn(dim).to(q.dtype) if weighted else None, **turned)
    call = Call(q, k, v, dim**-0.5, 0 if causal else None, prologue, prologue, case)
    recompute_flagged(call, out, flags, flag_rows=16)
    counted = counts.read()[case] == (1, exact.numel(), int(exact.sum()))
    q, k = prologue.apply(q), prologue.apply(k)
    exact = exact.view(batch, q_heads, q_len)
    k, v = (x.double().repeat_interleave(q_heads // kv_heads, 1) for x in (k, v))
    scores = q.double() @ k.mT * dim**-0.5
    if causal:
        scores.masked_fill_(torch.ones(q_len, kv_len, dtype=torch.bool).triu(1), float("-inf"))
    expected = (scores.softmax(-1) @ v)[exact]
    error = (out[exact].double() - expected).norm() / expected.norm().clamp_min(1e-300)
    return {"error": float(error), "unchanged": bool((out[~exact] == 7.0).all()), "counted": counted}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float | bool]]:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("format", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(results: dict[str, dict[str, float | bool]], case: str, format: str) -> None:
    result = results[f"{case} / {format}"]
    assert result["same_places"], "a value is finite where float64 has none, or the other way round"
    assert result["unchanged"], "an input was modified"
    assert result["error"] <= LIMITS[format]


@pytest.mark.parametrize("case", FLAGGED)
def test_only_flagged_tiles_are_computed_again(results: dict[str, dict[str, float | bool]], case: str) -> None:
    """The exact kernel, with a flag for every 16 rows: tiles of 64 rows (32 in float32) that hold a flagged row."""
    assert results[case]["unchanged"], "a tile without a flag was written"
    assert results[case]["counted"], "calls, rows or exact rows are not those of this call"
    assert results[case]["error"] <= 5e-3


if __name__ == "__main__":
    correct_interpreter()
    found = {f"{case} / {format}": run_case(case, format) for case in CASES for format in LIMITS}
    print(json.dumps(found | {case: run_flagged(case) for case in FLAGGED}))
