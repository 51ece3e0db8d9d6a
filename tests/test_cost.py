"""Predictions come from a profile's measurements, and from nothing else; the shipped profiles are well-formed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sagecompile import cost, files
from sagecompile.cost import timer
from sagecompile.cost.profile import (
    SCHEMA,
    Family,
    Point,
    Profile,
    Time,
    averaged,
    crossing_of,
    launches_us,
    speedup,
    to_json,
    without_stalls,
)
from sagecompile.cost.prologues import SDPA, Making, PrologueCosts
from sagecompile.cost.timer import WARM_UPS, interleaved_median_us
from sagecompile.formats import FORMATS, PROVIDERS
from sagecompile.mask import CAUSAL
from sagecompile.site import AttentionSite, Device, Prologue

SITE = AttentionSite("layers.0", "model.py:1", "sdpa", 2, 8, 8, 2048, 2048, 128, 128, "bfloat16", "cuda:0")
GPU = Device("cuda", "GPU", (8, 9))
FAMILY, FAST = Family("bfloat16", 128, False), "qk_int8_pv_fp8 triton"
HOPPER = "qk_int8_pv_fp8 hopper"


class Symbolic:
    """Counts the comparisons, each of which would be a Dynamo guard."""

    def __init__(self, value):
        self.value, self.compared = value, 0

    def __ge__(self, other):
        self.compared += 1
        return self.value >= other

    def __lt__(self, other):
        return not self >= other


def profile(*heads_length_us):
    """(heads, length, microseconds of SDPA, of the alternative)."""
    points = (Point(FAMILY, heads, length, {SDPA: a, FAST: b}) for heads, length, a, b in heads_length_us)
    return Profile("GPU", "2026-01-01", tuple(points))


# It loses at 512, breaks even at 1024, wins by 2 at 2048 and by 4 at 4096; with four times the heads it wins earlier.
RISING = profile(
    (16, 512, 50, 100), (16, 1024, 100, 100), (16, 2048, 400, 200), (16, 4096, 1600, 400),
    (64, 512, 100, 100), (64, 1024, 400, 200), (64, 2048, 1600, 400), (64, 4096, 6400, 1600),
)  # fmt: skip


def device_us(profile, heads, length):
    return [time.device for time in profile.times(FAMILY, FAST, heads, length)]


class TestTimes:
    @pytest.mark.parametrize(("length", "us"), [(1024, (100, 100)), (4096, (1600, 400))])
    def test_at_a_point_are_its_own(self, length, us):
        assert device_us(RISING, 16, length) == pytest.approx(us)

    def test_between_lengths_are_powers(self):
        assert device_us(RISING, 16, 1448.155) == pytest.approx((200, 141.42), rel=1e-3)

    def test_between_heads_are_powers(self):
        assert device_us(RISING, 32, 1024) == pytest.approx((200, 141.42), rel=1e-3)

    def test_beyond_the_longest_keep_the_ratio(self):
        assert device_us(RISING, 16, 8192) == pytest.approx((6400, 1600))

    def test_beyond_the_most_heads_keep_the_ratio(self):
        assert device_us(RISING, 128, 1024) == pytest.approx((800, 400))

    def test_where_fewer_lengths_were_measured_with_more_heads_the_others_say_it(self):
        found = profile((16, 512, 50, 100), (16, 1024, 100, 100), (64, 1024, 400, 200))
        assert device_us(found, 32, 512) == pytest.approx((100, 200))

    def test_beyond_the_longest_those_who_reach_it_are_asked_as_at_it(self):
        found = profile((16, 512, 50, 100), (16, 4096, 1600, 400), (64, 512, 100, 300))
        at, beyond = (found.times(FAMILY, FAST, 64, length) for length in (4096, 4128))
        assert at[0].device / at[1].device == pytest.approx(beyond[0].device / beyond[1].device) == pytest.approx(4)

    @pytest.mark.parametrize(("heads", "length"), [(16, 511), (15, 1024)])
    def test_below_what_was_measured_nothing_is_said(self, heads, length):
        assert RISING.times(FAMILY, FAST, heads, length) is None


class TestCrossing:
    @pytest.mark.parametrize(
        ("heads", "wanted", "length"), [(16, 1.0, 1025), (16, 2**0.5, 1449), (16, 0.4, 512), (64, 2.0, 1024)]
    )
    def test_is_where_it_wins_from_then_on(self, heads, wanted, length):
        (curve,) = RISING.speedups(FAMILY, FAST, heads, False)
        assert crossing_of(curve, wanted) == pytest.approx(length, abs=1)

    def test_a_win_between_losses_is_not_trusted(self):
        assert 1024 < crossing_of([(512, 3.0), (1024, 0.5), (2048, 2.0)], 1.05) < 2048

    def test_there_is_none_where_it_loses_at_the_longest(self):
        assert crossing_of([(512, 2.0), (1024, 1.0)], 1.05) is None


def test_lengths_that_are_not_round_have_lines_of_their_own():
    found = profile((16, 64, 100, 50), (16, 90, 300, 100), (16, 128, 200, 100), (16, 181, 600, 200))
    assert device_us(found, 16, 96) == pytest.approx((150, 75), rel=0.02)
    assert device_us(found, 16, 128 + 1) == pytest.approx((430, 143), rel=0.02)
    curves = found.speedups(FAMILY, FAST, 16, False)
    assert [curve[-1] for curve in curves] == [(128, pytest.approx(2)), (181, pytest.approx(3))]


@pytest.fixture
def rising(monkeypatch):
    monkeypatch.setattr(cost, "profiles", lambda: {"GPU": RISING})


def predict(site, wanted=1.05, device="cuda"):
    return cost.predict(site, "qk_int8_pv_fp8", "triton", replace(GPU, type=device), wanted)


@pytest.mark.usefixtures("rising")
class TestPredict:
    def test_says_both_times(self):
        found = predict(SITE)
        assert found.speedup == pytest.approx(2) and found.basis == "200 us against 400 us, GPU, 2026-01-01"

    def test_counts_the_heads_of_all_sequences(self):
        assert predict(replace(SITE, batch=8)).speedup == pytest.approx(4)

    @pytest.mark.parametrize(
        "change", [{"dtype": "float32"}, {"head_dim": 64}, {"mask": CAUSAL}, {"heads": 4}, {"q_len": 1000}]
    )
    def test_what_was_not_measured_is_not_predicted(self, change):
        assert predict(replace(SITE, **change)) is None

    def test_of_another_device_nothing_is_known(self):
        assert cost.predict(SITE, "qk_int8_pv_fp8", "triton", Device("cuda", "TPU"), 1.05) is None

    def test_a_machine_that_launches_slowly_goes_by_its_own_profile(self, monkeypatch):
        slow = replace(GPU, slow_launches=True)
        for source, knows in (("shipped", False), ("mine.json", True)):
            monkeypatch.setattr(cost, "profiles", lambda source=source: {"GPU": replace(RISING, source=source)})
            for cuda_graphs in (False, True):
                found = cost.predict(SITE, "qk_int8_pv_fp8", "triton", slow, 1.05, cuda_graphs)
                assert (found is not None) == (knows or cuda_graphs)

    @pytest.mark.parametrize(
        ("source", "wanted", "speedup", "sure"),
        [
            ("mine.json", 2.0, 3.0, True),
            ("shipped", 1.05, 2.0, True),
            ("shipped", 2.0, 2.0, False),
            ("shipped", 4.0, 2.0, True),
        ],
    )
    def test_on_another_host_launches_may_be_faster(self, monkeypatch, source, wanted, speedup, sure):
        """The device takes 400 us and 200, the measured host 600 and 200, a faster one 400 and 133."""
        measured = replace(RISING, launch_us={SDPA: 600.0, FAST: 200.0}, source=source)
        monkeypatch.setattr(cost, "profiles", lambda: {"GPU": measured})
        found = cost.predict(SITE, "qk_int8_pv_fp8", "triton", GPU, wanted)
        assert (found.speedup, found.sure) == (pytest.approx(speedup), sure)

    def test_a_crossing_is_one_on_another_host_too(self, monkeypatch):
        of_any_length = replace(SITE, q_len=Symbolic(9), kv_len=Symbolic(9))
        found = {}
        for source in ("mine.json", "shipped"):
            measured = replace(RISING, launch_us={SDPA: 150.0, FAST: 1.0}, source=source)
            monkeypatch.setattr(cost, "profiles", lambda measured=measured: {"GPU": measured})
            found[source] = cost.predict(of_any_length, "qk_int8_pv_fp8", "triton", GPU, 1.3).at_least
        assert found["mine.json"] == 512 and 1024 < found["shipped"] < 2048

    def test_launches_count_outside_of_cuda_graphs(self, monkeypatch):
        launched = replace(RISING, launch_us={SDPA: 20.0, FAST: 250.0})
        monkeypatch.setattr(cost, "profiles", lambda: {"GPU": launched})
        found = cost.predict(SITE, "qk_int8_pv_fp8", "triton", GPU, 1.05, cuda_graphs=False)
        assert found.speedup == pytest.approx(400 / 250) and found.basis.startswith("250 us against 400 us")
        captured = cost.predict(SITE, "qk_int8_pv_fp8", "triton", GPU, 1.05, cuda_graphs=True)
        assert captured.speedup == pytest.approx(2)

    @pytest.mark.parametrize(("wanted", "sure"), [(1.05, True), (1.7, False), (2.0, False), (2.3, False), (2.6, True)])
    def test_near_to_what_is_wanted_is_not_sure(self, wanted, sure):
        assert predict(SITE, wanted).sure == sure

    def test_of_short_calls_it_is_less_sure(self):
        """At 1024 tokens both take 100 us, at 2048 400 and 200."""
        assert predict(SITE, 1.5).sure and not predict(SITE, 1.5, "cpu").sure
        short = replace(SITE, q_len=1024, kv_len=1024)
        assert not predict(short, 1.4).sure and predict(short, 1.6).sure

    def test_a_cpu_with_other_threads_is_not_sure_and_has_no_crossing(self, monkeypatch):
        monkeypatch.setattr(cost, "profiles", lambda: {"GPU": replace(RISING, threads=2)})
        for threads, length, known in (
            (2, 2048, True),
            (8, 2048, False),
            (2, Symbolic(9), True),
            (8, Symbolic(9), None),
        ):
            site, device = replace(SITE, q_len=length, kv_len=length), replace(GPU, threads=threads)
            found = cost.predict(site, "qk_int8_pv_fp8", "triton", device, 1.05)
            assert (found and found.sure) == known
            assert found is None or ("with 2 threads" in found.basis) == (threads == 8)

    ROTATED = replace(SITE, prologues=(Prologue(rope="half", table="bfloat16"),) * 2)
    COSTS = PrologueCosts(
        {
            ("half", 128): {
                name: ((1, us), (1 << 40, us)) for name, us in ((SDPA, 600.0), (HOPPER, 100.0), ("copy", 200.0))
            }
        }
    )
    """At any size."""

    def predict_hopper(self, monkeypatch, site, costs=COSTS, **changes):
        points = tuple(replace(point, us={SDPA: 400.0, HOPPER: 200.0}) for point in RISING.points)
        profile = Profile("GPU", "2026-01-01", points, prologues=costs, **changes)
        monkeypatch.setattr(cost, "profiles", lambda: {"GPU": profile})
        return cost.predict(site, "qk_int8_pv_fp8", "hopper", GPU, 1.05)

    @pytest.mark.parametrize(
        ("change", "sdpa", "ours"),
        [
            ({}, 1000, 300),
            ({"prologues": None}, 400, 200),
            ({"prologues": (ROTATED.prologues[0], Prologue())}, 700, 250),
            ({"q_len": Symbolic(9), "kv_len": Symbolic(9)}, 1000, 300),
        ],
        ids=["of both", "of none", "of q alone", "at any length"],
    )
    def test_counts_what_fusing_a_prologue_saves(self, monkeypatch, change, sdpa, ours):
        found = self.predict_hopper(monkeypatch, replace(self.ROTATED, **change))
        assert found.speedup == pytest.approx(sdpa / ours) and found.sure

    @pytest.mark.parametrize(
        ("costs", "prologue"),
        [
            (PrologueCosts(), ROTATED.prologues[0]),
            (COSTS, Prologue(norm=True, rope="half", table="bfloat16")),
            (PrologueCosts({("half", 128): {SDPA: ((1, 600.0),)}}), ROTATED.prologues[0]),
        ],
        ids=["nothing", "of another kind", "of SDPA alone"],
    )
    @pytest.mark.parametrize("length", [2048, Symbolic(9)], ids=["known", "symbolic"])
    def test_is_not_sure_of_prologues_that_were_not_measured(self, monkeypatch, costs, prologue, length):
        site = replace(SITE, prologues=(prologue, prologue), q_len=length, kv_len=length)
        found = self.predict_hopper(monkeypatch, site, costs, launch_us={HOPPER: 300.0, f"{HOPPER}, fused": 350.0})
        assert found.speedup == pytest.approx(400 / 350) and not found.sure
        assert self.predict_hopper(monkeypatch, replace(site, prologues=None), costs).sure

    @pytest.mark.parametrize(
        ("change", "us"),
        [
            ({}, 400),
            ({"prologues": (ROTATED.prologues[0], Prologue())}, 200),
            ({"prologues": None}, 0),
            ({"prologues": (Prologue(norm=True),) * 2}, 0),
            ({"dtype": "float32"}, 0),
        ],
        ids=["of both", "of q alone", "of none", "of another kind", "in 32 bits"],
    )
    def test_knows_what_inductor_takes_beyond_a_copy(self, monkeypatch, change, us):
        site = replace(self.ROTATED, **change)
        self.predict_hopper(monkeypatch, site)
        assert cost.beyond_a_copy_us(site, 16, "GPU") == pytest.approx(us)
        assert cost.beyond_a_copy_us(site, 16, "TPU") == 0

    def test_on_a_gpu_float16_takes_as_long_as_bfloat16(self):
        half = replace(SITE, dtype="float16")
        assert predict(half) == predict(SITE)
        assert predict(replace(half, device="cpu")) is None

    def test_of_a_symbolic_batch_it_says_the_least_of_any(self, monkeypatch):
        """Wins with few heads alone, as SDPA's launches do not count in many: kept, and no size is compared."""
        us = {8: (90.0, 30.0), 64: (100.0, 80.0), 512: (400.0, 800.0)}
        points = tuple(
            Point(Family("bfloat16", 128, False), heads, 2048, {SDPA: times[0], "qk_int8_pv_fp8 triton": times[1]})
            for heads, times in us.items()
        )
        monkeypatch.setattr(cost, "profiles", lambda: {"GPU": Profile("GPU", "2026-01-01", points)})
        assert predict(replace(SITE, batch=1, heads=8, kv_heads=8)).speedup == pytest.approx(3)
        batch = Symbolic(4)
        found = predict(replace(SITE, batch=batch, heads=8, kv_heads=8))
        assert found.speedup == pytest.approx(0.5) and found.us == pytest.approx((400, 800))
        assert found.basis == "800 us against 400 us, the least of 8 to 512 heads in all, GPU, 2026-01-01"
        assert predict(replace(SITE, batch=batch, heads=4, kv_heads=4)) is None, "fewer than were measured"
        assert batch.compared == 0

    def test_of_a_symbolic_length_it_names_the_crossing_and_compares_nothing(self):
        length = Symbolic(700)
        found = predict(replace(SITE, q_len=length, kv_len=4096), 2**0.5)
        assert found.speedup == pytest.approx(4) and found.at_least == 1449 and length.compared == 0
        assert found.basis == "from 1449 tokens on, GPU, 2026-01-01"

    def test_a_kernel_that_never_wins_has_no_crossing(self):
        found = predict(replace(SITE, q_len=Symbolic(4096)), 10.0)
        assert found.speedup == pytest.approx(4) and found.basis == "at the most tokens measured, GPU, 2026-01-01"

    def test_one_that_wins_only_at_short_lengths_is_not_used(self, monkeypatch):
        falling = profile((16, 512, 2, 1), (16, 1024, 1, 1))
        monkeypatch.setattr(cost, "profiles", lambda: {"GPU": falling})
        assert predict(replace(SITE, q_len=Symbolic(600), kv_len=Symbolic(600))).speedup < 1.05


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_the_timer_turns_the_order_around_every_round(names):
    ran = []
    times = interleaved_median_us({name: lambda n=name: ran.append(n) for name in names}, "cpu", 0.0, least_runs=4)
    backwards = names[::-1]
    assert "".join(ran[WARM_UPS * len(names) :]) == names + backwards + names + backwards
    assert list(times) == list(names) and all(us > 0 for us in times.values())


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's scheduler statistics")
def test_what_threads_wait_for_a_cpu():
    """More of them than there are CPUs."""
    many = 2 * len(os.sched_getaffinity(0)) + 1
    end, before = time.perf_counter() + 0.3, timer.waited_s()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(many)]
    while time.perf_counter() < end:
        pass
    for process in busy:
        process.kill()
        process.wait()
    assert 0.01 < timer.waited_s() - before


