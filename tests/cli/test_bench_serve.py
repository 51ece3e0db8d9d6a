"""`sagecompile bench serve` without a server: its prompts, its figures, its plot, and a server that does not start."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from sagecompile.cli import main
from sagecompile.cli.bench.serve import Answer, figures, make_prompts, plot
from sagecompile.cli.bench.vllm_server import Server, serving
from sagecompile.errors import SageCompileError


def test_prompts_have_the_lengths_in_turn_and_are_the_same_for_both_servers():
    prompts = make_prompts([3, 5], 4, 256, seed=1)
    assert [len(prompt) for prompt in prompts] == [3, 5, 3, 5]
    assert prompts == make_prompts([3, 5], 4, 256, seed=1) != make_prompts([3, 5], 4, 256, seed=2)
    assert all(0 <= token < 256 for prompt in prompts for token in prompt)


@pytest.mark.parametrize("argument", ["--compilation-config", "--compilation_config={}", "-cc.mode=0"])
def test_the_servers_compilation_is_ours_to_say(argument, capsys):
    assert main(["bench", "serve", "model", "--device", "cpu", "--", "--dtype", "float32", argument]) == 2
    assert f"{argument}: bench serve gives each server its own" in capsys.readouterr().err


def test_figures():
    answers = [Answer(100, (1, 2, 3), (0.5, 0.6, 0.8)), Answer(50, (4,), (0.1,))]
    found = figures(answers, 2.0)
    assert found["ttft_ms"] == pytest.approx(300) and found["ttft_p99_ms"] == pytest.approx(500)
    assert found["itl_ms"] == pytest.approx(150) and found["tokens_per_s"] == pytest.approx(77)


def test_the_last_counts_in_a_log(tmp_path):
    log = tmp_path / "log"
    lines = ["sagecompile: 1 of 9 tokens (11.1%)", "other", "sagecompile: 30 of 40 tokens (75.0%) by"]
    log.write_text("\n".join(lines))
    assert Server("", None, log).counts() == (30, 40)
    log.write_text("nothing of ours")
    assert Server("", None, log).counts() == (0, 0)


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SageCompileError, match="the server did not start; /bin/false -m vllm"):
        with serving("model", [], {}, tmp_path / "log"):
            raise AssertionError("it cannot have started")


def test_without_vllm_it_says_what_to_install(capsys):
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    assert main(["bench", "serve", "model", "--device", "cpu"]) == 2
    assert "bench serve needs vllm: pip install vllm" in capsys.readouterr().err


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"what": what, "ttft_by_length": [(100, 0.1), (200, 0.2)]} for what in ("vllm", "vllm, sagecompile")]
    plot(rows, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
