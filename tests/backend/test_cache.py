"""Inductor's and AOTAutograd's caches: a second process starts warm, never with a graph of other settings or sources.

Each case runs small programs in processes of their own on one cache folder and reads the counters that torch keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
from sagecompile import backend

if sys.argv[2] == "other sources":
    backend.source_hash = lambda: "other"

def model(q, k, v):
    return F.scaled_dot_product_attention(q * 2, k, v)

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 64, 64) for _ in range(3))
with torch.no_grad():
    out = torch.compile(model, backend="sage_inductor", options={"sage.policy": sys.argv[1]})(q, k, v)
    error = (out - model(q, k, v)).norm() / model(q, k, v).norm()
print(json.dumps({
    "hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
    "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "bypasses": counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"],
    "quantized": bool(error > 1e-4),
}))
"""


def run(folder, policy: str = "always", sources: str = "these sources") -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    command = [sys.executable, "-c", PROGRAM, policy, sources]
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
