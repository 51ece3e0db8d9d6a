"""The report: its line, its table and its JSON; and `explain` on real callables."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from sagecompile import explain
from sagecompile.decide import Keep, Use
from sagecompile.report import Entry, Report, record, recording
from sagecompile.site import AttentionSite


def entry(name, decision):
    site = AttentionSite(name, "model.py:7", "sdpa", 2, 16, 4, 512, 1024, 64, 64, "bfloat16", "cpu", is_causal=True)
    return Entry(site, decision)


REPORT = Report(
    (
        entry("layers.0", Use("qk_int8_pv_fp16", "reference")),
        entry("layers.1", Keep("head_dim 256: needs at most 128")),
        entry("layers.2", Keep("head_dim 256: needs at most 128")),
        entry("layers.3", Keep("dropout_p 0.1: needs 0 (model.eval())")),
    )
)


def test_summary_counts_by_cause():
    assert REPORT.summary() == "1 of 4 attention sites rewritten; kept: head_dim 256 (2), dropout_p 0.1 (1)"
    assert Report().summary() == "no attention sites found"


def test_used_and_kept():
    assert [e.site.name for e in REPORT.used] == ["layers.0"]
    assert [e.site.name for e in REPORT.kept] == ["layers.1", "layers.2", "layers.3"]


def test_table_shows_every_site_shape_and_reason():
    lines = str(REPORT).splitlines()
    assert len(lines) == 6
    assert (
        "layers.0" in lines[1] and "2x16/4x512-1024x64" in lines[1] and "use qk_int8_pv_fp16 by reference" in lines[1]
    )
    assert lines[2].endswith("keep: head_dim 256: needs at most 128")


def test_json_is_plain():
    found = json.loads(json.dumps(REPORT.to_dict()))
    assert found["used"] == 1 and found["kept"] == 3
    assert found["entries"][0]["site"]["q_len"] == 512
    assert found["entries"][1]["decision"] == {"used": False, "reason": "head_dim 256: needs at most 128"}


def test_recording_collects_only_inside_and_nests():
    with recording() as outer:
        record(Report())
        with recording() as inner:
            record(REPORT)
    record(REPORT)
    assert len(outer) == 2 and inner == [REPORT]


def attend(q):
    return F.scaled_dot_product_attention(q, q, q)


def test_explain_does_not_rewrite_what_it_runs(monkeypatch):
    monkeypatch.setenv("SAGECOMPILE_POLICY", "always")
    model = torch.nn.Identity()
    model.forward = lambda q: seen.append(attend(q)) or seen[-1]  # type: ignore[method-assign]
    seen: list[torch.Tensor] = []
    q = torch.randn(1, 2, 64, 64)
    report = explain(attend, q)
    assert len(report.used) == 1 and report.graphs == 1


def test_explain_takes_the_options_of_a_compiled_module(monkeypatch):
    monkeypatch.setenv("SAGECOMPILE_POLICY", "never")

    class Model(torch.nn.Module):
        def forward(self, q):
            return attend(q)

    q = torch.randn(1, 2, 64, 64)
    compiled = torch.compile(Model(), backend="sage_inductor", options={"sage.policy": "always"})
    assert len(explain(compiled, q).used) == 1
    assert explain(Model(), q).kept[0].decision.cause == "policy=never"


def test_explain_takes_the_options_of_a_compiled_function():
    q = torch.randn(1, 2, 64, 64)
    compiled = torch.compile(attend, backend="sage_inductor", options={"sage.policy": "always"})
    assert len(explain(compiled, q).used) == 1


def test_explain_takes_the_options_of_module_compile():
    class Model(torch.nn.Module):
        def forward(self, q):
            return attend(q)

    model = Model()
    model.compile(backend="sage_inductor", options={"sage.policy": "always"})
    assert len(explain(model, torch.randn(1, 2, 64, 64)).used) == 1


def test_explain_can_be_called_again_and_again():
    for length in range(10, 30):  # more often than Dynamo's recompile limit
        (found,) = explain(attend, torch.randn(1, 2, length, 64)).entries
        assert found.site.q_len == length, "what was seen before makes nothing dynamic"


@pytest.mark.parametrize("what", ["a module", "a function", "Module.compile"])
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_explain_is_as_dynamic_as_the_compiled_model(what, dynamic):
    class Model(torch.nn.Module):
        def forward(self, q):
            return attend(q)

    model = attend if what == "a function" else Model()
    compiled = torch.compile(model, backend="sage_inductor", dynamic=dynamic)
    if what == "Module.compile":
        model.compile(backend="sage_inductor", dynamic=dynamic)
        compiled = model
    (found,) = explain(compiled, torch.randn(1, 2, 64, 64)).entries
    assert isinstance(found.site.q_len, int) == (not dynamic)


def test_explain_of_a_symbolic_length_says_so():
    def model(q):
        return attend(q)

    q = torch.randn(1, 2, 64, 64)
    torch._dynamo.mark_dynamic(q, 2)
    (found,) = explain(model, q).entries
    assert not isinstance(found.site.q_len, int)
    assert isinstance(found.to_dict()["site"]["q_len"], str)


@pytest.mark.parametrize("policy", ["always", "never"])
def test_str_and_json_agree_on_the_count(policy, monkeypatch):
    monkeypatch.setenv("SAGECOMPILE_POLICY", policy)
    report = explain(attend, torch.randn(1, 2, 64, 64))
    assert report.to_dict()["used"] == len(report.used) == (policy == "always")
