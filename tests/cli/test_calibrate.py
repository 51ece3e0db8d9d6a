"""`sagecompile calibrate` and `bench decision` on small grids of this CPU; a kernel without a compiler stands in."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sagecompile import cost, files, formats, ops
from sagecompile.cli import calibrate, main
from sagecompile.cli.bench import decision, prologues
from sagecompile.cost import store
from sagecompile.cost.profile import Profile, Time
from sagecompile.decide import Keep, Use
from sagecompile.kernels import available
from sagecompile.site import AttentionSite

GRID = calibrate.Grid(("float32",), (32,), (1, 4), (16, 32, 64), 4 * 4 * 32 * 32 * 32, turns=2, budget_s=0.01)
FAST = "qk_int8_pv_fp16 cpu"


@pytest.fixture(autouse=True)
def kernel(monkeypatch, tmp_path):
    """Of the provider `cpu`: wrong but fast, and counted. An empty cache folder, a small grid."""
    ran = []

    def attention(q, k, v, **how):
        ran.append(q.shape)
        return v.clone()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "_known", {})
    monkeypatch.setattr(available, "refusal", lambda *_, **__: None)
    monkeypatch.setattr(ops, "attention", attention)
    monkeypatch.setattr(ops, "qk_norm_rope_attention", attention)
    monkeypatch.setattr(calibrate, "GRIDS", {"cpu": GRID})
    cost.profiles.cache_clear()
    yield ran
    cost.profiles.cache_clear()


def own_profile():
    (file,) = files.folder("profiles").glob("*.json")
    return Profile.read(json.loads(file.read_text()))


class TestCalibrate:
    def test_writes_every_shape_that_is_not_too_large(self, capsys):
        assert main(["calibrate", "--device", "cpu"]) == 0
        points = own_profile().points
        expected = {(h, n, causal) for h in (1, 4) for n in (16, 32, 64) for causal in (False, True)}
        expected -= {(4, 64, False), (4, 64, True)}
        assert {(point.heads, point.length, point.family.is_causal) for point in points} == expected
        assert all(point.us.keys() == {"sdpa", FAST} and min(point.us.values()) > 0 for point in points)
        assert "policy=auto uses them from now on" in capsys.readouterr().err

    def test_what_it_wrote_is_what_auto_goes_by(self):
        assert main(["calibrate", "--device", "cpu"]) == 0
        cost.profiles.cache_clear()
        site = AttentionSite("", "", "sdpa", 2, 2, 2, 32, 32, 32, 32, "float32", "cpu")
        found = cost.predict(site, "qk_int8_pv_fp16", "cpu", available.device("cpu"), 1.05)
        (point,) = [p for p in own_profile().points if (p.heads, p.length, p.family.is_causal) == (4, 32, False)]
        assert found.speedup == pytest.approx(point.us["sdpa"] / point.us[FAST])

    def test_goes_on_where_it_was_and_starts_again_if_asked(self, kernel, monkeypatch, capsys):
        assert main(["calibrate", "--device", "cpu"]) == 0
        first = len(kernel)
        assert "18 of 20 measurements\n" in capsys.readouterr().err
        monkeypatch.setattr(store, "_known", {})  # a new process
        assert main(["calibrate", "--device", "cpu"]) == 0 and len(kernel) == first
        assert "18 of 20 measurements (18 from before)\n" in capsys.readouterr().err
        assert main(["calibrate", "--device", "cpu", "--again"]) == 0 and len(kernel) > first

    def test_share_prints_the_profile(self, capsys):
        assert main(["calibrate", "--device", "cpu", "--share"]) == 0
        assert Profile.read(json.loads(capsys.readouterr().out)) == own_profile()

    def test_kernels_that_do_prologues_are_measured_with_them_too(self, monkeypatch):
        """Also at a shape that is not the grid's. What Inductor takes is asked once a kind, and known the next time."""
        row, asked = formats.PROVIDERS["cpu"], []
        monkeypatch.setitem(formats.PROVIDERS, "cpu", replace(row, prologues=True))
        monkeypatch.setattr(calibrate, "GRIDS", {"cpu": replace(GRID, head_dims=(64,), lengths=(16, 32))})
        monkeypatch.setattr(calibrate, "MADE", ((4, 16), (4, 32)))
        monkeypatch.setattr(prologues, "copies_by_inductor", lambda device, made, *_: asked.append(made.kind) or 3.0)
        monkeypatch.setattr(prologues, "copy_us", lambda device, size: size * 16e6 / 8192)
        for _ in range(2):
            assert main(["calibrate", "--device", "cpu"]) == 0
        kinds = ["half", "norm, half", "interleaved", "norm, interleaved"]
        assert asked == kinds
        points = {(point.heads, point.length) for point in own_profile().points}
        assert points == {(1, 16), (1, 32), (4, 16), (4, 32)}
        costs = own_profile().prologues.added_us
        assert list(costs) == [(kind, 64) for kind in kinds]
        for by_name in costs.values():
            assert by_name["copy"] == ((64, 32e6), (128, 64e6)) and by_name["sdpa"] == ((64, 96e6), (128, 192e6))
            assert by_name.keys() == {"copy", "sdpa", FAST} and all(us > 0 for _, us in by_name[FAST])
        cost.profiles.cache_clear()
        site = AttentionSite("", "", "sdpa", 1, 4, 4, 32, 32, 64, 64, "bfloat16", "cpu")
        site = replace(site, prologues=(calibrate.PROLOGUES[1],) * 2)
        assert cost.beyond_a_copy_us(site, 4, available.device("cpu").name) == pytest.approx(128e6)

    def test_a_folder_that_cannot_be_used_is_named(self, kernel, monkeypatch, tmp_path, capsys):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert main(["calibrate", "--device", "cpu"]) == 2
        said = capsys.readouterr().err
        assert "set XDG_CACHE_HOME" in said and "--share" in said and not kernel, "nothing was measured in vain"
        assert main(["calibrate", "--device", "cpu", "--share"]) == 0
        said = capsys.readouterr()
        assert Profile.read(json.loads(said.out)).points and "uses them from now on" not in said.err

    def test_one_that_is_stopped_says_how_to_go_on(self, monkeypatch, capsys):
        def race(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("sagecompile.cost.race.race", race)
        assert main(["calibrate", "--device", "cpu"]) == 130
        assert "stopped; run it again, it goes on where it was" in capsys.readouterr().err

    @pytest.mark.parametrize("share", [0.1, 0.6])
    def test_says_that_others_were_at_work(self, monkeypatch, capsys, share):
        begun = time.perf_counter()
        monkeypatch.setattr("sagecompile.cost.timer.waited_s", lambda: share * (time.perf_counter() - begun))
        assert main(["calibrate", "--device", "cpu"]) == 0
        said = "others were at work on this CPU 60% of the time: --again, once they are done"
        assert (said in capsys.readouterr().err) == (share > 0.5)

    def test_a_machine_without_kernels_is_told_where_to_look(self, monkeypatch, capsys):
        monkeypatch.setattr(available, "refusal", lambda *_, **__: "no compiler")
        assert main(["calibrate", "--device", "cpu"]) == 2
        assert "`sagecompile doctor` says why" in capsys.readouterr().err
        monkeypatch.setattr(available, "refusal", lambda *_, **__: None)  # it was installed since
        assert main(["calibrate", "--device", "cpu"]) == 0

    def test_a_shape_without_memory_is_left_out(self, monkeypatch, capsys):
        def race(site, *rest, **how):
            if site.q_len == 32:
                raise MemoryError
            return local.race(site, *rest, **how)

        local = SimpleNamespace(race=importlib.import_module("sagecompile.cost.race").race)
        monkeypatch.setattr("sagecompile.cost.race.race", race)
        assert main(["calibrate", "--device", "cpu"]) == 0
        assert {point.length for point in own_profile().points} == {16, 64}
        assert "1x1x32x32 left out: no memory" in capsys.readouterr().err


class TestDecision:
    SITE = AttentionSite("", "", "sdpa", 1, 2, 2, 64, 64, 32, 32, "float32", "cpu")

    def test_shapes_are_drawn_again_with_the_same_seed(self):
        first, second, other = (list(decision.draw("cpu", 30, seed)) for seed in (1, 1, 2))
        assert first == second != other and len(first) == 30
        assert len({site.q_len for site in first}) > 20

    def test_a_wrong_choice_has_a_regret(self):
        times = {"sdpa": Time(100.0, 10.0), FAST: Time(250.0, 300.0)}
        used = Use("qk_int8_pv_fp16", "cpu", cost.Prediction(3.0, "hoped"))
        row = decision.judge(self.SITE, used, times, cuda_graphs=True)
        assert row["chosen"] == FAST and row["best"] == "sdpa" and row["regret"] == 1.5 and row["clear"]
        assert row["predicted"] == 3.0 and row["measured"] == 0.4
        assert decision.judge(self.SITE, used, times, cuda_graphs=False)["regret"] == 2.0
        assert decision.judge(self.SITE, Keep("so"), times, cuda_graphs=True)["regret"] == 0

    def test_the_summary_counts(self):
        rows = [
            {"regret": regret, "clear": clear, "predicted": predicted, "measured": 2.0 if predicted else None}
            for regret, clear, predicted in ((0.0, True, 2.2), (0.02, False, None), (0.5, True, 4.0), (0.0, True, None))
        ]
        assert list(decision.summary(rows).values()) == [4, "1.0%", "50.0%", "50.0%", "2 of 3", "1 of 2"]

    def test_launches_are_those_of_the_whole_run(self, monkeypatch, tmp_path):
        """The host is slow for some shapes: that is not theirs."""
        launches = iter([500.0, 20.0, 40.0, 30.0, 20.0])
        monkeypatch.setattr(decision, "TURNS", {"cpu": 1})
        monkeypatch.setattr(decision, "race", lambda *_: {"sdpa": Time(1.0, next(launches)), FAST: Time(2.0)})
        file = tmp_path / "d.json"
        assert main(["bench", "decision", "--device", "cpu", "--shapes", "5", "--json", str(file)]) == 0
        found = json.loads(file.read_text())
        assert found["launch_us"] == {"sdpa": 20.0}
        assert [row["us"] for row in found["rows"]] == [{"sdpa": 20.0, FAST: 2.0}] * 5

    def test_the_command(self, capsys, tmp_path):
        assert main(["bench", "decision", "--device", "cpu", "--shapes", "2", "--json", str(tmp_path / "d.json")]) == 0
        found = json.loads((tmp_path / "d.json").read_text())
        assert len(found["rows"]) == 2 and found["summary"]["shapes"] == 2
        assert "regret, median" in capsys.readouterr().out
