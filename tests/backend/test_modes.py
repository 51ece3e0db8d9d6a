"""The backend in every way torch.compile calls it: modes, dynamic shapes, graph breaks, grad modes, training.

What runs is the rewritten graph through Inductor on the CPU; the answer is compared with the model's own.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code

import sagecompile
from sagecompile.cli.bench.block import Block as RopeBlock
from sagecompile.cli.bench.block import angles
from sagecompile.cli.bench.shapes import Shape, inputs
from sagecompile.report import Report, recording

ALWAYS = {"sage.policy": "always"}


class Block(nn.Module):
    """A projection, attention over 4 heads of 32, a projection."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(128, 384), nn.Linear(128, 128), causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(attended.transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def total(reports: list[Report]) -> Report:
    return sum(reports, start=Report(graphs=0))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode_reaches_inductor_and_the_site_is_rewritten(mode, monkeypatch):
    monkeypatch.setenv("SAGECOMPILE_POLICY", "always")  # torch.compile takes mode or options, not both
    model, x = Block().eval(), torch.randn(2, 40, 128)
    with torch.no_grad(), recording() as reports:
        out = torch.compile(model, backend="sage_inductor", mode=mode, fullgraph=True)(x)
        assert relative_error(out, model(x)) < 0.02
    assert len(total(reports).used) == 1


def test_mode_and_policy_together_through_inductors_own_list():
    options = {**torch._inductor.list_mode_options("reduce-overhead"), **ALWAYS}
    model, x = Block().eval(), torch.randn(2, 40, 128)
    with torch.no_grad(), recording() as reports:
        torch.compile(model, backend="sage_inductor", options=options)(x)
    assert len(total(reports).used) == 1


def test_unknown_inductor_option_is_inductors_error():
    with torch.no_grad(), pytest.raises(Exception, match="no_such_thing"):
        torch.compile(Block(), backend="sage_inductor", options={"no_such_thing": 1})(torch.randn(1, 8, 128))


def test_unknown_option_of_ours_lists_the_known():
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"sage\.polcy.*sage\.policy, sage\.formats, sage\.min_speedup"),
    ):
        torch.compile(Block(), backend="sage_inductor", options={"sage.polcy": "auto"})(torch.randn(1, 8, 128))


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_lengths(dynamic):
    model = Block().eval()
    compiled = torch.compile(model, backend="sage_inductor", options=ALWAYS, dynamic=dynamic, fullgraph=True)
    with torch.no_grad(), recording() as reports:
        for length in (40, 41, 63, 100):
            x = torch.randn(2, length, 128)
            assert relative_error(compiled(x), model(x)) < 0.02
    assert all(len(report.used) == 1 for report in reports)
    assert len(reports) == {True: 1, False: 4, None: 2}[dynamic]  # graphs compiled: no more than Inductor's own


def test_lengths_that_grow_past_all_crossings_compile_one_graph_more(monkeypatch):
    """`auto` reads one threshold, however many kinds of attention a model has: one graph from it on, one below."""
    from sagecompile import cost, formats

    monkeypatch.setitem(formats.PROVIDERS, "reference", replace(formats.PROVIDERS["reference"], may_win=True))
    from sagecompile.cost.profile import Family, Point, Profile
    from sagecompile.kernels import available

    us = {"sdpa": 2.0, "qk_int8_pv_fp16 reference": 1.0}
    starts = {True: 64, False: 128}
    points = tuple(
        Point(Family("float32", 32, causal), 1, length, us)
        for causal, start in starts.items()
        for length in (start, 4096)
    )
    name = available.device("cpu").name
    monkeypatch.setattr(cost, "profiles", lambda: {name: Profile(name, "2026-01-01", points)})
    model = nn.Sequential(Block(causal=True), Block(causal=False)).eval()
    compiled = torch.compile(model, backend="sage_inductor", dynamic=True)
    with torch.no_grad(), recording() as reports:
        for length in (200, 40, 50, 80, 100, 150, 300):
            compiled(torch.randn(2, length, 128))
    assert [len(report.used) for report in reports] == [2, 0]  # 200 compiles the one, 40 the other, the rest reuse them


@pytest.mark.parametrize(
    ("options", "used"), [({}, False), ({"sage.cuda_graphs": True}, True), ({"triton.cudagraphs": True}, True)], ids=str
)
def test_launches_count_unless_they_are_captured(monkeypatch, options, used):
    """By Inductor, or by the caller, who says so: the launch alone takes longer than SDPA."""
    from sagecompile import cost, formats
    from sagecompile.cost.profile import Family, Point, Profile
    from sagecompile.kernels import available

    monkeypatch.setitem(formats.PROVIDERS, "reference", replace(formats.PROVIDERS["reference"], may_win=True))
    name = "qk_int8_pv_fp16 reference"
    point = Point(Family("float32", 32, True), 1, 40, {"sdpa": 9.0, name: 1.0})
    device = available.device("cpu").name
    monkeypatch.setattr(cost, "profiles", lambda: {device: Profile(device, "2026-01-01", (point,), {name: 100.0})})
    model, x = Block().eval(), torch.randn(2, 40, 128)
    with torch.no_grad(), recording() as reports:
        compiled = torch.compile(model, backend="sage_inductor", options={"sage.measure": False, **options})
        assert relative_error(compiled(x), model(x)) < 0.02
        explained = sagecompile.explain(compiled, x)
    assert [len(report.used) for report in (reports[0], explained)] == [used, used]


