"""Real diffusers architectures, small and random, with the attention processors they come with.

Most tests run the rewritten graph without Inductor. Under `-m gpu` the same tests run on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from checks import assert_run_by, assert_sites, on, run
from support import ACCURATE, EXACT, FAST, TOLERANCE, compiled, relative_error
from zoo import DIFFUSION

OF_THE_OUTPUT = 0.12
"""Attention moves the output of these models by a tenth: a lost scale shows at 0.006, FP8 at 0.0046, INT8 at 0.001."""

SIDE, SMALLER = 6, 5
"""Of the image, in patches."""


def call(
    name: str, device: str, batch: int = 2, side: int = SIDE, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    return on(device, {**DIFFUSION[name].inputs(batch, side), "return_dict": False}, dtype)


@pytest.mark.parametrize("format", [ACCURATE, FAST])
@pytest.mark.parametrize("name", DIFFUSION)
def test_sites_and_output(name, format, device):
    report, error = run(zoo.build_diffusion(name).to(device), call(name, device), dynamic=False, format=format)
    assert_sites(report, DIFFUSION[name].sites)
    assert_run_by(report, format, device)
    assert report.graphs == 1
    assert error <= OF_THE_OUTPUT * TOLERANCE[format]


@pytest.mark.parametrize("name", DIFFUSION)
def test_batch_of_one(name, device):
    report, error = run(zoo.build_diffusion(name).to(device), call(name, device, batch=1), dynamic=False)
    assert_sites(report, DIFFUSION[name].sites)
    assert error <= OF_THE_OUTPUT * TOLERANCE[ACCURATE]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_second_resolution_makes_it_dynamic(name, device):
    calls = [call(name, device, side=side) for side in (SIDE, SMALLER)]
    report, error = run(zoo.build_diffusion(name).to(device), *calls)
    assert [entry.decision.reason for entry in report.kept] == []
    assert (report.graphs, len(report.used)) == (2, 4)
    assert error <= OF_THE_OUTPUT * TOLERANCE[ACCURATE]


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_everything_dynamic(name, device):
    report, error = run(zoo.build_diffusion(name).to(device), call(name, device), dynamic=True)
    assert_sites(report, DIFFUSION[name].sites)
    assert error <= OF_THE_OUTPUT * TOLERANCE[ACCURATE]


def test_everything_dynamic_in_flux(device):
    """`dynamic=True` makes a symbol of the float `dropout_p`, which is read as the number it is."""
    report, error = run(zoo.build_diffusion("flux").to(device), call("flux", device), dynamic=True)
    assert_sites(report, DIFFUSION["flux"].sites)
    assert error <= TOLERANCE[ACCURATE]


@pytest.mark.parametrize("name", DIFFUSION)
def test_bfloat16(name, device):
    model = zoo.build_diffusion(name).to(device, torch.bfloat16)
    report, error = run(model, call(name, device, dtype=torch.bfloat16))
    assert_sites(report, DIFFUSION[name].sites)
    assert {entry.site.dtype for entry in report.used} == {"bfloat16"}
    assert error <= EXACT[torch.bfloat16]


def test_fused_projections(device):
    """One matmul for Q, K and V, which are then strided views of its result."""
    model = zoo.build_diffusion("sd3").to(device)
    model.fuse_qkv_projections()
    model.requires_grad_(False)  # the fused weights are new ones
    report, error = run(model, call("sd3", device))
    assert_sites(report, DIFFUSION["sd3"].sites)
    assert error <= OF_THE_OUTPUT * TOLERANCE[ACCURATE]


def test_training_step(device):
    model = zoo.build_diffusion("dit").to(device).requires_grad_(True)
    report, error = run(model, call("dit", device))
    assert_sites(report, dict.fromkeys(DIFFUSION["dit"].sites, "needs a gradient"))
    assert error <= EXACT[torch.float32]


def test_compiled(device):
    model, inputs = zoo.build_diffusion("dit").to(device), call("dit", device)
    out, report = compiled(model, call_kwargs=inputs, formats=(FAST,), fullgraph=True)
    assert_sites(report, DIFFUSION["dit"].sites)
    assert relative_error(out[0], model(**inputs)[0]) <= OF_THE_OUTPUT * TOLERANCE[FAST]
