"""What the machine itself measures: raced once, remembered between processes, never in the way of compiling."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import compiled, share_libraries

from sagecompile import cost, files, ops
from sagecompile.cost import Prediction, host, local, store
from sagecompile.cost.local import Local
from sagecompile.cost.profile import SHIPPED, Family, Point, Profile, Time
from sagecompile.decide import Keep, Use, decide
from sagecompile.errors import OptionError
from sagecompile.formats import PROVIDERS
from sagecompile.mask import CAUSAL, Mask
from sagecompile.settings import Settings
from sagecompile.site import AttentionSite, Device, Prologue

SITE = AttentionSite("layers.0", "model.py:1", "sdpa", 2, 4, 2, 90, 90, 72, 72, "float32", "cpu")
"""No profile covers a head_dim of 72."""
LIMITS = {"ALIKE": local.ALIKE, "APART": local.APART}
ACCURATE, FAST = ("qk_int8_pv_fp16", "cpu"), ("qk_int8_pv_fp8", "reference")
TIMES = {"sdpa": Time(300.0, 20.0), ACCURATE: Time(100.0, 200.0), FAST: Time(600.0)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty one, and a process that remembers nothing; races are believed however busy this CPU is."""
    share_libraries(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "_known", {})
    monkeypatch.setattr(local, "waited_s", lambda: 0.0)
    for limit in LIMITS:
        monkeypatch.setattr(local, limit, math.inf)
    files.warn_once.cache_clear()
    return tmp_path / "sagecompile" / "measured"


@pytest.fixture
def races(monkeypatch):
    """The races that were run; each has TIMES."""
    run = []

    def race(site, alternatives, ops, launches):
        run.append((site, tuple(alternatives), launches))
        return {"sdpa": TIMES["sdpa"]} | {" ".join(alternative): TIMES[alternative] for alternative in alternatives}

    monkeypatch.setattr(local, "race", race)
    return run


def machine(cuda_graphs=True, **changes):
    return Local({"device": "some CPU"} | changes, ops, cuda_graphs)


def only_ops(**given):
    """In the place of sagecompile.ops."""
    return SimpleNamespace(settle=lambda: None, **given)


def unpredicted(*alternatives):
    return dict.fromkeys(alternatives)


def forget(monkeypatch):
    """As a new process starts."""
    monkeypatch.setattr(store, "_known", {})