def test_graph_breaks_give_one_report_each():
    first, second = Block().eval(), Block().eval()

    def model(x):
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)

    x = torch.randn(2, 40, 128)
    with torch.no_grad(), recording() as reports:
        out = torch.compile(model, backend="sage_inductor", options=ALWAYS)(x)
        assert relative_error(out, second(first(x))) < 0.02
    assert [len(report.used) for report in reports] == [1, 1]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_sites_are_used(context):
    model, x = Block().eval(), torch.randn(2, 40, 128)
    with context(), recording() as reports:
        out = torch.compile(model, backend="sage_inductor", options=ALWAYS)(x)
    assert len(total(reports).used) == 1 and not out.requires_grad


def test_training_keeps_the_site_and_gives_inductors_gradients():
    x = torch.randn(2, 40, 128)
    gradients = {}
    for backend, options in (("inductor", None), ("sage_inductor", ALWAYS)):
        torch.manual_seed(1)
        model = Block()
        torch._dynamo.reset()
        with recording() as reports:
            torch.compile(model, backend=backend, options=options)(x).square().mean().backward()
        gradients[backend] = model.qkv.weight.grad
    assert [entry.decision.cause for entry in total(reports).kept] == ["needs a gradient"]
    torch.testing.assert_close(gradients["sage_inductor"], gradients["inductor"])


def test_a_model_trained_and_then_used_is_compiled_for_both():
    model = Block()
    compiled = torch.compile(model, backend="sage_inductor", options=ALWAYS)
    x = torch.randn(2, 40, 128)
    with recording() as reports:
        compiled(x).mean().backward()
        with torch.no_grad():
            compiled(x)
    assert [len(report.used) for report in reports] == [0, 1]


@pytest.mark.parametrize("inside", [True, False], ids=["autocast in the model", "autocast around it"])
def test_autocast_gives_the_dtype_it_gives_without_us(inside):
    block = Block().eval()

    def model(x):
        if not inside:
            return block(x)
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    x = torch.randn(2, 40, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not inside), recording() as reports:
        out, expected = torch.compile(model, backend="sage_inductor", options=ALWAYS)(x), model(x)
    assert out.dtype == expected.dtype and relative_error(out, expected) < 0.02
    assert [entry.site.dtype for entry in total(reports).used] == ["bfloat16"]


def test_one_log_line_per_graph(caplog):
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="sagecompile"):
        torch.compile(Block().eval(), backend="sage_inductor", options=ALWAYS)(torch.randn(2, 40, 128))
    assert [record.message for record in caplog.records] == ["1 of 1 attention sites rewritten"]


def test_never_leaves_the_graph_alone():
    model, x = Block().eval(), torch.randn(2, 40, 128)
    with torch.no_grad(), recording() as reports:
        out = torch.compile(model, backend="sage_inductor", options={"sage.policy": "never"})(x)
        torch._dynamo.reset()
        torch.testing.assert_close(out, torch.compile(model, backend="inductor")(x), rtol=0, atol=0)
    assert [entry.decision.cause for entry in total(reports).kept] == ["policy=never"]


def test_two_policies_on_one_model_do_not_share_a_graph():
    model, x = Block().eval(), torch.randn(2, 40, 128)
    with torch.no_grad(), recording() as reports:
        for policy in ("never", "always"):
            torch.compile(model, backend="sage_inductor", options={"sage.policy": policy})(x)
    assert [len(report.used) for report in reports] == [0, 1]


@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_what_is_kept_compiles_to_inductors_own_code(rope):
    """Byte for byte: nothing else is different, so nothing else is slower."""
    shape, device = Shape("bfloat16", 64, True, 40, 2, 2), torch.device("cpu")
    q, k, v = inputs(shape, device, tokens_first=True)
    given = {"q": q, "k": k, "v": v} | angles(40, 64, rope, torch.bfloat16, device)
    block = RopeBlock(64, rope, is_causal=True).to(torch.bfloat16)

    def generated(**how):
        torch._dynamo.reset()
        with torch.no_grad(), fresh_cache(), recording() as reports:
            _, code = run_and_get_code(torch.compile(lambda **x: block(**x), dynamic=False, **how), **given)
        assert not any(report.used for report in reports)
        return re.sub(r"/tmp/\S+|c[a-z0-9]{40,}|AOT ID: .*", "", "\n".join(code))  # where this process keeps it

    expected = generated(backend="inductor")
    for options in ({"sage.policy": "never"}, {"sage.policy": "auto", "sage.min_speedup": 1000.0}):
        assert generated(backend="sage_inductor", options=options) == expected and "scaled_dot_product" in expected
