"""Inductor's and AOTAutograd's caches: a second process starts warm, never with a graph of other settings or sources.

Each case runs small programs in processes of their own on one cache folder and reads the counters that torch keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from sagecompile import backend

PROGRAM = """
import json, sys
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from sagecompile import backend

if sys.argv[2] == "other sources":
    backend.source_hash = lambda: "other"

ran = []

class Named(CustomGraphPass):
    # Of the user: it writes down that it ran.

    def __init__(self, slot, version):
        self.slot, self.version = slot, version

    def __call__(self, graph):
        ran.append(self.slot)

    def uuid(self):
        return self.version

def unnamed(slot):
    return lambda graph: ran.append(slot)

options = {"sage.policy": sys.argv[1]}
for slot in backend.PASS_SLOTS if sys.argv[3] else ():
    options[slot] = Named(slot, sys.argv[3])
if sys.argv[3] == "unnamed":
    options[slot] = unnamed(slot)

def model(q, k, v):
    return F.scaled_dot_product_attention(q * 2, k, v)

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 64, 64) for _ in range(3))
with torch.no_grad():
    out = torch.compile(model, backend="sage_inductor", options=options)(q, k, v)
    error = (out - model(q, k, v)).norm() / model(q, k, v).norm()
print(json.dumps({
    "hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
    "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "bypasses": counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"],
    "quantized": bool(error > 1e-4),
    "ran": ran,
}))
"""


def run(folder, policy: str = "always", sources: str = "these sources", passes: str = "") -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    command = [sys.executable, "-c", PROGRAM, policy, sources, passes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache folder that one process with `policy=always` has filled."""
    folder = tmp_path_factory.mktemp("cache")
    cold = run(folder)
    assert cold["aot_hits"] == 0 and cold["misses"] == 1 and cold["bypasses"] == 0 and cold["quantized"]
    return folder


def test_second_process_starts_warm(warm):
    found = run(warm)
    assert found["aot_hits"] == 1 and found["misses"] == 0 and found["quantized"]


def test_other_settings_compile_anew(warm):
    found = run(warm, policy="never")
    assert found["aot_hits"] == 0 and not found["quantized"]


def test_other_sources_compile_anew(warm):
    assert run(warm, sources="other sources")["hits"] == 0


# With a pass of the user in every slot that Inductor has for them, so that our stamp shares one.

SLOTS = sorted(backend.PASS_SLOTS)


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A cache folder that one process with four passes has filled."""
    folder = tmp_path_factory.mktemp("taken")
    cold = run(folder, passes="one")
    assert cold["hits"] == 0 and cold["misses"] == 1 and cold["bypasses"] == 0 and sorted(cold["ran"]) == SLOTS
    return folder


def test_second_process_with_passes_starts_warm(taken):
    found = run(taken, passes="one")
    assert found["aot_hits"] == 1 and found["misses"] == 0 and found["ran"] == []


@pytest.mark.parametrize("other", [{"sources": "other sources"}, {"passes": "another"}], ids=["ours", "theirs"])
def test_other_sources_of_ours_or_theirs_compile_anew(taken, other):
    found = run(taken, **{"passes": "one", **other})
    assert found["hits"] == 0 and found["misses"] == 1 and sorted(found["ran"]) == SLOTS


def test_a_pass_without_a_uuid_is_never_cached(taken):
    """Nor is it by Inductor alone."""
    found = run(taken, passes="unnamed")
    assert found["hits"] == 0 and found["bypasses"] > 0 and sorted(found["ran"]) == SLOTS


class Named(CustomGraphPass):
    def __init__(self, name: str, ran: list[str]) -> None:
        self.name, self.ran = name, ran

    def __call__(self, graph: object) -> None:
        self.ran.append(self.name)

    def uuid(self) -> str:
        return self.name


@pytest.mark.parametrize("how", ["one", "dashes", "of the config", "several"])
def test_passes_are_found_however_they_are_given(how):
    last, ran, config = backend.PASS_SLOTS[-1], [], {}
    options = {slot: Named(slot, ran) for slot in backend.PASS_SLOTS}
    if how == "dashes":
        options[last.replace("_", "-")] = options.pop(last)
    elif how == "of the config":
        config[last] = options.pop(last)
    elif how == "several":  # as since torch 2.13
        options[last] = [options[last], Named("another", ran)]
    with torch._inductor.config.patch(config):
        found = backend._with_stamp(options, ["a < b"])
    stamp, theirs = found[last], [last, *(["another"] if how == "several" else [])]
    stamp(None)
    assert found.keys() == set(backend.PASS_SLOTS) and ran == theirs
    assert stamp.uuid() == (backend.source_hash(), ("a < b",), tuple(theirs))