class TestMeasure:
    def test_says_how_much_faster_and_on_what(self, races):
        found = machine().measure(SITE, unpredicted(ACCURATE, FAST))
        where = f"measured here at 2x4/2x90x72, {local._today()}"
        assert {name: one.speedup for name, one in found.items()} == pytest.approx({ACCURATE: 3.0, FAST: 0.5})
        assert found[ACCURATE].basis == f"100 us against 300 us, {where}" and found[ACCURATE].measured
        assert found[FAST].basis == f"600 us against 300 us, {where}" and found[FAST].us == pytest.approx((300, 600))

    def test_is_logged(self, races, caplog):
        with caplog.at_level(logging.INFO, "sagecompile"):
            machine().measure(SITE, unpredicted(ACCURATE))
        assert "2x4/2x90x72 float32 on some CPU: 3.00x for qk_int8_pv_fp16 by cpu (100 us against" in caplog.text

    def test_is_remembered_by_the_next_process(self, races, monkeypatch):
        first = machine().measure(SITE, unpredicted(ACCURATE))
        raced = len(races)
        forget(monkeypatch)
        assert machine().recall(SITE) == first and len(races) == raced

    def test_launches_count_outside_of_cuda_graphs(self, races):
        machine().measure(SITE, unpredicted(ACCURATE))
        (captured,) = machine(cuda_graphs=True).recall(SITE).values()
        (launched,) = machine(cuda_graphs=False).recall(SITE).values()
        assert (captured.speedup, launched.speedup) == pytest.approx((3.0, 1.5))

    @pytest.fixture
    def profile(self, monkeypatch):
        """With launches of 300 and 200 us, where the device takes 100 and 250."""

        def profile(source=SHIPPED, date="2026-11-22"):
            launches = {"sdpa": 300.0, "sdpa, fused": 330.0}
            launches |= {"qk_int8_pv_fp16 cpu": 200.0, "qk_int8_pv_fp16 hopper": 200.0}
            points = tuple(Point(Family("float32", head_dim, False), 4, 90, {}) for head_dim in (64, SITE.head_dim))
            found = Profile("some CPU", date, points, launches, source=source)
            monkeypatch.setattr(local, "profiles", lambda: {"some CPU": found})

        monkeypatch.setitem(TIMES, "sdpa", Time(100.0))
        monkeypatch.setitem(TIMES, ACCURATE, Time(250.0))
        return profile

    @pytest.mark.parametrize(
        ("source", "cuda_graphs", "timed", "speedup"),
        [
            ("mine.json", False, (), 300 / 250),
            ("mine.json", True, (), 100 / 250),
            (SHIPPED, False, ("sdpa",), 200 / 250),
            (SHIPPED, True, (), 100 / 250),
        ],
    )
    def test_launches_are_those_of_the_profile(self, races, profile, source, cuda_graphs, timed, speedup):
        """And two thirds of a shipped one's, as long as nobody saw this machine's host."""
        profile(source)
        (found,) = machine(cuda_graphs).measure(SITE, unpredicted(ACCURATE)).values()
        assert found.speedup == pytest.approx(speedup) and races[0][-1] == timed

    def test_what_was_raced_for_a_cuda_graph_is_raced_again_without(self, races, profile, monkeypatch):
        """As nobody timed a launch, by which this host is seen."""
        profile()
        hopper = ("qk_int8_pv_fp16", "hopper")
        monkeypatch.setitem(TIMES, hopper, TIMES[ACCURATE])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        site = replace(self.PLAIN, device="cuda:0")
        assert machine(cuda_graphs=True).measure(site, unpredicted(hopper))
        assert machine(cuda_graphs=False).recall(site) == {}
        monkeypatch.setitem(TIMES, "sdpa", Time(100.0, 300.0))
        assert machine(cuda_graphs=False).measure(site, unpredicted(hopper))
        for cuda_graphs, speedup in ((True, 100 / 250), (False, 0.9 * 300 / 250)):
            (found,) = machine(cuda_graphs).recall(site).values()
            assert found.speedup == pytest.approx(speedup)

    def test_one_that_the_profile_does_not_know_leaves_the_others_known(self, races, profile, monkeypatch):
        """Its launch is timed, theirs are the profile's."""
        profile()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setitem(TIMES, "sdpa", Time(100.0, 300.0))
        unknown = ("qk_int8_pv_fp16", "triton")
        monkeypatch.setitem(TIMES, unknown, Time(250.0, 400.0))
        site, here = replace(self.PLAIN, device="cuda:0"), machine(cuda_graphs=False)
        here.measure(site, unpredicted(ACCURATE))
        here.measure(site, unpredicted(unknown))
        assert [launches for _, _, launches in races] == [("sdpa",), None]
        assert here.recall(site).keys() == {ACCURATE, unknown}

    def test_this_host_is_seen_by_launches_of_sdpa(self, races, profile, monkeypatch):
        """With a margin of a tenth in nine races; of ten the second counts. What was decided once stays so."""
        profile()
        seen = (600.0, 270.0, *[300.0] * 8)
        wanted = [300, *[0.9 * 0.9 * 300] * 8, 300]
        for length, (launch_us, sdpa_us) in enumerate(zip(seen, wanted, strict=True), start=90):
            monkeypatch.setitem(TIMES, "sdpa", Time(100.0, launch_us))
            site = replace(self.PLAIN, q_len=length, kv_len=length)
            (found,) = machine(cuda_graphs=False).measure(site, unpredicted(ACCURATE)).values()
            forget(monkeypatch)
            assert found.speedup == pytest.approx(sdpa_us / 250)
            assert machine(cuda_graphs=False).recall(site) == {ACCURATE: found}
        assert store.count({"device": "some CPU"}) == len(seen)

    PLAIN = replace(SITE, kv_heads=4)
    ONE = Prologue(rope="half", table="float32")

    @pytest.mark.parametrize(
        ("change", "sdpa_us"),
        [
            ({}, 300 * 0.9),
            ({"head_dim": 96}, 200),
            ({"prologues": (ONE, ONE)}, 330 * 0.9),
            ({"prologues": (Prologue(), ONE)}, 220),
            ({"kv_heads": 2}, 200),
            ({"kv_len": 91}, 200),
        ],
        ids=["as the profile's", "of a kind that it does not know", "prologues", "one of two", "groups", "lengths"],
    )
    def test_a_host_is_seen_by_launches_that_the_profile_has(self, races, profile, monkeypatch, change, sdpa_us):
        profile()
        fusing = ("qk_int8_pv_fp16", "hopper")
        monkeypatch.setitem(PROVIDERS, "hopper", replace(PROVIDERS["hopper"], devices=("cpu",)))
        monkeypatch.setitem(TIMES, fusing, TIMES[ACCURATE])
        monkeypatch.setitem(TIMES, "sdpa", Time(100.0, 330.0 if "prologues" in change else 300.0))
        site = replace(self.PLAIN, **{"head_dim": 64} | change)
        (found,) = machine(cuda_graphs=False).measure(site, unpredicted(fusing)).values()
        assert found.speedup == pytest.approx(sdpa_us / 250)

    def test_the_own_profile_needs_no_look_at_the_host(self, races, profile, monkeypatch):
        profile()
        monkeypatch.setitem(TIMES, "sdpa", Time(100.0, 240.0))
        (found,) = machine(cuda_graphs=False).measure(self.PLAIN, unpredicted(ACCURATE)).values()
        assert found.speedup == pytest.approx(0.9 * 240 / 250)
        profile("mine.json")
        (found,) = machine(cuda_graphs=False).recall(self.PLAIN).values()
        assert found.speedup == pytest.approx(300 / 250)

    def test_a_host_is_seen_for_each_profile_and_forgets_the_oldest_races(self):
        machine_facts = {"device": "some GPU"}
        assert host.fastest(machine_facts, "2026-11-22", 0.5) == 0.5 * host.MARGIN
        assert host.fastest(machine_facts, "2026-11-23", 0.8) == 0.8 * host.MARGIN
        slow = [host.fastest(machine_facts, "2026-11-22", 2.0) for _ in range(host.MOST)]
        assert slow[0] == 0.5 * host.MARGIN and slow[host.ENOUGH] == 1.0
        quick = [host.fastest(machine_facts, "2026-11-22", 0.7) for _ in range(host.MOST)]
        assert quick[host.MOST // 10 - 1] == 1.0 and quick[host.MOST // 10] == 0.7

    @pytest.mark.parametrize(
        ("known", "machine_facts"),
        [({"sdpa": 300.0}, {}), ({"sdpa": 300.0, "qk_int8_pv_fp16 cpu": 1.0}, {"slow_launches": True})],
        ids=["not of this kernel", "of hosts that launch faster"],
    )
    def test_launches_that_no_profile_has_are_timed(self, races, monkeypatch, known, machine_facts):
        profile = Profile("some CPU", "2026-11-22", (), known)
        monkeypatch.setattr(local, "profiles", lambda: {"some CPU": profile})
        (found,) = machine(cuda_graphs=False, **machine_facts).measure(SITE, unpredicted(ACCURATE)).values()
        assert found.speedup == pytest.approx(1.5) and races[0][-1] is None

    def test_a_race_without_launches_says_nothing_without_the_profile(self, races, monkeypatch):
        monkeypatch.setitem(TIMES, "sdpa", Time(300.0, 10.0))
        monkeypatch.setitem(TIMES, ACCURATE, Time(100.0))
        on_gpu = replace(SITE, device="cuda:0")
        profile = Profile("some CPU", "2026-11-22", (), {"sdpa": 10.0, "qk_int8_pv_fp16 cpu": 10.0})
        monkeypatch.setattr(local, "profiles", lambda: {"some CPU": profile})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert machine(cuda_graphs=False).measure(on_gpu, unpredicted(ACCURATE))[ACCURATE].speedup == 3.0
        monkeypatch.setattr(local, "profiles", dict)
        assert machine(cuda_graphs=False).recall(on_gpu) == {}

    def test_without_a_profile_the_host_may_be_faster(self, races, monkeypatch):
        monkeypatch.setitem(TIMES, "sdpa", Time(300.0, 600.0))
        monkeypatch.setitem(TIMES, ACCURATE, Time(500.0, 200.0))
        (found,) = machine(cuda_graphs=False).measure(SITE, unpredicted(ACCURATE)).values()
        assert found.speedup == pytest.approx(400 / 500)

    def test_may_be_turned_off_and_what_was_measured_still_holds(self, races):
        off = replace(machine(), may_measure=False)
        assert off.measure(SITE, unpredicted(ACCURATE)) == "sage.measure is false" and not races
        found = machine().measure(SITE, unpredicted(ACCURATE))
        assert off.recall(SITE) == found

    def test_what_is_asked_for_later_joins_it(self, races, monkeypatch):
        machine().measure(SITE, unpredicted(ACCURATE))
        forget(monkeypatch)
        machine().measure(SITE, unpredicted(FAST))
        assert set(machine().recall(SITE)) == {ACCURATE, FAST}

    @pytest.mark.parametrize(
        "change",
        [{"batch": 3}, {"q_len": 91}, {"kv_len": 91}, {"heads": 2}, {"dtype": "bfloat16"}, {"mask": CAUSAL}],
    )
    def test_holds_for_the_same_shape_alone(self, races, change):
        machine().measure(SITE, unpredicted(ACCURATE))
        assert machine().recall(replace(SITE, **change)) == {}

    @pytest.mark.parametrize("change", [{"device": "another"}, {"torch": "2.14"}])
    def test_holds_for_the_same_machine_alone(self, races, change):
        machine().measure(SITE, unpredicted(ACCURATE))
        assert machine(**change).recall(SITE) == {}

    def test_holds_for_as_many_threads_alone(self, races):
        machine().measure(SITE, unpredicted(ACCURATE))
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert machine().recall(SITE) == {}
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize(("sleep_s", "wins"), [(0.0, True), (0.05, False)])
    def test_what_is_timed_is_the_kernel(self, sleep_s, wins):
        timed = Local(
            {"device": "some CPU"}, only_ops(attention=lambda *_, **how: time.sleep(sleep_s)), cuda_graphs=False
        )
        (prediction,) = timed.measure(SITE, unpredicted(ACCURATE)).values()
        assert (prediction.speedup > 1) == wins

    def test_random_numbers_of_the_user_stay_as_they_are(self):
        before = torch.get_rng_state()
        assert machine().measure(SITE, unpredicted(FAST)).keys() == {FAST}
        assert torch.equal(torch.get_rng_state(), before)


class TestBusyCpu:
    """Two opinions that agree are believed: of races, and of the machine's own profile."""

    SITE = replace(SITE, kv_heads=4)
    QUIET = Prediction(3.0, "calibrated", calibrated=(Time(300.0), Time(100.0)))

    @pytest.fixture(autouse=True)
    def limits(self, monkeypatch):
        """Those of the project, without pauses."""
        monkeypatch.setattr(local, "PAUSE_S", 0.0)
        for limit, value in LIMITS.items():
            monkeypatch.setattr(local, limit, value)

    def test_of_groups_no_profile_says_what_they_take(self, races):
        slow = replace(self.QUIET, calibrated=(Time(1.0), Time(1.0)))
        assert machine().measure(SITE, {ACCURATE: slow})[ACCURATE].speedup == pytest.approx(3.0)

    @pytest.fixture
    def sdpa_takes(self, races, monkeypatch):
        """In each of the next races; ours takes 100 us."""

        def take(*us):
            left, race = list(us), local.race
            monkeypatch.setattr(
                local, "race", lambda *given, **how: race(*given, **how) | {"sdpa": Time(float(left.pop(0)))}
            )

        return take

    @pytest.mark.parametrize(
        ("calibrated", "sdpa_us", "speedup", "tries"),
        [
            (300, [320], (3.0 * 3.2) ** 0.5, 1),
            (300, [200, 320], (3.0 * 3.2) ** 0.5, 2),
            (300, [200, 400, 205], (2.0 * 2.05) ** 0.5, 3),
            (300, [255, 340, 380], (3.0 * 2.55 * 3.4 * 3.8) ** 0.25, 3),
            (115, [110, 105, 100], (1.15 * 1.1 * 1.05 * 1.0) ** 0.25, 3),
            (None, [300, 310], (3.0 * 3.1) ** 0.5, 2),
            (None, [110, 105, 100], (1.1 * 1.05 * 1.0) ** (1 / 3), 3),
            (None, [200, 300, 310], (3.0 * 3.1) ** 0.5, 3),
            (None, [110, 9000, 100], (1.1 * 1.0) ** 0.5, 3),
            (115, [9000, 110, 100], (1.15 * 1.1 * 1.0) ** (1 / 3), 3),
            (None, [200, 230, 260], (2.0 * 2.3 * 2.6) ** (1 / 3), 3),
        ],
    )
    def test_two_that_agree_are_believed_else_all_that_are_near(
        self, races, sdpa_takes, calibrated, sdpa_us, speedup, tries
    ):
        sdpa_takes(*sdpa_us)
        known = replace(self.QUIET, calibrated=(Time(float(calibrated)), Time(100.0))) if calibrated else None
        found = machine().measure(self.SITE, {ACCURATE: known})
        assert found[ACCURATE].speedup == pytest.approx(speedup) and len(races) == tries

    def test_of_a_machine_that_is_slower_as_a_whole_they_agree(self, races, sdpa_takes, monkeypatch):
        monkeypatch.setitem(TIMES, ACCURATE, Time(1000.0))
        sdpa_takes(3000)
        assert machine().measure(self.SITE, {ACCURATE: self.QUIET})[ACCURATE].speedup == pytest.approx(3.0)

    def test_where_none_agree_nothing_is_kept(self, races, sdpa_takes):
        sdpa_takes(200, 400, 100)
        found = machine().measure(self.SITE, {ACCURATE: self.QUIET})
        assert found == "the CPU is busy: two measurements are 4.0 times apart"
        assert len(races) == local.TRIES and machine().recall(self.SITE) == {}

    @pytest.mark.parametrize(
        ("waits", "believed"), [([0.04, 0.05, 0.03], False), ([0.04, 0.05, 0.01], False), ([0.04, 0.01, 0.01], True)]
    )
    def test_is_seen_by_what_threads_wait(self, races, monkeypatch, waits, believed):
        """Of 50 ms."""
        readings = [reading for wait in waits for reading in (1.0, 1.0 + wait)]
        monkeypatch.setattr(local, "waited_s", lambda: readings.pop(0))
        found = machine().measure(SITE, unpredicted(ACCURATE))
        assert len(races) == local.TRIES
        if believed:
            assert found[ACCURATE].speedup == pytest.approx(3.0)
        else:
            assert found == "the CPU is busy: threads waited for it 100% of the time" and not machine().recall(SITE)

    def test_of_a_gpu_does_not_matter(self, races, monkeypatch):
        monkeypatch.setattr(local, "waited_s", time.perf_counter)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert machine().measure(replace(SITE, device="cuda:0"), unpredicted(ACCURATE))[ACCURATE].speedup == 3.0
        assert len(races) == 1

    def test_without_a_profile_of_its_own_is_believed(self, races):
        assert machine().measure(self.SITE, {ACCURATE: Prediction(9.0, "shipped")})[ACCURATE].speedup == pytest.approx(
            3.0
        )

    def test_leaves_the_decision_to_the_profile(self, races, sdpa_takes, monkeypatch):
        sdpa_takes(300, 500, 200)
        profiled = Prediction(1.2, "calibrated", sure=False, calibrated=(Time(120.0), Time(100.0)))
        monkeypatch.setattr("sagecompile.decide.predict", lambda *_: profiled)
        found = decide(self.SITE, Device("cpu", "some CPU"), Settings(formats=ACCURATE[:1]), lambda *_: None, machine())
        assert found == Use(*ACCURATE, profiled) and len(races) == local.TRIES


class TestPrologues:
    """What a kernel does to q and k as it reads them is measured as it is in the graph."""

    MADE = Prologue(True, "bfloat16", "half", "float32")
    SITE = replace(SITE, prologues=(MADE, MADE), head_dim=64, value_dim=64)

    @pytest.fixture
    def seen(self, monkeypatch):
        """Of each op its arguments, of each race the calls."""
        seen = []

        def recording(name):
            def op(*tensors, **how):
                seen.append((name, tensors, how))
                return getattr(ops, name)(*tensors, **how)

            return op

        names = ("attention", "qk_norm_rope_attention")
        return seen, only_ops(**{name: recording(name) for name in names})

    def test_are_the_kernels_own_where_it_does_them(self, seen):
        calls, recorded = seen
        times = local.race(self.SITE, [("qk_int8_pv_fp16", "reference")], recorded, budget_s=0.0)
        assert times.keys() == {"sdpa", "qk_int8_pv_fp16 reference"}
        assert {name for name, _, _ in calls} == {"qk_norm_rope_attention"}
        _, (q, k, v), how = calls[0]
        assert q.shape == (2, 4, 90, 64) and k.shape == v.shape == (2, 2, 90, 64)
        assert how["cos"].shape == how["sin"].shape == (1, 90, 64) and how["cos"].dtype == torch.float32
        assert how["q_weight"].shape == how["k_weight"].shape == (64,) and how["k_weight"].dtype == torch.bfloat16
        assert how["q_rope"] == how["k_rope"] == "half" and how["q_eps"] and how["k_eps"]

    @pytest.mark.parametrize("which", [0, 1], ids="qk")
    def test_of_one_of_the_two_leave_the_other_alone(self, seen, which):
        made = [Prologue(), Prologue()]
        made[which] = Prologue(rope="interleaved", table="bfloat16")
        site = replace(self.SITE, prologues=tuple(made), q_len=70)
        calls, recorded = seen
        local.race(site, [("qk_int8_pv_fp16", "reference")], recorded, budget_s=0.0)
        how = calls[0][2]
        assert [how["q_rope"], how["k_rope"]][which] == "interleaved" and how["cos"].shape[1] == (70, 90)[which]
        assert [how["q_rope"], how["k_rope"]][1 - which] == "none" and how["q_eps"] is how["k_eps"] is None

    def test_are_written_to_memory_for_the_others(self, seen, monkeypatch):
        """By a copy of q and of k, in front of SDPA and of a kernel that reads what they make."""
        calls, recorded = seen
        local.race(self.SITE, [("qk_int8_pv_fp16", "reference"), ACCURATE], recorded, budget_s=0.0)
        plain = [tensors for name, tensors, _ in calls if name == "attention"]
        fused = [tensors for name, tensors, _ in calls if name == "qk_norm_rope_attention"]
        memory = {x.data_ptr() for x in fused[0][:2]}
        assert len(plain) == len(fused) and all(x.data_ptr() not in memory for q, k, _ in plain for x in (q, k))
        assert all(torch.equal(plain[0][i], fused[0][i]) for i in range(3))

    @pytest.mark.parametrize(("heads", "more"), [(4, 200.0), (400, 0.0)], ids=["as raced", "of others"])
    def test_count_in_front_of_sdpa_as_long_as_inductor_takes(self, monkeypatch, heads, more):
        """What it takes beyond the copies of the race, by the profile, at as many heads as were raced."""
        monkeypatch.setitem(PROVIDERS, "hopper", replace(PROVIDERS["hopper"], devices=("cpu",)))
        monkeypatch.setattr(
            local,
            "beyond_a_copy_us",
            lambda site, at, device_name: more if (at, device_name) == (8, "some CPU") else 0.0,
        )
        fused, plain = ("qk_int8_pv_fp16", "hopper"), ACCURATE
        times = {"sdpa": Time(300.0), " ".join(fused): Time(100.0), " ".join(plain): Time(100.0)}
        monkeypatch.setattr(local, "race", lambda *_, **__: times)
        found = machine().measure(self.SITE, unpredicted(fused, plain))
        assert found[fused].speedup == pytest.approx((300 + more) / 100)
        assert found[plain].speedup == pytest.approx(3.0)

    def test_are_nothing_to_a_race_without_a_kernel_for_them(self, seen):
        calls, recorded = seen
        local.race(self.SITE, [ACCURATE], recorded, budget_s=0.0)
        assert len({q.data_ptr() for _, (q, _, _), _ in calls}) == 1

    def test_are_remembered_apart(self, races, monkeypatch):
        monkeypatch.setitem(PROVIDERS, "hopper", replace(PROVIDERS["hopper"], devices=("cpu",)))
        machine().measure(self.SITE, unpredicted(ACCURATE))
        assert machine().recall(self.SITE) and not machine().recall(replace(self.SITE, prologues=None))
        other = (self.MADE._replace(rope="interleaved"), self.MADE)
        assert not machine().recall(replace(self.SITE, prologues=other))

    def test_that_no_kernel_of_the_device_does_are_not(self, races):
        machine().measure(self.SITE, unpredicted(ACCURATE))
        assert machine().recall(replace(self.SITE, prologues=None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_race_on_a_gpu_leaves_it_as_it_was():
    """Its random numbers, its memory and its current stream; the time of a call is the kernel's."""
    site = replace(SITE, device="cuda:0", dtype="bfloat16", heads=16, kv_heads=16, q_len=2048, kv_len=2048)
    site = replace(site, head_dim=128, value_dim=128)
    torch.randn(1, device="cuda")
    stream, before, state = torch.cuda.current_stream(), torch.cuda.memory_allocated(), torch.cuda.get_rng_state()

    def slow(q, k, v, **how):
        for _ in range(20):
            q = q * 1.0
        return q

    times = local.race(site, [FAST], only_ops(attention=slow))
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == stream and torch.cuda.memory_allocated() <= before
    assert torch.equal(torch.cuda.get_rng_state(), state) and torch.randn(1, device="cuda").isfinite().all()
    assert times["sdpa"].device < times[" ".join(FAST)].device and min(times["sdpa"]) > 1


class TestReasons:
    def test_of_sizes_that_change(self, races):
        class Symbolic:
            pass

        reason = machine().measure(replace(SITE, q_len=Symbolic()), unpredicted(ACCURATE))
        assert reason == "sizes that change are not measured while compiling, numbers are" and not races

    def test_of_a_site_that_takes_too_long(self, races):
        reason = machine().measure(replace(SITE, q_len=200_000, kv_len=200_000), unpredicted(ACCURATE))
        assert reason == "200000 x 200000 tokens take too long to measure while compiling" and not races

    def test_of_one_that_takes_too_much_memory(self, races):
        reason = machine().measure(replace(SITE, batch=1, q_len=1, kv_len=4_000_000), unpredicted(ACCURATE))
        assert "MiB are too many" in reason and not races

    def test_of_a_kernel_that_fails(self):
        tried = []

        def broken(*tensors, **how):
            tried.append(tensors)
            raise RuntimeError("no such instruction")

        failing = Local({"device": "some CPU"}, only_ops(attention=broken), cuda_graphs=False)
        for _ in range(2):
            assert failing.measure(SITE, unpredicted(ACCURATE)) == "measuring failed: RuntimeError: no such instruction"
        assert len(tried) == 1, "not once more for each layer"
        assert failing.recall(SITE) == {}


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (SITE, (2, 4, 2)),
        (replace(SITE, batch=64, heads=32, kv_heads=32, q_len=512, kv_len=512), (1, 26, 26)),
        (replace(SITE, batch=64, heads=32, kv_heads=8, q_len=2048, kv_len=2048), (1, 8, 2)),
        (replace(SITE, batch=64, heads=32, kv_heads=32, q_len=16384, kv_len=16384), (1, 2, 2)),
        (replace(SITE, batch=64, heads=2, kv_heads=2, q_len=512, kv_len=512), (13, 2, 2)),
        (replace(SITE, batch=1, heads=4, kv_heads=1, q_len=4096, kv_len=4096), (1, 4, 1)),
        (replace(SITE, batch=64, heads=32, kv_heads=32, q_len=1, kv_len=65536, head_dim=64), (1, 15, 15)),
    ],
    ids=[
        "small",
        "fewer sequences and heads",
        "whole groups",
        "fewer of long ones",
        "fewer sequences",
        "no fewer than it has",
        "of less memory",
    ],
)
def test_a_large_site_is_measured_on_less_of_it(site, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    smaller = local._shrink(site, 2)
    assert (smaller.batch, smaller.heads, smaller.kv_heads) == expected


KEY = {"device": "some CPU", "q_len": 90}
NO_TIMES = [
    {"times": {"qk_int8_pv_fp16 cpu": [[300.0, 0.0], ours, 8, "2x4x90x72", "2026-11-22", seen]}}
    for ours, seen in (
        (["a", 0.0], None),
        ([None, 0.0], None),
        ([0.0, 0.0], None),
        ([-1.0, 0.0], None),
        ([math.nan, 0.0], None),
        ([1.0, 0.0], -1),
    )
]


class TestStore:
    def test_a_file_that_is_no_measurement_is_set_aside_and_said(self, folder, caplog):
        store.remember(KEY, {"times": {}})
        (file,) = folder.glob("*.json")
        store._known.clear()
        for text in ("{", "[]", '{"schema": 1}'):
            file.write_text(text)
            with caplog.at_level(logging.WARNING, "sagecompile"):
                assert store.recall(KEY, dict) is None
            assert not file.exists() and file.with_suffix(".bad").read_text() == text
        assert "is no measurement" in caplog.text

    @pytest.mark.parametrize(
        "found", [{}, {"times": [1]}, {"times": {"a b": [[1.0], [1.0]]}}, {"times": {"a": 1}}, *NO_TIMES]
    )
    def test_a_measurement_with_other_content_is_set_aside_too(self, races, folder, monkeypatch, found):
        machine().measure(SITE, unpredicted(ACCURATE))
        (file,) = folder.glob("*.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"found": found}))
        forget(monkeypatch)
        assert machine().recall(SITE) == {} and not file.exists()

    @pytest.mark.parametrize(
        ("change", "why"),
        [({"schema": 0}, "schema 0: this version reads"), ({"key": {"q_len": 1}}, "it is of something else")],
    )
    def test_one_of_an_older_schema_or_of_something_else_is_set_aside_too(self, folder, caplog, change, why):
        store.remember(KEY, {"times": {}})
        (file,) = folder.glob("*.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        store._known.clear()
        with caplog.at_level(logging.WARNING, "sagecompile"):
            assert store.recall(KEY, dict) is None
        assert not file.exists() and file.with_suffix(".bad").exists() and why in caplog.text

    def test_a_folder_that_cannot_be_used_costs_a_warning(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with caplog.at_level(logging.WARNING, "sagecompile"):
            for q_len in (1, 2):
                store.remember(KEY | {"q_len": q_len}, {"times": {"a b": 2.0}})
        assert store.recall(KEY | {"q_len": 2}, dict) == {"times": {"a b": 2.0}}, "this process still knows"
        assert caplog.text.count("every process measures again") == 1

    @pytest.mark.parametrize("place", ["folder", "file"])
    def test_what_others_could_have_written_is_not_believed(self, folder, caplog, place):
        store.remember(KEY, {"times": {}})
        (file,) = folder.glob("*.json")
        store._known.clear()
        (folder if place == "folder" else file).chmod(0o777)
        with caplog.at_level(logging.WARNING, "sagecompile"):
            assert store.recall(KEY, dict) is None and store.count({}) == 0
        (record,) = caplog.records
        assert "can be written to by others (mode 0777)" in record.message and file.exists()

    def test_nor_is_anything_kept_there(self, folder, caplog):
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        with caplog.at_level(logging.WARNING, "sagecompile"):
            store.remember(KEY, {"times": {}})
        assert not list(folder.iterdir()) and "every process measures again" in caplog.text
        assert store.recall(KEY, dict) == {"times": {}}, "this process still knows"

    def test_a_folder_that_may_not_be_entered_is_empty(self, folder, monkeypatch):
        """As that of another user's home in a container."""

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        store.remember(KEY, {"times": {}})
        monkeypatch.setattr(files.Path, "glob", refuse)
        assert store.count({}) == 0
        store.forget()
        cost.profiles.cache_clear()
        assert cost.profiles()
        cost.profiles.cache_clear()

    def test_forgets(self, folder):
        store.remember(KEY, {"times": {}})
        store.forget()
        assert store.recall(KEY, dict) is None and not list(folder.iterdir())

    def test_counts_what_holds_for_some_facts(self, folder):
        for key in (KEY, KEY | {"q_len": 91}, KEY | {"torch": "2.0"}, KEY | {"device": "another"}, KEY | {"turn": 1}):
            store.remember(key, {"times": {}})
        (folder / "broken.json").write_text("{")
        (folder / "older.json").write_text(json.dumps({"schema": 0, "key": KEY}))
        assert store.count({"device": "some CPU"}, without=("turn",)) == 3
        assert store.count({"device": "some CPU", "torch": "2.0"}) == 1
        assert store.count({"device": "some CPU", "torch": None}) == 0

    def test_many_processes_at_once(self, tmp_path, folder):
        code = (
            "import sys; from sagecompile.cost import store\nfor i in range(200): store.remember({'k': 1}, {'by': i})"
        )
        running = [subprocess.Popen([sys.executable, "-c", code], env=os.environ | {}) for _ in range(4)]
        while any(process.poll() is None for process in running):
            store._known.clear()
            assert store.recall({"k": 1}, dict) is None or "by" in store.recall({"k": 1}, dict)
        assert [process.returncode for process in running] == [0] * 4
        assert [file.suffix for file in folder.iterdir()] == [".json"]


class TestDecide:
    """Stored, then the profile, then measured now."""

    CPU = Device("cpu", "AMD EPYC (AVX-512 BF16)", threads=2)
    COVERED = replace(SITE, heads=8, kv_heads=8, q_len=1024, kv_len=1024, head_dim=64, value_dim=64)

    def decide(self, site, **settings):
        return decide(site, self.CPU, Settings(**settings), lambda *_: None, machine())

    def test_what_no_profile_covers_is_measured(self, races):
        decision = self.decide(SITE, formats=("qk_int8_pv_fp16",))
        assert isinstance(decision, Use) and decision.provider == "cpu"
        assert "3.00x predicted (100 us against 300 us, measured here at 2x4/2x90x72" in decision.reason

    def test_what_loses_is_kept_with_what_was_measured(self, races, monkeypatch):
        monkeypatch.setitem(TIMES, ACCURATE, Time(400.0))
        decision = self.decide(SITE, formats=("qk_int8_pv_fp16",))
        assert (
            isinstance(decision, Keep)
            and "0.75x for qk_int8_pv_fp16 by cpu (400 us against 300 us, measured here" in decision.reason
        )

    def test_what_a_profile_covers_is_not(self, races):
        decision = self.decide(self.COVERED)
        assert isinstance(decision, Use) and "AMD EPYC (AVX-512 BF16)" in decision.reason and not races

    def test_what_was_measured_here_goes_before_the_profile(self, races):
        machine().measure(self.COVERED, unpredicted(ACCURATE))
        assert "measured here" in self.decide(self.COVERED, formats=("qk_int8_pv_fp16",)).reason

    def test_why_nothing_was_measured_is_said(self, races):
        decision = self.decide(replace(SITE, q_len=300_000, kv_len=300_000))
        assert "(300000 x 300000 tokens take too long to measure while compiling)" in decision.reason

    def test_a_kernel_that_cannot_run_is_not_measured(self, races):
        decision = decide(SITE, self.CPU, Settings(), lambda *_: "cpu failed: no compiler", machine())
        assert decision == Keep("cpu failed: no compiler") and not races

    @pytest.mark.parametrize("policy", ["always", "never"])
    def test_other_policies_measure_nothing(self, races, policy):
        self.decide(SITE, policy=policy)
        assert not races


class TestSetting:
    @pytest.mark.parametrize(("text", "value"), [("0", False), ("false", False), ("True", True), (False, False)])
    def test_values(self, text, value):
        assert Settings().updated({"measure": text}, "").measure is value

    def test_a_wrong_one_is_named(self):
        with pytest.raises(OptionError, match=r"sage\.measure is 'maybe'; it can be true, 1, false, 0"):
            Settings().updated({"measure": "maybe"}, "")

    def test_off(self, races):
        q = torch.randn(1, 2, 90, 72)
        off = {"sage.measure": False}
        _, report = compiled(F.scaled_dot_product_attention, q, q, q, policy="auto", options=off)
        assert report.kept[0].decision.cause.startswith("not measured at this shape") and not races


def test_the_first_process_measures_and_the_second_does_not():
    """Through torch.compile, at a shape that no profile covers."""
    code = """
import sys, torch, torch.nn.functional as F
from sagecompile.cost import local
from sagecompile.report import recording
local.waited_s = lambda: 0.0
local.ALIKE = local.APART = float("inf")  # of a CPU that others use, too
if sys.argv[1] == "second":
    local.race = None
q = torch.randn(1, 2, 90, 48)
with torch.no_grad(), recording() as found:
    torch.compile(F.scaled_dot_product_attention, backend="sage_inductor")(q, q, q)
print(found[0].entries[0].decision.reason)
"""
    said = []
    for turn in ("first", "second"):
        done = subprocess.run([sys.executable, "-c", code, turn], capture_output=True, text=True, check=True)
        said.append(done.stdout.splitlines()[-1])
    assert said[0] == said[1] and "measured here at 1x2x90x48" in said[0]


def test_a_bound_that_is_a_symbol_is_not_compared():
    """That would be a guard, and a graph more for a prompt without a context."""

    class Symbol:
        def __bool__(self):
            raise AssertionError("compared")

        def __eq__(self, other):
            raise AssertionError("compared")

    site = replace(SITE, mask=Mask(Symbol()))
    assert local._has_fixed_sizes(SITE) and not local._has_fixed_sizes(site)
