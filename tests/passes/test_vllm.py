"""vLLM's op in a post-grad graph becomes ours where that is decided: with dummy ops of the same schema, without vLLM.

In: graphs as vLLM hands them over, the layer's name as a string, an opaque object, or an input. Out: the graph after.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Graph

from sagecompile.decide import Keep, Use
from sagecompile.mask import CAUSAL
from sagecompile.passes import vllm
from sagecompile.report import Entry
from sagecompile.site import AttentionSite

SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor(a!) output, str layer_name) -> ()"
theirs_library = torch.library.Library("dummy_vllm", "DEF")
ours_library = torch.library.Library("dummy_ours", "DEF")
for library in (theirs_library, ours_library):
    library.define("attend" + SCHEMA)
THEIRS, OURS = torch.ops.dummy_vllm.attend.default, torch.ops.dummy_ours.attend.default


def graph_of(*names):
    """One attention layer for each name, each on the output of the one before."""
    graph = Graph()
    q = graph.placeholder("q")
    q.meta["val"] = torch.empty(5, 4, 64)
    out = q
    for name in names:
        given = name
        if not isinstance(name, str):
            given = graph.placeholder("name")
            given.meta["val"] = name
        kwargs = {"query": q, "key": q, "value": q, "output": out, "layer_name": given}
        both = graph.call_function(auto_functionalized, (THEIRS,), kwargs)
        out = graph.call_function(lambda x: x[1], (both,))
    graph.output(out)
    return graph


def entry(name, device):
    site = AttentionSite(name, "Attention", "vllm", 1, 4, 2, "n", "n", 64, 64, "float32", device, mask=CAUSAL)
    kept = Keep("sliding window 64: needs none")
    return Entry(site, kept if name.startswith("windowed") else Use("qk_int8_pv_fp16", "cpu"))


def ops(graph):
    return [node.args[0] for node in graph.nodes if node.target is auto_functionalized]


def test_each_layer_as_it_is_decided():
    graph = graph_of("layers.0", "windowed.1", "layers.2")
    before = [(node.op, node.kwargs) for node in graph.nodes]
    report = vllm.run(graph, THEIRS, OURS, entry)
    assert ops(graph) == [OURS, THEIRS, OURS]
    assert [(node.op, node.kwargs) for node in graph.nodes] == before, "nothing but the op changes"
    assert report.summary() == "2 of 3 attention sites rewritten; kept: sliding window 64 (1)"
    assert {entry.site.device for entry in report.entries} == {"cpu"}
    graph.lint()


@pytest.mark.parametrize(
    "name",
    [SimpleNamespace(value="windowed.0"), SimpleNamespace(real_obj=SimpleNamespace(value="windowed.0"))],
    ids=["opaque object", "input that stands for one"],
)
def test_the_name_is_found_behind_an_input(name):
    graph = graph_of(name)
    report = vllm.run(graph, THEIRS, OURS, entry)
    assert ops(graph) == [THEIRS] and report.entries[0].site.name == "windowed.0"


def test_a_graph_without_attention_stays_and_reports_nothing():
    graph = Graph()
    graph.output(graph.call_function(torch.relu, (graph.placeholder("x"),)))
    assert vllm.run(graph, THEIRS, OURS, entry).entries == ()
