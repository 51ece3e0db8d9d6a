"""`explain(measure_error=True)`: its figures against those computed here, on graphs of every kind."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sagecompile import OptionError, exact_rows, explain, measure
from sagecompile.kernels import counts, cpu
from sagecompile.kernels.call import Call
from sagecompile.ops import attention, reference
from sagecompile.report import Entry, Measured
from tests.support import FAST, exact_attention, hard_inputs, relative_error, turned_by_rope

calls = itertools.count()
HARD_KEYS = "a bias of 150 in 4 channels that RoPE turns, halves"


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setenv("SAGECOMPILE_POLICY", "always")


@pytest.fixture(params=["cpu", "reference"])
def provider(request, monkeypatch):
    """The kernel, or the specification as on a CPU that has none."""
    if request.param == "cpu" and cpu.why_not() is not None:
        pytest.skip(f"the CPU kernel cannot run here: {cpu.why_not()}")
    if request.param == "reference":
        monkeypatch.setenv("SAGECOMPILE_FORMATS", FAST)
    return request.param


class Attention(torch.nn.Module):
    def forward(self, q, k, v, is_causal=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


class Model(torch.nn.Module):
    """One layer with plain keys, one with hard ones, and one with a mask, which is kept; a graph break between."""

    def __init__(self, with_break=False):
        super().__init__()
        self.plain, self.hard, self.kept = Attention(), Attention(), Attention()
        self.with_break = with_break

    def forward(self, plain, hard, mask):
        out = self.plain(*plain)
        if self.with_break:
            torch._dynamo.graph_break()
        out = out + F.scaled_dot_product_attention(*hard, mask, enable_gqa=True)
        return out + self.hard(*hard)


def inputs(tokens=300):
    hard = hard_inputs(HARD_KEYS, tokens, 64, 4, 2)
    mask = torch.rand(tokens, tokens) < 0.9
    mask[:, 0] = True
    return tuple(torch.randn_like(x) for x in hard), hard, mask


def by_hand(provider, format, q, k, v, *, scale=None, is_causal=False):
    """Error and share of exact rows of a call of the op."""
    ahead = 0 if is_causal else None
    how = {"scale": scale, "ahead": ahead, "format": format, "provider": provider, "tokens_first": False}
    name = f"by hand, call {next(calls)}"
    error = relative_error(attention(q, k, v, **how, site=name), exact_attention(q, k, v, scale, is_causal))
    if provider == "cpu":
        return error, exact_rows()[name].exact / q[..., 0].numel()
    rows = reference.exact_rows(Call(q, k, v, scale or q.shape[-1] ** -0.5, ahead), format=format)
    return error, float(rows.float().mean())


@pytest.mark.parametrize("with_break", [False, True])
def test_figures_are_those_of_each_site_and_hard_keys_show(provider, with_break):
    plain, hard, mask = inputs()
    report = explain(Model(with_break), plain, hard, mask, measure_error=True)
    assert report.graphs == 1 + with_break and len(report.used) == 2 and len(report.kept) == 1
    found = {entry.site.name: entry for entry in report.entries}
    assert found["(top level)"].measured is None
    for name, given in (("plain", plain), ("hard", hard)):
        use, measured = found[name].decision, found[name].measured
        assert use.provider == provider
        expected = by_hand(provider, use.format, *given, is_causal=True)
        assert (measured.error, measured.exact_rows, measured.calls) == (*map(pytest.approx, expected), 1)
    assert found["hard"].measured.exact_rows > 0.5 and found["plain"].measured.exact_rows == 0


def test_the_model_runs_rewritten(provider):
    seen = []

    def model(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v)
        torch._dynamo.graph_break()
        seen.append(out)
        return out

    given = tuple(torch.randn(1, 2, 100, 64) for _ in range(3))
    (entry,) = explain(model, *given, measure_error=True).entries
    assert relative_error(seen[-1], exact_attention(*given)) == pytest.approx(entry.measured.error)
    explain(model, *given)
    assert relative_error(seen[-1], exact_attention(*given)) < 1e-5, "without, what runs is the model's own graph"


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_heads_that_8_bits_cannot_hold_are_exact(provider, special):
    q, k, v = (torch.randn(2, 4, 100, 64) for _ in range(3))
    v[1, 2, 7, 3] = special
    q[0, 0] *= 300
    (entry,) = explain(lambda *x: F.scaled_dot_product_attention(*x), q, k, v, measure_error=True).entries
    assert entry.measured.exact_rows == pytest.approx(2 / 8)
    assert 0.001 < entry.measured.error < 0.045


def test_of_who_does_not_tell_it_is_the_specification(monkeypatch):
    """As of `sageattention`."""
    q, k, v = inputs()[1]
    (told,) = explain(Attention(), q, k, v, measure_error=True).entries
    monkeypatch.setattr(counts, "read", lambda wait: {})
    (specified,) = explain(Attention(), q, k, v, measure_error=True).entries
    assert told.measured.exact_rows > 0.5
    assert specified.measured.exact_rows == pytest.approx(told.measured.exact_rows, abs=0.05)


def test_prologues_count_as_part_of_the_site(monkeypatch):
    """They are those of the graph: the op is given q and k as the projections leave them."""
    monkeypatch.setenv("SAGECOMPILE_FORMATS", FAST)
    q, k, v = hard_inputs("a channel of K times 3", 200, 64, 4, 2)
    angle = torch.outer(torch.arange(200.0), 1e4 ** (-torch.arange(0, 64, 2) / 64)).repeat(1, 2)[None]

    def turned(x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    def model(q, k, v, cos, sin):
        return F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, scale=0.1, enable_gqa=True)

    (entry,) = explain(model, q, k, v, angle.cos(), angle.sin(), measure_error=True).entries
    assert entry.decision.fused and entry.decision.provider == "reference"
    expected = by_hand("reference", FAST, turned_by_rope(q), turned_by_rope(k), v, scale=0.1)
    assert (entry.measured.error, entry.measured.exact_rows) == pytest.approx(expected, rel=1e-3)


def test_a_graph_that_runs_for_several_layers_has_the_largest_figures(provider):
    """Dynamo compiles a layer's frame once where the model around it cannot be captured."""
    plain, hard, _ = inputs()
    layer = Attention()

    def model(*calls):
        out = []
        for given in calls:
            torch._dynamo.graph_break()
            out.append(layer(*given))
        return out

    (entry,) = explain(model, hard, plain, measure_error=True).entries
    figures = [by_hand(provider, entry.decision.format, *given, is_causal=True) for given in (hard, plain)]
    assert entry.measured.calls == 2
    assert entry.measured.error == pytest.approx(max(error for error, _ in figures))
    assert entry.measured.exact_rows == pytest.approx(max(share for _, share in figures))


