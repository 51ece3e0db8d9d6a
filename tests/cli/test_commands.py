"""The command line as a user types it: output, exit codes, and one clear line for what is wrong."""

from __future__ import annotations

import json
import logging
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F

from sagecompile import explain, files
from sagecompile.backend import measurements
from sagecompile.cli import doctor, main
from sagecompile.cost import store
from sagecompile.kernels import available
from sagecompile.site import Device

MODELS = """
import torch, torch.nn.functional as F

class Model(torch.nn.Module):
    def forward(self, q, k):
        return F.scaled_dot_product_attention(q, k, k)

def make():
    x = torch.randn(1, 2, 64, 64)
    return Model(), (x, x)

def make_by_name():
    x = torch.randn(1, 2, 64, 64)
    return Model(), {"q": x, "k": x}

def wrong():
    return Model()
"""
SCRIPT = """
import sys, torch, torch.nn.functional as F
length = int(sys.argv[1]) if len(sys.argv) > 1 else 64
q = torch.randn(1, 2, length, 64)
torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="BACKEND")(q)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SAGECOMPILE_POLICY", "auto")
    (tmp_path / "cli_models.py").write_text(MODELS)
    (tmp_path / "script.py").write_text(SCRIPT.replace("BACKEND", "sage_inductor"))
    (tmp_path / "other.py").write_text(SCRIPT.replace("BACKEND", "eager"))
    return tmp_path


@pytest.mark.parametrize("factory", ["make", "make_by_name"])
def test_explain_factory(factory, capsys):
    assert main(["explain", f"cli_models:{factory}", "--policy", "always"]) == 0
    assert "1 of 1 attention sites rewritten (1 graph)" in capsys.readouterr().out


def test_explain_json(capsys):
    assert main(["explain", "cli_models:make", "--policy", "never", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 1


def test_explain_script_with_its_arguments(capsys):
    assert main(["explain", "script.py", "--policy", "always", "--", "100"]) == 0
    out = capsys.readouterr().out
    assert "1x2x100x64" in out and "script.py:5" in out


@pytest.mark.parametrize("target", ["cli_models:make", "script.py"])
def test_explain_measures_errors(target, folder, capsys):
    assert main(["explain", target, "--policy", "always", "--measure-error", "--json", "--dump", "dumped"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert 0.001 < entry["measured"]["error"] < 0.045 and entry["measured"]["exact_rows"] == 0
    assert "torch.ops.sagecompile.attention" in (folder / "dumped/graph_0.after.py").read_text()
    assert main(["explain", target, "--policy", "always"]) == 0
    assert "exact rows" not in capsys.readouterr().out, "it ends with the command"


def test_explain_has_no_errors_of_what_is_kept(capsys):
    assert main(["explain", "cli_models:make", "--policy", "never", "--measure-error"]) == 0
    assert "exact rows" not in capsys.readouterr().out


def test_a_file_is_no_folder_to_dump_into(folder, capsys):
    (folder / "taken").write_text("")
    assert main(["explain", "cli_models:make", "--dump", "taken"]) == 2
    assert "--dump taken is a file: it needs a folder" in capsys.readouterr().err


def test_dump_writes_the_graphs_before_and_after(folder):
    assert main(["explain", "cli_models:make", "--policy", "always", "--dump", "dumped"]) == 0
    before = (folder / "dumped/graph_0.before.py").read_text()
    after = (folder / "dumped/graph_0.after.py").read_text()
    assert "torch._C._nn.scaled_dot_product" in before and "sagecompile" not in before
    assert "torch.ops.sagecompile.attention" in after and "torch._C._nn.scaled_dot_product" not in after
    assert list((folder / "dumped").glob("full_code_for_*.py"))  # depyf's own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nothing"], "neither module:factory nor script.py"),
        (["explain", "no_such_module:make"], "No module named 'no_such_module'"),
        (["explain", "cli_models:missing"], "has no attribute 'missing'"),
        (["explain", "cli_models:wrong"], "it must return (model, inputs)"),
        (["explain", "cli_models:Model.forward"], "has no attribute 'Model.forward'"),
        (["explain", "cli_models:torch"], "must be a function that can be called without arguments"),
        (["explain", "missing.py"], "no file missing.py"),
        (["explain", "other.py"], 'needs torch.compile(model, backend="sage_inductor")'),
        (["explain", "cli_models:make", "--policy", "often"], "it can be auto, always, never"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unknown_command_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        main(["explian"])
    assert "bench" in (error := capsys.readouterr().err) and "explain" in error


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu" and {row["format"] for row in cpu["formats"]} == {"qk_int8_pv_fp16", "qk_int8_pv_fp8"}
    assert all(row["works"] for row in cpu["formats"] if row["provider"] == "reference")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "reference     works" in text and f"{cpu['measured']} measurements that hold for these versions" in text


def test_doctor_says_what_is_kept_and_where(capsys, monkeypatch, tmp_path):
    """Not what `calibrate` keeps to go on with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = measurements("cpu", cuda_graphs=False).machine
    store.remember(dict(machine) | {"q_len": 90}, {"times": {}})
    store.remember(dict(machine) | {"q_len": 91, "calibration": 0}, {"times": {}})
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "1 measurements that hold" in text and "not kept" not in text
    monkeypatch.setattr(files, "why_not_kept", lambda kind: "/there cannot be written to")
    assert main(["doctor"]) == 0
    assert "not kept: /there cannot be written to, so every process measures again" in capsys.readouterr().out


