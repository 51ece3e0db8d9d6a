"""What we add to the compile time of a 32-layer model: at most 10% of what Inductor takes."""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sagecompile import passes
from sagecompile.report import recording

LAYERS = 32


def test_the_pass_takes_at_most_a_tenth_of_compiling(monkeypatch):
    """Both times are from one run, so that a busy machine slows them alike."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    spent = []
    original = passes.run

    def timed(*args):
        start = time.perf_counter()
        report = original(*args)
        spent.append(time.perf_counter() - start)
        return report

    monkeypatch.setattr(passes, "run", timed)
    torch._dynamo.reset()
    start = time.perf_counter()
    with torch.no_grad(), recording() as reports, torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend="sage_inductor", options={"sage.policy": "always"})
        compiled(torch.zeros(1, 32, dtype=torch.long), use_cache=False)
    whole = time.perf_counter() - start
    assert sum(len(report.used) for report in reports) == LAYERS
    assert sum(spent) <= 0.1 * (whole - sum(spent)), f"{sum(spent):.2f} s of {whole:.2f} s"
