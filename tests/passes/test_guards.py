"""Symbolic lengths through Dynamo itself: what is guarded, what may not be, and how many graphs that makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache

from sagecompile import cost, explain, formats
from sagecompile.cost.profile import Family, Point, Profile
from sagecompile.decide import Use
from sagecompile.kernels import available
from sagecompile.report import recording


@pytest.fixture(autouse=True)
def wins_from_64(monkeypatch):
    """The reference does, by a profile of this CPU that knows nothing shorter."""
    torch._dynamo.reset()
    monkeypatch.setitem(formats.PROVIDERS, "reference", replace(formats.PROVIDERS["reference"], may_win=True))
    us = {"sdpa": 2.0, "qk_int8_pv_fp16 reference": 1.0}
    points = tuple(Point(Family("float32", 32, False), 1, length, us) for length in (64, 4096))
    name = available.device("cpu").name
    monkeypatch.setattr(cost, "profiles", lambda: {name: Profile(name, "2026-01-01", points)})


def attend(q):
    return F.scaled_dot_product_attention(q, q, q)


def marked(length, **promised):
    x = torch.randn(2, 4, length, 32)
    torch._dynamo.mark_dynamic(x, 2, **promised)
    return x


@pytest.mark.parametrize(
    ("promised", "reason"),
    [
        ({}, None),
        ({"min": 64, "max": 4096}, None),
        ({"min": 16, "max": 4096}, "range begins below 64 tokens: mark_dynamic with min=64, or without a range"),
    ],
    ids=["no range", "all of it wins", "some of it wins"],
)
def test_a_promised_range_is_not_narrowed(promised, reason):
    """Dynamo raises for a guard that some sizes of the range would fail."""
    with torch.no_grad():
        (entry,) = explain(attend, marked(100, **promised)).entries
    assert not isinstance(entry.site.q_len, int)
    if reason is None:
        assert isinstance(entry.decision, Use)
    else:
        assert entry.decision.reason == reason


@pytest.mark.parametrize("policy", ["auto", "always", "never"])
def test_no_guard_of_ours_comes_back_from_inductors_caches(policy):
    """Of the same graph, compiled before by a crossing: into a range that no guard may narrow, or by no crossing."""
    options = {"sage.policy": policy}
    with fresh_cache(), torch.no_grad():
        for length in (33, 100):  # kept below 64, used from there on
            torch.compile(attend, backend="sage_inductor")(marked(length))
            torch._dynamo.reset()
        for length in (33, 100):
            compiled = torch.compile(attend, backend="sage_inductor", options=options)
            with recording() as reports:
                compiled(marked(length, min=16, max=4096))
                compiled(torch.randn(2, 4, 133 - length, 32))
            assert len(reports) == 1
            torch._dynamo.reset()


def test_lengths_of_their_own_have_a_graph_for_each_set_of_answers():
    def model(*inputs):
        return [attend(x.unflatten(-1, (4, 32)).transpose(1, 2)) for x in inputs]

    compiled = torch.compile(model, backend="sage_inductor", dynamic=True)
    with torch.no_grad(), recording() as reports:
        for of_x, of_y in ((100, 90), (200, 300), (40, 90), (30, 70), (100, 20), (30, 20), (31, 21), (101, 31)):
            compiled(torch.randn(2, of_x, 128), torch.randn(2, of_y, 128))
    assert [len(report.used) for report in reports] == [2, 1, 1, 0]
