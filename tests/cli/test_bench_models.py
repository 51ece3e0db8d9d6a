"""`sagecompile bench models`: each model has the attention calls and the length it is asked for, and runs."""

from __future__ import annotations

import json
from functools import partial
from math import prod

import pytest
import torch
from support import ACCURATE

from sagecompile import explain
from sagecompile.cli import main
from sagecompile.cli.bench.families import FAMILIES, near_cube
from sagecompile.cli.bench.models import build

LENGTH = 48
LENGTHS = {"dit": 49, "vit-base": 50, "vit-large": 50}
"""Of models that need a square."""
PER_LAYER = {
    "flux": [(LENGTH, LENGTH, False)] * 2,  # a double and a single block, the prompt included
    "wan": [(LENGTH, LENGTH, False), (LENGTH, 16, False)],  # and cross-attention to the prompt
    "wan-14b": [(LENGTH, LENGTH, False), (LENGTH, 16, False)],
    "dit": [(49, 49, False)],
    "llama": [(LENGTH, LENGTH, True)],
    "llama-decode": [(1, LENGTH + 1, False)],
    "bert-base": [(LENGTH, LENGTH, False)],
    "bert-large": [(LENGTH, LENGTH, False)],
    "vit-base": [(50, 50, False)],
    "vit-large": [(50, 50, False)],
}


def small(name, layers):
    family = FAMILIES[name]
    package = pytest.importorskip(family.package)
    make = partial(family.make, package, LENGTHS.get(name, LENGTH), layers, 2, True)
    return build(make, torch.device("cpu"))


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_has_the_length_and_the_layers_it_is_asked_for(name):
    model, inputs = small(name, 2)
    sites = [entry.site for entry in explain(model, **inputs).entries]
    found = sorted((site.q_len, site.kv_len, site.mask.is_causal) for site in sites)
    assert found == sorted(PER_LAYER[name] * 2)
    assert {(site.dtype, site.batch) for site in sites} == {("bfloat16", 2)}
    assert {str(site.mask) for site in sites} <= {"none", "causal"}
    assert not any(site.needs_grad for site in sites)


@pytest.mark.usefixtures("no_grad")
def test_a_model_is_the_same_on_every_build_and_keeps_in_float32_what_it_asks_for():
    (one, inputs), (other, again) = small("wan", 1), small("wan", 1)
    assert torch.equal(one(**inputs)[0], other(**again)[0])
    dtypes = {name: parameter.dtype for name, parameter in one.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == inputs["hidden_states"].dtype == torch.bfloat16


def test_a_prefill_gives_logits_for_the_last_token_only():
    model, inputs = small("llama", 1)
    assert model(**inputs)[0].shape == (2, 1, 256)


@pytest.mark.parametrize("volume", [1, 7, 32760, 32768, 65536, 4096])
@pytest.mark.parametrize("sides", [2, 3])
def test_near_cube(volume, sides):
    found = near_cube(volume, sides)
    assert len(found) == sides and prod(found) == volume


def test_near_cube_is_a_cube_where_it_can_be():
    assert near_cube(32768, 3) == (32, 32, 32) and near_cube(4096, 2) == (64, 64)


def test_the_command_reports_sites_time_and_error(capsys, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGECOMPILE_MIN_SPEEDUP", "1000")  # so that `auto` keeps it
    size = ["--models", "llama", "--lengths", "40", "--layers", "1", "--small"]
    assert main(["bench", "models", "--device", "cpu", *size, "--reference", "--json", "rows.json"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn" in out and "1 of 1 attention sites rewritten" in out
    rows = {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["inductor"]["error"] == rows["auto"]["error"] == 0 and rows["auto"]["report"]["kept"] == 1
    assert 1e-4 < rows[f"always {ACCURATE}"]["error"] < 0.1
    assert all(
        min(row["us"], row["compile_s"]) > 0 and (row["model"], row["length"]) == ("llama", 40) for row in rows.values()
    )


def test_an_impossible_length_is_said_and_the_next_one_runs(capsys):
    pytest.importorskip("diffusers")
    size = ["--models", "flux", "--lengths", "16", "--layers", "1", "--small"]
    assert main(["bench", "models", "--device", "cpu", *size]) == 0
    assert "flux 16: left out: ValueError: length 16: 16 are text, needs more" in capsys.readouterr().out
