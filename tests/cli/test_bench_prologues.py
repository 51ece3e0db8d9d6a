"""What Inductor makes of a QK-norm and RoPE against a copy, on this CPU."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import metrics

from sagecompile.cli.bench import prologues
from sagecompile.cli.bench.block import Block, angles
from sagecompile.cost.profile import Time
from sagecompile.site import Prologue

CPU = torch.device("cpu")


@pytest.mark.parametrize("made", [Prologue(norm=True, rope="half"), Prologue(rope="interleaved")], ids=lambda x: x.kind)
def test_what_inductor_makes_of_it_is_timed_against_a_copy(monkeypatch, made):
    """What is called is looked at, not how long that takes, which depends on who else is at work."""
    calls = {}

    def times_of(given, *_, **__):
        calls.update(given)
        return {name: Time(10.0 if name == "copy" else 25.0) for name in given}

    monkeypatch.setattr(prologues, "interleaved_times", times_of)
    metrics.reset()
    with torch.no_grad():
        assert prologues.copies_by_inductor(CPU, made, heads=4, tokens=200, head_dim=64) == 2.5
        assert metrics.generated_kernel_count >= prologues.COMPILED == len(calls) - 1
        q, k = calls.pop("copy")()
        block = Block(64, made.rope, is_causal=False, norm=made.norm).to(torch.bfloat16)
        expected, _ = block.prologues(q, k, **angles(200, 64, made.rope, torch.bfloat16, CPU))
        for compiled in calls.values():
            torch.testing.assert_close(compiled(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("us", "copies"), [(20.0, 2.0), (5.0, 1.0)], ids=["the faster", "at least a copy"])
def test_of_several_compilations_the_fastest_counts(monkeypatch, us, copies):
    times = {"copy": Time(10.0), "0": Time(30.0), "1": Time(us)}
    monkeypatch.setattr(prologues, "compiled_apart", lambda *_: lambda: None)
    monkeypatch.setattr(prologues, "interleaved_times", lambda calls, *_, **__: {name: times[name] for name in calls})
    assert prologues.copies_by_inductor(CPU, Prologue(rope="half"), 2, 9, 64) == copies


@pytest.mark.parametrize("size", [1 << 10, 10 << 20])
def test_a_copy_is_of_bytes(monkeypatch, size):
    monkeypatch.setattr(prologues, "interleaved_times", lambda calls, *_, **__: {"copy": Time(calls["copy"]().nbytes)})
    assert prologues.copy_us(CPU, size) == size