def test_launches_are_timed_in_turn_and_the_fastest_counts(monkeypatch):
    """Not the first two of each, which may plan."""
    ran = []

    def call(name, seconds):
        done = ran.count(name)
        time.sleep(seconds[min(done, 2)] if name == "a" else seconds[done % 3])
        ran.append(name)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("|"))
    calls = {"a": lambda: call("a", [0, 0, 0.003]), "b": lambda: call("b", [0.003, 0.003, 0.001])}
    found = timer._launches_us(calls, ["a", "b"])
    planned, *rounds = "".join(ran).removesuffix("|").split("|")
    assert planned == "aabb" and rounds == ["a", "b"] * (len(rounds) // 2)
    assert timer.LEAST_LAUNCHES <= len(rounds) // 2 <= timer.MOST_LAUNCHES
    assert found["a"] >= 3000 > found["b"] >= 1000


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_no_launch_follows_itself(monkeypatch, names):
    """As one that is timed alone would, in warmer caches."""
    ran = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = {name: partial(ran.append, name) for name in names}
    found = timer._launches_us(calls, ["b"])
    pairs = {"".join(pair) for pair in pairwise(ran[2 * len(names) :])}
    assert all(one != other for one, other in pairs) and (len(pairs) == 6 or len(names) != 3)
    assert [name for name, us in found.items() if us] == ["b"]
    ran.clear()
    assert timer._launches_us(calls, []) == dict.fromkeys(names, 0) and "".join(ran) == "".join(2 * n for n in names)


@pytest.mark.parametrize(
    ("sdpa", "ours", "captured", "launched", "here"),
    [
        (Time(200.0, 30.0), Time(100.0, 20.0), 2.0, 2.0, 2.0),  # the device is waited for
        (Time(10.0, 60.0), Time(13.0, 30.0), 10 / 13, 2.0, 2.0),  # on any host the launches are
        (Time(25.0, 41.0), Time(37.0, 23.0), 25 / 37, 41 * 2 / 3 / 37, 41 / 37),  # on a slow host alone they are
    ],
)
def test_a_slower_device_is_not_chosen_for_the_launches_of_a_slow_host(sdpa, ours, captured, launched, here):
    assert speedup((sdpa, ours), cuda_graphs=True, fastest_host=2 / 3) == pytest.approx(captured)
    assert speedup((sdpa, ours), cuda_graphs=False, fastest_host=2 / 3) == pytest.approx(launched)
    assert speedup((sdpa, ours), cuda_graphs=False) == pytest.approx(here)


def test_launches_are_those_of_a_quiet_host():
    races = [
        (fused, {SDPA: Time(1.0, us + 100 * fused), FAST: Time(1.0)}) for us in range(20, 0, -1) for fused in (0, 1)
    ]
    assert launches_us(races) == {SDPA: 3, f"{SDPA}, fused": 103}


def test_what_slows_all_for_a_while_keeps_the_ratio():
    races = [
        {SDPA: Time(100.0, 1.0), "a": Time(50.0, 2.0)},
        {SDPA: Time(400.0, 3.0), "a": Time(200.0, 2.0)},
        {"b": Time(7.0)},
    ]
    found = averaged(races)
    assert {name: time.device for name, time in found.items()} == pytest.approx({SDPA: 200, "a": 100, "b": 7})
    assert found[SDPA].launch == found["a"].launch == 2


@pytest.mark.parametrize("which", [SDPA, "a"])
def test_a_call_that_stood_still_does_not_count(which):
    usual = {SDPA: Time(100.0), "a": Time(50.0)}
    found = averaged([usual, usual | {which: Time(9000.0)}])
    assert {name: time.device for name, time in found.items()} == pytest.approx({SDPA: 100, "a": 50})
    both = [usual | {name: Time(9000.0)} for name in usual]
    assert without_stalls(both) == both


@pytest.mark.parametrize(("heads", "kv_share", "us"), [(1, 1, 2), (8, 1, 8), (4, 1, 4), (64, 1, 48), (8, 0.25, 5)])
def test_prologues_take_what_was_measured_at_other_sizes(heads, kv_share, us):
    """Straight lines in logarithms; the launch below the smallest, the bandwidth beyond the largest; k by its heads."""
    costs = PrologueCosts({("half", 64): {SDPA: ((2000, 2.0), (8000, 8.0), (16000, 12.0))}})
    making = Making("half", "half", 64, kv_share, is_wide=False)
    assert costs.added(making, SDPA, heads, 1000) == pytest.approx(us)


class TestFiles:
    def test_a_profile_reads_what_it_writes(self):
        machine = {"device": "GPU", "threads": None, "date": "2026-01-01"}
        costs = PrologueCosts({("half", 64): {SDPA: ((1024, 1.5), (2048, 3.0))}})
        stored = json.loads(json.dumps(to_json(machine, RISING.points, {SDPA: 9.0}, costs)))
        assert Profile.read(stored) == replace(RISING, launch_us={SDPA: 9.0}, prologues=costs)

    def test_another_schema_is_refused(self):
        with pytest.raises(ValueError, match=f"schema 1: this version reads {SCHEMA}"):
            Profile.read({"schema": 1})

    @pytest.mark.parametrize("time", ["fast", None, 0.0, -1.0, float("nan")])
    def test_times_that_are_none_are_refused(self, time):
        machine = {"device": "GPU", "threads": None, "date": "2026-01-01"}
        stored = json.loads(json.dumps(to_json(machine, RISING.points, {SDPA: 9.0}, PrologueCosts())))
        stored["points"][0]["heads_length_us"][0][2][SDPA] = time
        with pytest.raises((ValueError, TypeError)):
            Profile.read(stored)

    @pytest.mark.parametrize("us", ["fast", None, 0.0, float("nan")])
    def test_neither_are_those_of_prologues(self, us):
        stored = json.loads(json.dumps(to_json({}, RISING.points, {SDPA: 9.0}, PrologueCosts())))
        stored |= {"device": "GPU", "threads": None, "date": "2026-01-01"}
        stored["prologues"] = [{"kind": "half", "head_dim": 64, "size_us": {SDPA: [[1024, us]]}}]
        with pytest.raises((ValueError, TypeError)):
            Profile.read(stored)

    @pytest.mark.parametrize(
        "change",
        [
            {"prologues": [{"kind": "half", "head_dim": 64, "size_us": []}], "date": "soon"},
            {"prologues": [{"kind": "half", "head_dim": 64, "size_us": {SDPA: []}}]},
            {"prologues": [{"kind": "half", "head_dim": 64, "size_us": 1}]},
            {"points": [{"dtype": "float16", "head_dim": 64, "is_causal": False, "heads_length_us": [[1, 2, {}]]}]},
            {"points": []},
            {"device": ["x"]},
            {"date": "soon"},
        ],
        ids=["sizes and date", "no sizes", "a number for sizes", "no SDPA", "no points", "device", "date"],
    )
    def test_what_is_no_profile_is_refused(self, change):
        machine = {"device": "GPU", "threads": None, "date": "2026-01-01"}
        stored = json.loads(json.dumps(to_json(machine, RISING.points, {SDPA: 9.0}, PrologueCosts())))
        with pytest.raises((ValueError, TypeError)):
            Profile.read(stored | change)

    def test_shipped_ones(self):
        assert {"AMD EPYC (AVX-512 BF16)", "NVIDIA H200"} <= cost.profiles().keys()
        for device, found in cost.profiles().items():
            assert found.source == "shipped" and found.points, device
            for point in found.points:
                assert point.us[SDPA] > 0 and len(point.us) > 1
                for name in point.us.keys() - {SDPA}:
                    format, provider = name.split()
                    assert format in FORMATS and format in PROVIDERS[provider].formats and point.us[name] > 0

    def test_the_machines_own_goes_before_a_shipped_one(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        own = files.folder("profiles")
        own.mkdir(parents=True)
        machine = {"device": "NVIDIA H200", "threads": None, "date": "2027-01-01"}
        text = json.dumps(to_json(machine | cost.versions(), RISING.points, {}, PrologueCosts()))
        (own / "nvidia_h200.json").write_text(text)
        cost.profiles.cache_clear()
        found = cost.profiles()["NVIDIA H200"]
        cost.profiles.cache_clear()
        assert found.date == "2027-01-01" and found.source == str(own / "nvidia_h200.json")

    @pytest.mark.parametrize("name", ["torch", "sources"])
    def test_one_of_other_versions_says_nothing(self, monkeypatch, tmp_path, caplog, name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        files.folder("profiles").mkdir(parents=True)
        machine = {"device": "NVIDIA H200", "threads": None, "date": "2027-01-01"} | cost.versions() | {name: "older"}
        text = json.dumps(to_json(machine, RISING.points, {}, PrologueCosts()))
        (files.folder("profiles") / "nvidia_h200.json").write_text(text)
        cost.profiles.cache_clear()
        with caplog.at_level(logging.WARNING, "sagecompile"):
            found = cost.profiles()["NVIDIA H200"]
        cost.profiles.cache_clear()
        assert found.source == "shipped" and f"is of another {name}: sagecompile calibrate" in caplog.text

    @pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 3}'])
    def test_one_that_cannot_be_read_is_said_and_left_out(self, monkeypatch, tmp_path, caplog, text):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        files.folder("profiles").mkdir(parents=True)
        (files.folder("profiles") / "nvidia_h200.json").write_text(text)
        cost.profiles.cache_clear()
        with caplog.at_level(logging.WARNING, "sagecompile"):
            found = cost.profiles()["NVIDIA H200"]
        cost.profiles.cache_clear()
        assert found.source == "shipped" and "sagecompile calibrate writes a new one" in caplog.text
        assert [file.name for file in files.folder("profiles").iterdir()] == ["nvidia_h200.bad"]
