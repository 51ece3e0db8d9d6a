"""What Inductor makes of a QK-norm and RoPE against a copy, on this CPU, where it takes many."""

from __future__ import annotations

import pytest
import torch

from sagecompile.cli.bench import prologues
from sagecompile.cost.profile import Time
from sagecompile.site import Prologue

CPU = torch.device("cpu")


@pytest.mark.parametrize("made", [Prologue(norm=True, rope="half"), Prologue(rope="interleaved")], ids=lambda x: x.kind)
def test_inductors_kernels_take_more_than_a_copy(monkeypatch, made):
    monkeypatch.setattr(prologues, "COMPILED", 1)
    with torch.no_grad():
        assert prologues.copies_by_inductor(CPU, made, heads=4, tokens=200, head_dim=64) > 1


@pytest.mark.parametrize(("us", "copies"), [(20.0, 2.0), (5.0, 1.0)], ids=["the faster", "at least a copy"])
def test_of_several_compilations_the_fastest_counts(monkeypatch, us, copies):
    times = {"copy": Time(10.0), "0": Time(30.0), "1": Time(us)}
    monkeypatch.setattr(prologues, "compiled_apart", lambda *_: lambda: None)
    monkeypatch.setattr(prologues, "interleaved_times", lambda calls, *_, **__: {name: times[name] for name in calls})
    assert prologues.copies_by_inductor(CPU, Prologue(rope="half"), 2, 9, 64) == copies


def test_a_copy_is_of_bytes():
    one, ten = (min(prologues.copy_us(CPU, size) for _ in range(3)) for size in (1 << 20, 10 << 20))
    assert 0 < one < ten
