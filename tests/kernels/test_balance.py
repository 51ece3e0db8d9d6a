"""The kernel that balances the channels of Q and K on GPUs, against the specification.

In: q, k with unlike channels, with and without a prologue. Out: factors that are the nearest powers of two of those of
sagecompile.ops.quantize, and K's mean. Without a GPU in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sagecompile.kernels.prologue import Prologue
from sagecompile.ops import quantize


def check(device: str) -> None:
    """What the kernel makes of some calls."""
    from sagecompile.kernels.triton import balance as module

    quantize.SAMPLE = module.SAMPLE.value
    generator = torch.Generator().manual_seed(0)
    for batch, heads, kv_heads, q_len, kv_len, dim, width in (
        (2, 4, 2, 200, 300, 64, 64),
        (1, 2, 2, 70, 33, 96, 96),
        (1, 3, 1, 50, 500, 40, 64),
        (1, 8, 2, 400, 400, 128, 128),
    ):
        q = torch.randn(batch, q_len, heads, dim, generator=generator).transpose(1, 2).to(device)
        k = torch.randn(batch, kv_heads, kv_len, dim, generator=generator).to(device)
        k[..., 3] *= 40
        k[..., 5] += 50
        q[..., 7] *= 9
        q_factor, k_factor, mean = module.balance(q, k, width).basis.view(batch, kv_heads, 3, width).unbind(2)
        k_mean = quantize.sample(k).mean(-2)
        wanted = quantize.balance(q.reshape(batch, kv_heads, -1, dim), k - k_mean[:, :, None]).squeeze(2)
        exponent = q_factor.log2()
        assert torch.equal(exponent, exponent.round()) and torch.equal(q_factor * k_factor, torch.ones_like(q_factor))
        assert (exponent[..., :dim] - wanted.log2()).abs().max() < 0.51 and not exponent[..., dim:].any()
        assert exponent[..., 3].min() >= 2 and exponent[..., 7].max() <= -1
        torch.testing.assert_close(mean[..., :dim] * q_factor[..., :dim], k_mean, rtol=1e-5, atol=1e-4)

    x = torch.randn(1, 2, 100, 64, generator=generator).to(device)
    weight, (cos, sin) = torch.rand(64, generator=generator), torch.randn(2, 1, 100, 64, generator=generator)
    prologue = Prologue(1e-6, weight.to(device), "half", cos.to(device), sin.to(device))
    after = prologue.apply(x)
    found = module.balance(x, x, 64, q_prologue=prologue, k_prologue=prologue).basis
    torch.testing.assert_close(found, module.balance(after, after, 64).basis, rtol=1e-4, atol=1e-5)

    k[0, 0, 0, 0] = float("nan")
    broken = module.balance(q, k, width).basis
    assert broken[0, 2].isnan().any() and broken[:, :2].isfinite().all(), "K's mean says it, factors stay numbers"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(quantize, "SAMPLE", quantize.SAMPLE)  # `check` sets it
    check("cuda")


def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-c", "import test_balance; test_balance.check('cpu')"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
