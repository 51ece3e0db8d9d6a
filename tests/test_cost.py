"""Predictions come from a profile's measurements, and from nothing else; the shipped profiles are well-formed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sagecompile import cost
from sagecompile.cost.timer import WARM_UPS, interleaved_median_us
from sagecompile.formats import FORMATS, PROVIDERS
from sagecompile.site import AttentionSite

SITE = AttentionSite("layers.0", "model.py:1", "sdpa", 1, 16, 16, 2048, 2048, 128, 128, "bfloat16", "cuda:0")


class Symbolic:
    """Counts the comparisons, each of which would be a Dynamo guard."""

    def __init__(self, value):
        self.value, self.compared = value, 0

    def __ge__(self, other):
        self.compared += 1
        return self.value >= other


def predict(monkeypatch, speedups, site=SITE, wanted=1.05):
    row = {"format": "qk_int8_pv_fp8", "provider": "triton", "head_dim": 128, "is_causal": False}
    row |= {"dtypes": ["bfloat16"], "min_batch_heads": 16, "speedup_at_length": speedups}
    monkeypatch.setattr(cost, "profiles", lambda: {"GPU": {"date": "2026-01-01", "rows": [row]}})
    return cost.predict(site, "qk_int8_pv_fp8", "triton", "GPU", wanted)


RISING = [[512, 0.6], [1024, 1.1], [2048, 1.2], [4096, 1.4]]


@pytest.mark.parametrize(("length", "speedup", "reached"), [(1024, 1.1, 1024), (2047, 1.1, 1024), (9000, 1.4, 4096)])
def test_the_longest_measured_length_that_is_reached_gives_the_win(monkeypatch, length, speedup, reached):
    found = predict(monkeypatch, RISING, replace(SITE, q_len=length, kv_len=9000))
    assert found == cost.Prediction(speedup, f"at {reached} tokens, GPU, 2026-01-01")


def test_below_the_crossing_gives_the_measured_loss(monkeypatch):
    found = predict(monkeypatch, RISING, replace(SITE, q_len=700))
    assert found == cost.Prediction(0.6, "below 1024 tokens, GPU, 2026-01-01")


def test_a_win_between_losses_is_not_trusted(monkeypatch):
    found = predict(monkeypatch, [[512, 1.3], [1024, 0.9], [2048, 1.2]], replace(SITE, q_len=600, kv_len=600))
    assert found == cost.Prediction(0.9, "below 2048 tokens, GPU, 2026-01-01")


def test_a_kernel_that_never_wins_compares_no_length(monkeypatch):
    length = Symbolic(4096)
    found = predict(monkeypatch, [[512, 0.6], [4096, 0.9]], replace(SITE, q_len=length, kv_len=length))
    assert found == cost.Prediction(0.9, "at best, at any length, GPU, 2026-01-01") and length.compared == 0


def test_a_symbolic_length_is_compared_once(monkeypatch):
    length = Symbolic(4096)
    found = predict(monkeypatch, RISING, replace(SITE, q_len=length))
    assert found == cost.Prediction(1.1, "from 1024 tokens on, GPU, 2026-01-01") and length.compared == 1


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"head_dim": 64}, {"is_causal": True}, {"heads": 8}])
def test_what_was_not_measured_is_not_predicted(change, monkeypatch):
    assert predict(monkeypatch, RISING, replace(SITE, **change)) is None


def test_shorter_than_anything_measured_is_not_predicted(monkeypatch):
    assert predict(monkeypatch, [[512, 1.2]], replace(SITE, q_len=100)) is None


def test_each_provider_has_rows_of_its_own(monkeypatch):
    row = {"format": "qk_int8_pv_fp8", "head_dim": 128, "is_causal": False, "dtypes": ["bfloat16"]}
    row |= {"min_batch_heads": 16}
    rows = [
        row | {"provider": "triton", "speedup_at_length": [[1024, 0.9]]},
        row | {"provider": "hopper", "speedup_at_length": [[1024, 1.4]]},
    ]
    monkeypatch.setattr(cost, "profiles", lambda: {"NVIDIA H200": {"date": "2026-01-01", "rows": rows}})
    found = {who: cost.predict(SITE, "qk_int8_pv_fp8", who, "NVIDIA H200", 1.05) for who in PROVIDERS}
    assert found["hopper"] == cost.Prediction(1.4, "at 1024 tokens, NVIDIA H200, 2026-01-01")
    assert found["triton"] == cost.Prediction(0.9, "at best, at any length, NVIDIA H200, 2026-01-01")
    assert found["sageattention"] is None


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_the_timer_turns_the_order_around_every_round(names):
    ran = []
    times = interleaved_median_us({name: lambda n=name: ran.append(n) for name in names}, "cpu", 0.0, least_runs=4)
    backwards = names[::-1]
    assert "".join(ran[WARM_UPS * len(names) :]) == names + backwards + names + backwards
    assert list(times) == list(names) and all(us > 0 for us in times.values())


def test_shipped_profiles():
    assert cost.profiles()
    for device, profile in cost.profiles().items():
        assert profile["schema"] == cost.SCHEMA and {"torch", "triton", "date"} <= profile.keys(), device
        for row in profile["rows"]:
            assert row["format"] in FORMATS and row["format"] in PROVIDERS[row["provider"]].formats
            assert all(length > 0 and speedup > 0 for length, speedup in row["speedup_at_length"])