def test_sites_in_subgraphs_are_measured_and_a_branch_not_taken_is_said_to_be_none(provider):
    def model(q, k, v, flag):
        q = checkpoint(lambda *x: F.scaled_dot_product_attention(*x), q, k, v, use_reentrant=False)
        return torch.cond(
            flag.sum() > 0,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
            lambda q, k, v: F.scaled_dot_product_attention(k, q, v),
            (q, k, v),
        )

    given = tuple(torch.randn(1, 2, 64, 64) for _ in range(3))
    report = explain(model, *given, torch.ones(1), measure_error=True)
    assert sorted(entry.measured.calls for entry in report.entries) == [0, 1, 1]
    assert str(report).count("not run") == 1
    (idle,) = (entry for entry in report.entries if not entry.measured.calls)
    assert idle.to_dict()["measured"] == {"error": None, "exact_rows": None, "calls": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_what_is_compared_with(provider, dtype):
    given = tuple(torch.randn(1, 2, 200, 64) for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        (entry,) = explain(lambda *x: F.scaled_dot_product_attention(*x), *given, measure_error=True).entries
    expected = by_hand(provider, entry.decision.format, *(x.to(dtype) for x in given))
    assert (entry.measured.error, entry.measured.exact_rows) == pytest.approx(expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_len, kv_len", [(70, 130), (130, 70)])
def test_the_error_is_the_same_by_small_parts(monkeypatch, is_causal, q_len, kv_len):
    monkeypatch.setattr(measure, "MAX_SCORES", 2000)
    q, k, v = torch.randn(2, 4, q_len, 32), torch.randn(2, 2, kv_len, 32), torch.randn(2, 2, kv_len, 32)
    report = explain(lambda *x: Attention()(*x, is_causal), q, k, v, measure_error=True)
    (entry,) = report.entries
    expected = by_hand(entry.decision.provider, entry.decision.format, q, k, v, is_causal=is_causal)
    assert entry.measured.error == pytest.approx(expected[0])


def test_sizes_that_are_symbols_and_options_of_a_compiled_model():
    model = torch.compile(Attention(), backend="sage_inductor", dynamic=True, options={"sage.formats": FAST})
    (entry,) = explain(model, *inputs()[0], measure_error=True).entries
    assert not isinstance(entry.site.q_len, int) and entry.decision.format == FAST
    assert 0.01 < entry.measured.error < 0.045 and entry.measured.calls == 1


def test_what_needs_a_gradient_is_kept_and_not_measured():
    q = torch.randn(1, 2, 64, 64, requires_grad=True)
    (entry,) = explain(Attention(), q, q, q, measure_error=True).entries
    assert entry.measured is None


def test_no_tokens_are_no_call():
    (entry,) = explain(Attention(), *(torch.randn(1, 2, 0, 64) for _ in range(3)), measure_error=True).entries
    assert entry.measured is None or entry.measured.calls == 0


def test_without_it_nothing_is_measured_and_the_table_is_as_it_was():
    report = explain(Attention(), *inputs()[0])
    assert report.used[0].measured is None and "error" not in str(report)
    assert report.to_dict()["entries"][0]["measured"] is None


def test_table_and_json():
    report = explain(Model(), *inputs(), measure_error=True)
    header, plain, kept, hard, _ = str(report).splitlines()
    column = header.index("error")
    assert header[column:].split()[:4] == ["error", "exact", "rows", "decision"]
    assert plain[column:].split()[:2] == [f"{report.entries[0].measured.error:#.2g}", "0.0%"]
    assert kept[column:].startswith(" ") and hard[column:].split()[1].endswith("%")
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))["entries"]
    assert found[0]["measured"] == {"error": report.entries[0].measured.error, "exact_rows": 0.0, "calls": 1}


def test_an_error_that_is_no_number_is_valid_json():
    measured = Measured()
    measured.add(float("inf"), 0.0001)
    assert measured.to_dict() == {"error": None, "exact_rows": 0.0001, "calls": 1}


def test_equal_reports_stay_equal():
    given = inputs()
    measured, plain = explain(Model(), *given, measure_error=True), explain(Model(), *given)
    assert measured == plain and hash(measured) == hash(plain)
    assert isinstance(measured.entries[0], Entry)


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_anything_but_true_or_false_is_an_error(wrong):
    with pytest.raises(OptionError, match=r"measure_error .*: it can be True, False"):
        explain(Attention(), *inputs()[0], measure_error=wrong)
