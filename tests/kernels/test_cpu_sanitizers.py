"""The CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer, over the shapes and layouts of test_cpu.py.

In: the same C++ with two more flags, in a process of its own, because its runtime must be loaded before Python.
Out: nothing; the first wrong access or undefined operation ends that process with a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sagecompile.kernels import cpu

ROOT = Path(__file__).parents[2]
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")

RUN = f"""
import itertools, torch
from sagecompile.kernels import cpu
from sagecompile.kernels.cpu import build
from tests.kernels import test_cpu as grid

def run(layout=None, causal=False, **sizes):
    q, k, v = grid.inputs(**sizes)
    q, k, v = map(layout, (q, k, v)) if layout else (q, k, v)
    grid.assert_accurate(q, k, v, causal=causal)

for bf16 in {{True, False}} if "avx512_bf16" in build.features() else {{False}}:
    kernel = build.function(*{FLAGS!r}, bf16=bf16)
    cpu.function = lambda: kernel
    torch.manual_seed(0)
    for length, causal in itertools.product(grid.LENGTHS, (False, True)):
        run(q_len=length, kv_len=length, dim=72, causal=causal)
    for (q_len, kv_len), causal in itertools.product(grid.PAIRS, (False, True)):
        run(q_heads=4, q_len=q_len, kv_len=kv_len, dim=40, causal=causal)
    for dim, dtype in itertools.product(grid.HEAD_DIMS, (torch.float32, torch.bfloat16, torch.float16)):
        run(q_len=100, kv_len=70, dim=dim, dtype=dtype)
    for layout, dtype in itertools.product(grid.LAYOUTS, (torch.float32, torch.bfloat16, torch.float16)):
        run(layout, q_len=45, kv_len=77, dim=33, dtype=dtype)
    for value in (float("nan"), float("inf"), 1e38):
        for where in range(3):
            tensors = grid.inputs(q_len=50, kv_len=50)
            tensors[where][0, 1, 20, 5] = value
            grid.attend(*tensors)
print("clean")
"""


def runtime(name: str) -> str | None:
    """Where the compiler keeps a sanitizer's runtime, if it does."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    found = subprocess.run([get_cpp_compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout
    path = Path(found.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


@pytest.mark.skipif(cpu.why_not() is not None, reason=f"the CPU kernel cannot run here: {cpu.why_not()}")
def test_no_wrong_access_and_nothing_undefined():
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if None in libraries:
        pytest.skip("needs the compiler's sanitizer runtimes: libasan.so and libubsan.so")
    env = {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, libraries)),
        # Python and torch do not free what lives as long as the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.endswith("clean\n"), result.stderr[-6000:]
