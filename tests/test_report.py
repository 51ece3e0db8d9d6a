"""The report: its line, its table and its JSON; and `explain` on real callables."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from sagecompile import explain
from sagecompile.decide import Keep, Use
from sagecompile.mask import CAUSAL
from sagecompile.passes import find
from sagecompile.report import Entry, Report, record, recording
from sagecompile.site import AttentionSite


def entry(name, decision):
    site = AttentionSite(name, "model.py:7", "sdpa", 2, 16, 4, 512, 1024, 64, 64, "bfloat16", "cpu", mask=CAUSAL)
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


def of_images(x):
    """Batch, height and width change; two calls on one line, equal in all that is known of them."""
    q = x.flatten(2).transpose(1, 2).unflatten(-1, (4, 16)).transpose(1, 2)
    return attend(q).sin() + F.scaled_dot_product_attention(q * 2, q, q) - F.scaled_dot_product_attention(q, q, -q)


def across(x):
    """Queries and keys of lengths that change independently."""
    q, k = (x[:, :, i].flatten(2).unflatten(1, (4, 16)).transpose(2, 3) for i in range(2))
    return F.scaled_dot_product_attention(q[:, :, 1:], k, k)


def reports_of(model, *shapes):
    """Of a graph for each shape, none of whose sizes are numbers."""
    torch._dynamo.reset()
    with torch.no_grad(), recording() as reports:
        compiled = torch.compile(model, backend="sage_inductor", options={"sage.policy": "always"}, dynamic=True)
        for shape in shapes:
            compiled(torch.randn(shape))
    assert len(reports) == len(shapes)
    assert not any(isinstance(entry.site.q_len, int) for report in reports for entry in report.entries)
    return reports


def test_entries_of_two_graphs_with_symbolic_sizes_can_be_compared():
    """Equal is what reads the same; torch cannot compare the symbols of two graphs."""
    square, wide = reports_of(of_images, (2, 64, 8, 8), (2, 64, 8, 12))
    both = square + wide
    assert all(entry in both.used for entry in both.entries) and len(both.used) == 6
    assert not any(entry in square.entries for entry in wide.entries)
    assert both.kept == () and square != wide and both == square + wide
    assert [both.entries.index(entry) for entry in both.entries] == [0, 1, 1, 3, 4, 4]


def test_entries_with_symbolic_sizes_can_be_counted():
    square, wide = reports_of(of_images, (2, 64, 8, 8), (2, 64, 8, 12))
    assert len({*square.entries, *wide.entries}) == 4
    assert len({entry.site: entry.decision for entry in (*square.entries, *wide.entries)}) == 4
    assert len({square, wide, square + wide}) == 3


def test_the_same_graph_compiled_twice_gives_equal_reports():
    (first,) = reports_of(across, (2, 64, 2, 8, 9))
    (again,) = reports_of(across, (2, 64, 2, 8, 9))
    assert first.entries[0].site.q_len is not again.entries[0].site.q_len
    assert first == again and hash(first) == hash(again) and set(first.entries) == set(again.entries)


def test_explain_of_symbolic_sizes_can_be_compared_with_that_of_numbers():
    symbolic = explain(torch.compile(across, backend="sage_inductor", dynamic=True), torch.randn(2, 64, 2, 8, 9))
    fixed = explain(across, torch.randn(2, 64, 2, 8, 9))
    assert isinstance(fixed.entries[0].site.kv_len, int)
    assert symbolic != fixed and not set(symbolic.entries) & set(fixed.entries)


def test_comparing_sites_adds_no_guard():
    """Nor does a set of them, also while their graph is compiled."""
    seen = []

    def backend(gm, example_inputs):
        sites = [match.site for match in find(gm.graph)]
        guards = torch._guards.TracingContext.get().fake_mode.shape_env.guards
        before = list(map(str, guards))
        seen.append(len(set(sites)) + [sites[0], sites[2]].count(sites[1]))
        assert list(map(str, guards)) == before
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(of_images, backend=backend, dynamic=True)(torch.randn(2, 64, 8, 12))
    assert seen == [2 + 1]


def test_a_site_is_no_tuple():
    site = REPORT.entries[0].site
    assert site == REPORT.entries[0].site and site != "layers.0" and site is not None
    assert site != REPORT.entries[1].site, "another name"
