"""What all benchmarks share: the command line, contestants that fail or cannot be captured, the results."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch
from support import relative_error

from sagecompile.cli import bench, main
from sagecompile.cli.bench.families import FAMILIES
from sagecompile.cli.bench.measure import measure
from sagecompile.cli.bench.session import results
from sagecompile.cost import timer
from sagecompile.cost.timer import Replays

CPU = torch.device("cpu")


def error_against(expected):
    return lambda out: relative_error(out, expected)


@pytest.mark.parametrize("what", ["attention", "block", "models"])
def test_a_gpu_that_is_not_there(what, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", what, "--device", "cuda"]) == 2
    assert "torch sees no CUDA GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:x", "cpu:one"])
@pytest.mark.parametrize("command", [["calibrate"], ["bench", "decision"]], ids=" ".join)
def test_a_device_that_is_none_of_ours(command, device, capsys):
    assert main([*command, "--device", device]) == 2
    assert f"--device {device}: it is cpu, cuda or cuda:N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lengths", "0", "needs numbers from 1 on, such as 512,1024"),
        ("--lengths", "abc", "needs numbers from 1 on, such as 512,1024"),
        ("--lengths", "128,-1", "needs numbers from 1 on, such as 512,1024"),
        ("--heads", "0", "needs one number from 1 on"),
        ("--heads", "4,8", "needs one number from 1 on"),
        ("--seconds", "0", "needs a number above 0"),
        ("--seconds", "inf", "needs a number above 0"),
        ("--seconds", "abc", "needs a number above 0"),
        ("--dtypes", "float8", "can be float16, bfloat16, float32"),
        ("--json", "no/such/folder/rows.json", "no folder no/such/folder"),
    ],
)
def test_an_impossible_value_is_refused_before_anything_runs(option, value, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "attention", option, value])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--graph"], "--graph: CUDA graphs need a CUDA device, this is cpu"),
        (["block", "--graph"], "--graph: CUDA graphs need a CUDA device, this is cpu"),
        (["attention", "--plot", "p.png"], "--plot needs matplotlib: pip install matplotlib"),
        (["attention", "--flash-attention-3", "no.so"], "--flash-attention-3: no file no.so"),
        (["models", "--models", "llama,flux"], "--models flux needs diffusers: pip install diffusers"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for package in ("matplotlib", "diffusers"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_models_named_are_those_that_can_be_built():
    assert set(bench.MODELS) == set(FAMILIES)


def test_results_are_written_when_a_run_is_cut_short(tmp_path):
    arguments = argparse.Namespace(json=tmp_path / "rows.json")
    with pytest.raises(KeyboardInterrupt), results(arguments, CPU) as found:
        found["rows"].append({"us": 1.0})
        raise KeyboardInterrupt
    written = json.loads(arguments.json.read_text())
    assert written["rows"] == [{"us": 1.0}] and {"schema", "device", "torch", "date"} <= written.keys()


def test_one_failing_contestant_is_said_and_the_others_are_measured(capsys):
    x = torch.ones(4)

    def broken():
        raise RuntimeError("no kernel\nfor this")

    found = measure({"broken": broken, "right": lambda: x + 1, "wrong": lambda: x}, CPU, False, error_against(x + 1))
    assert list(found) == ["right", "wrong"]
    assert found["right"].error == 0 and found["wrong"].error == pytest.approx(0.5)
    assert "broken: left out: RuntimeError: no kernel for this" in capsys.readouterr().out


def test_a_graph_holds_many_short_calls_and_its_time_is_shared(monkeypatch):
    captured, x = [], torch.ones(4)

    def capture(call, calls):
        captured.append(calls)
        out = call()
        return Replays(lambda: [out.copy_(call()) for _ in range(calls)], calls, out)

    monkeypatch.setattr(timer, "_capture", capture)
    (found,) = measure({"short": lambda: x + 1}, CPU, True, error_against(x + 1)).values()
    assert found.timed == "graph" and found.error == 0
    assert captured[0] == 1 and 1 < captured[1] <= timer.MOST_CALLS
    assert found.us < 1000  # of one call, where a replay takes about timer.REPLAY_US


@pytest.mark.parametrize("replay", ["nothing", "half"])
def test_a_replay_that_does_not_give_the_answer_is_not_timed(replay, capsys, monkeypatch):
    x = torch.ones(4)

    def capture(call, calls):
        out = call()
        return Replays(lambda: None if replay == "nothing" else out[:2].copy_(call()[:2]), calls, out)

    monkeypatch.setattr(timer, "_capture", capture)
    found = measure({"astray": lambda: x + 1}, CPU, True, error_against(x + 1))["astray"]
    assert found.timed == "eager" and found.error == 0
    assert "astray: timed eagerly, it cannot be captured in a CUDA graph: ValueError" in capsys.readouterr().out


def test_what_must_not_be_captured_is_not(monkeypatch):
    monkeypatch.setattr(timer, "_capture", lambda call, calls: pytest.fail("captured"))
    assert measure({"plain": lambda: torch.ones(1)}, CPU, True, eager_only={"plain"})["plain"].timed == "eager"


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnGpu:
    pytestmark = needs_gpu
    device = torch.device("cuda", 0)

    def test_a_captured_call_is_timed_without_its_launches(self):
        x = torch.ones(1024, device=self.device)
        calls = {"add": lambda: x + 1}
        graph = measure(calls, self.device, True, error_against(x + 1))["add"]
        eager = measure(calls, self.device, False, error_against(x + 1))["add"]
        assert (graph.timed, eager.timed) == ("graph", "eager") and graph.error == eager.error == 0
        assert graph.us < eager.us

    def test_a_kernel_on_another_stream_and_a_host_sync_are_timed_eagerly(self):
        x, elsewhere = torch.ones(1024, device=self.device), torch.cuda.Stream()

        def astray():
            out = torch.empty_like(x)
            with torch.cuda.stream(elsewhere):
                torch.add(x, 1, out=out)
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().wait_stream(elsewhere)
            return out

        def waits():
            return x + float(x[0].item())

        torch.cuda.synchronize()
        before = torch.cuda.current_stream()
        calls = {"waits": waits, "astray": astray, "fine": lambda: x + 1}
        found = measure(calls, self.device, True, error_against(x + 1))
        assert {name: one.timed for name, one in found.items()} == {
            "waits": "eager", "astray": "eager", "fine": "graph"
        }  # fmt: skip
        assert torch.cuda.current_stream() == before