def test_doctor_says_what_slow_launches_need(capsys, monkeypatch):
    monkeypatch.setattr(available, "device", lambda name: Device("cpu", "some CPU", slow_launches=True))
    monkeypatch.setattr("sagecompile.kernels.hopper.relaunch.why_not", lambda: "no C++ compiler: needs g++")
    assert main(["doctor"]) == 0
    assert "no C++ compiler: needs g++: Python launches each kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "hopper"), [((8, 0), "compute capability 8.0: hopper needs 9.0"), ((9, 0), None)]
)
def test_doctor_asks_every_provider_for_itself(capability, hopper, capsys, monkeypatch):
    """On a GPU that only this test sees: what is wrong with one provider or format is not said of another."""

    def trial(provider, *_):
        return "triton failed: RuntimeError: ptxas fatal" if provider == "triton" else None

    gpu = Device("cuda", "a GPU", capability)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(available, "device", lambda name: gpu if name.startswith("cuda") else Device("cpu", "a CPU"))
    monkeypatch.setattr(available, "version", lambda name: None if name == "sageattention" else "1.0")
    monkeypatch.setattr(available, "_trial", trial)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["devices"][1]
    why = {(row["format"], row["provider"]): row["why"] for row in found["formats"]}
    assert why["qk_int8_pv_fp16", "hopper"] == hopper
    assert why["qk_int8_pv_fp16", "triton"] == "triton failed: RuntimeError: ptxas fatal"
    assert why["qk_int8_pv_fp16", "sageattention"] == "sageattention not installed: pip install sageattention"
    if capability == (8, 0):
        assert why["qk_int8_pv_fp8", "triton"] == "compute capability 8.0: qk_int8_pv_fp8 needs 8.9"
    else:
        assert why["qk_int8_pv_fp8", "hopper"] is None


def test_a_wrong_option_in_a_script_is_one_line(folder, capsys):
    (folder / "wrong.py").write_text(
        SCRIPT.replace('backend="BACKEND"', 'backend="sage_inductor", options={"policy": 1}')
    )
    assert main(["explain", str(folder / "wrong.py")]) == 2
    assert capsys.readouterr().err == "sagecompile: unknown option policy; write sage.policy\n"


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == metadata.version("sagecompile")


def test_one_that_is_stopped_ends_as_shells_have_it(monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", stopped)
    assert main(["doctor"]) == 130 and capsys.readouterr().err == "\nsagecompile: stopped\n"


def test_a_model_that_another_backend_compiled_is_said_to_be_one(caplog):
    q = torch.randn(1, 2, 64, 64)
    for backend, is_another in (("eager", True), ("sage_inductor", False)):
        caplog.clear()
        with torch.no_grad(), caplog.at_level(logging.WARNING, "sagecompile"):
            explain(torch.compile(F.scaled_dot_product_attention, backend=backend), q, q, q)
        assert ("another backend compiled this model" in caplog.text) == is_another
