"""Exact rows as they are counted where ops run, and sites that lose by them what they were chosen for.

In: inputs that INT8 does not hold, and such that it does. Out: the counts by site, the same from all who count; and of
sites whose speed-up was remembered beforehand, what is logged and what the next compilation does.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from support import compiled, hard_inputs, share_libraries

import sagecompile
from sagecompile import counters, ops
from sagecompile.cost import local, store
from sagecompile.cost.profile import Time
from sagecompile.formats import PROVIDERS
from sagecompile.kernels import compiler, counts, cpu
from sagecompile.kernels.cpu import build
from sagecompile.ops.attention import IN_PYTHON
from sagecompile.report import recording

HOW = {"scale": None, "ahead": None, "format": "qk_int8_pv_fp16", "tokens_first": True}
INTO = {"scale": 0.125, "ahead": 60, "format": "qk_int8_pv_fp16"}
HARD_KEYS = "a bias of 150 in 4 channels that RoPE turns, halves"
calls = itertools.count()

needs_kernel = pytest.mark.skipif(cpu.why_not() is not None, reason=f"the CPU kernel cannot run here: {cpu.why_not()}")


@pytest.fixture
def site():
    """A name that no other test has."""
    return f"counted.{next(calls)}"


@pytest.fixture(params=[pytest.param("cpu", marks=needs_kernel), "reference"])
def provider(request):
    if request.param == "cpu":
        build.OPS_LIBRARY.now()
        compiler.settle()
    return request.param


def with_hard_heads():
    """Of 8 heads one is too steep and one has a NaN."""
    q, k, v = (torch.randn(2, 4, 100, 64) for _ in range(3))
    q[0, 0] *= 1e4
    v[1, 2, 7, 3] = float("nan")
    return q, k, v


def shares_of_hard_keys():
    return hard_inputs(HARD_KEYS, 300, 64, 4, 2)


class TestCounts:
    @pytest.mark.parametrize("way", ["", IN_PYTHON])
    def test_heads_that_are_exact_as_a_whole_count_once(self, provider, site, way):
        attention = getattr(torch.ops.sagecompile, f"attention{way}")
        for count in (1, 2):
            attention(*with_hard_heads(), **HOW, provider=provider, site=site)
            assert sagecompile.exact_rows()[site] == (count, count * 800, count * 200)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("is_causal", [False, True])
    @needs_kernel
    def test_the_kernel_counts_what_the_specification_says(self, site, dtype, is_causal):
        """But for the rest of 12 queries, as it judges so many together."""
        given = [x.to(dtype) for x in shares_of_hard_keys()]
        for provider in ("cpu", "reference"):
            ops.attention(
                *given, **HOW | {"ahead": 0 if is_causal else None}, provider=provider, site=f"{site}.{provider}"
            )
        kernel, specified = (sagecompile.exact_rows()[f"{site}.{provider}"] for provider in ("cpu", "reference"))
        assert kernel[:2] == specified[:2] == (1, 1200)
        assert 0.5 * 1200 < specified.exact <= kernel.exact + 60 and kernel.exact <= specified.exact + 120

    def test_all_and_none(self, provider, site):
        for name, exact in (("scores of 200", 1200), ("scores of 5", 0)):
            ops.attention(*hard_inputs(name, 300, 64, 4, 2), **HOW, provider=provider, site=f"{site}.{name}")
            assert sagecompile.exact_rows()[f"{site}.{name}"] == (1, 1200, exact)

    def test_into_a_tensor_that_is_there(self, provider, site):
        """The last queries of a prompt, as vLLM has them, by a layer's name."""
        q, k, v = hard_inputs("scores of 200", 100, 64, 4, 2)
        for way in ("", IN_PYTHON):
            into = getattr(torch.ops.sagecompile, f"attention_into{way}")
            into(q[:, :, 60:], k, v, torch.empty_like(q[:, :, 60:]), **INTO, provider=provider, site=site)
        calls, rows, exact = sagecompile.exact_rows()[site]
        assert (calls, rows) == (2, 320) and 160 < exact <= 320

    def test_calls_without_a_name_or_with_nothing_to_do_are_none(self, provider, site):
        before = sagecompile.exact_rows()
        q, k, v = with_hard_heads()
        ops.attention(q, k, v, **HOW, provider=provider)
        ops.attention(q[:, :, :0], k, v, **HOW, provider=provider, site=site)
        assert sagecompile.exact_rows() == before

    def test_threads_at_once(self, provider, site):
        """Each call is counted with its own rows, whoever runs beside it."""
        hard, plain = with_hard_heads(), [torch.randn(1, 2, 50, 64) for _ in range(3)]

        def work(given, name):
            for _ in range(30):
                ops.attention(*given, **HOW, provider=provider, site=name)

        jobs = [(hard, f"{site}.hard"), (plain, f"{site}.plain")] * 2
        threads = [threading.Thread(target=work, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = sagecompile.exact_rows()
        assert found[f"{site}.hard"] == (60, 60 * 800, 60 * 200) and found[f"{site}.plain"] == (60, 60 * 100, 0)

    def test_a_compiled_model_names_its_sites(self, provider, monkeypatch):
        name, other = f"site{next(calls)}", f"site{next(calls)}"
        model = torch.nn.ModuleDict({name: Attention(), other: Attention()})

        def run(hard, plain):
            return model[name](*hard) + model[other](*plain)

        formats = ["qk_int8_pv_fp16" if provider == "cpu" else "qk_int8_pv_fp8"]
        hard = hard_inputs("scores of 200", 100, 64, 4, 2)
        with torch.no_grad():
            _, report = compiled(run, hard, tuple(torch.randn_like(x) for x in hard), formats=formats)
        assert {entry.decision.provider for entry in report.used} == {provider}
        names = [next(s.site.name for s in report.used if which in s.site.name) for which in (name, other)]
        found = sagecompile.exact_rows()
        assert [found[which] for which in names] == [(1, 400, 400), (1, 400, 0)]

    @needs_kernel
    def test_a_forked_child_counts_anew(self, site):
        """While another thread counts: the child neither waits for it nor has its parent's counts."""
        given, stop = [torch.randn(1, 2, 9, 64) for _ in range(3)], threading.Event()

        def count():
            while not stop.is_set():
                ops.attention(*given, **HOW, provider="cpu", site=site)

        thread = threading.Thread(target=count)
        thread.start()
        try:
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    os._exit(7 if site in counts.read() else 0)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            thread.join()
        assert sagecompile.exact_rows()[site].calls > 0

    def test_more_sites_than_there_are_slots(self, monkeypatch):
        monkeypatch.setattr(counts, "_slots", {})
        monkeypatch.setattr(counts, "_buffers", {})
        monkeypatch.setattr(counts, "MOST_SITES", 3)
        for name in ("a", "b", "c", "a"):
            counts.add(torch.ones(1, 2, 3, dtype=torch.bool), name)
        found = counts.read()
        assert found["a"] == (2, 12, 12) and found["b"] == (1, 6, 6) and "c" not in found


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


TOKENS, DIM = 90, 72
"""No profile covers a head_dim of 72."""


@pytest.fixture
def times(tmp_path, monkeypatch):
    """Of SDPA and of the kernel, as a race finds them; a process that remembers nothing, in an empty folder."""
    share_libraries(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "_known", {})
    monkeypatch.setattr(counters, "_used", {})
    for limit in ("ALIKE", "APART"):
        monkeypatch.setattr(local, limit, math.inf)
    found = {"sdpa": Time(300.0), "qk_int8_pv_fp16 cpu": Time(100.0)}
    monkeypatch.setattr(local, "race", lambda site, which, *_, **__: found)
    return found


def said(caplog):
    """Our warnings."""
    return [line.getMessage() for line in caplog.records if (line.name, line.levelname) == ("sagecompile", "WARNING")]


@needs_kernel
class TestLoss:
    """On a model with one site, of a name of its own, that `auto` uses for a remembered speed-up."""

    @pytest.fixture
    def model(self):
        self.name = f"site{next(calls)}"
        holder = torch.nn.Module()
        setattr(holder, self.name, Attention())
        return lambda *given: getattr(holder, self.name)(*given)

    def run(self, model, kind, times=25, policy="auto", is_dynamic=False, tokens=TOKENS):
        """The decision of a model that is compiled anew, and then called so often."""
        torch._dynamo.reset()
        options = {"sage.policy": policy, "sage.formats": "qk_int8_pv_fp16"}
        with torch.no_grad(), recording() as reports:
            run = torch.compile(model, backend="sage_inductor", options=options)
            for _ in range(times):
                given = hard_inputs(kind, tokens, DIM, 4, 2)
                if is_dynamic:
                    for x in given:
                        torch._dynamo.mark_dynamic(x, 2)
                run(*given)
        (entry,) = reports[0].entries
        return entry.decision

    def test_a_site_whose_rows_are_exact_is_kept_from_the_next_compilation_on(self, model, times, caplog):
        assert "3.00x predicted" in self.run(model, "scores of 200").reason
        assert not said(caplog)
        kept, again = (self.run(model, "scores of 200") for _ in range(2))
        reason = f"exact rows 100%: at this site INT8 holds too few rows to win (seen {local._today()})"
        assert kept.reason == again.reason == reason
        (line,) = said(caplog)
        assert self.name in line and "(1x4/2x90x72): 100% of its rows" in line and "3.00x" in line
        assert "`sagecompile calibrate --again` forgets" in line

    def test_two_functions_of_one_name_are_judged_apart(self, times, caplog):
        """Outside of modules all sites have the same name."""
        easy, hard = (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for _ in range(2))
        self.run(easy, "a channel of K times 3", times=30)
        self.run(hard, "scores of 200", times=30, tokens=TOKENS + 10)
        counters.look()
        (line,) = said(caplog)
        assert f"x{TOKENS + 10}x" in line
        assert "3.00x predicted" in self.run(easy, "a channel of K times 3").reason
        assert "exact rows" in self.run(hard, "scores of 200", tokens=TOKENS + 10).reason

    def test_it_is_kept_in_another_process_and_only_there_where_it_lost(self, model, times, monkeypatch):
        self.run(model, "scores of 200")
        counters.look()
        monkeypatch.setattr(store, "_known", {})
        assert self.run(model, "scores of 5").reason.startswith("exact rows 100%")
        assert "predicted" in self.run(model, "scores of 5", tokens=TOKENS + 1).reason
        assert self.run(model, "scores of 5", policy="always").reason == "policy=always"
        other = torch.nn.Module()
        other.another = Attention()
        assert "predicted" in self.run(lambda *given: other.another(*given), "scores of 5").reason
        store.forget()
        assert "predicted" in self.run(model, "scores of 5").reason

    @pytest.mark.parametrize(
        ("kind", "sdpa_us", "count", "loses"),
        [
            ("scores of 5", 300, 25, False),
            ("scores of 5", 100, 25, False),
            ("scores of 200", 300, 19, False),
            ("scores of 200", 300, 20, True),
            ("scores of 200", 110, 20, True),
        ],
        ids=["plain", "plain at an even race", "too few calls", "enough", "a small win"],
    )
    def test_what_it_takes(self, model, times, caplog, kind, sdpa_us, count, loses):
        times["sdpa"] = Time(float(sdpa_us))
        self.run(model, kind, count)
        counters.look()
        assert bool(said(caplog)) == loses
        assert isinstance(self.run(model, kind), sagecompile.decide.Keep) == (loses or sdpa_us == 100)

    def test_the_share_counts_against_the_speedup(self, times, monkeypatch, caplog):
        """At 2x half the rows, on a GPU a quarter, may be exact."""
        for device, exact, loses in (("cpu", 50, False), ("cpu", 51, True), ("cuda", 25, False), ("cuda", 26, True)):
            caplog.clear()
            used = counters._Used("a site\tmodel.py:7\t1x2x3x4", device, 2.0, {"lost": "a site"})
            monkeypatch.setattr(counters, "_used", {"": used})
            counters._look({used.label: counts.Counts(20, 100, exact)})
            assert bool(said(caplog)) == loses == (not counters._used)

    def test_sizes_that_are_symbols_are_no_part_of_what_is_remembered(self, model, times, monkeypatch):
        """Any profile has a crossing for these; here every length is predicted to win."""
        profiled = local.Prediction(3.0, "from 16 tokens on", at_least=16)
        monkeypatch.setattr("sagecompile.decide.predict", lambda *_: profiled)
        assert "3.00x predicted" in self.run(model, "scores of 200", is_dynamic=True).reason
        counters.look()
        monkeypatch.setattr(store, "_known", {})
        assert self.run(model, "scores of 200", is_dynamic=True, tokens=TOKENS + 30).reason.startswith(
            "exact rows 100%"
        )

    def test_policy_always_is_not_judged(self, model, times, caplog):
        self.run(model, "scores of 200", policy="always")
        counters.look()
        assert not said(caplog) and not counters._used

    def test_an_error_while_reading_stops_nothing(self, model, times, monkeypatch):
        self.run(model, "scores of 200")
        monkeypatch.setattr(counts, "read", lambda: 1 / 0)
        assert "predicted" in self.run(model, "scores of 200").reason

    def test_at_the_end_of_a_process(self, tmp_path):
        """It is logged and remembered without another compilation; nothing is said where no rows are hard."""
        code = f"""
import math, sys, torch
sys.path.insert(0, "tests")
from support import hard_inputs
from test_counters import Attention
from sagecompile.cost import local
from sagecompile.cost.profile import Time
from sagecompile.report import recording
local.race = lambda *_, **__: {{"sdpa": Time(300.0), "qk_int8_pv_fp16 cpu": Time(100.0)}}
local.waited_s, local.ALIKE, local.APART = lambda: 0.0, math.inf, math.inf
given = hard_inputs(sys.argv[1], {TOKENS}, {DIM}, 4, 2)
with torch.no_grad(), recording() as found:
    model = torch.compile(Attention(), backend="sage_inductor", options={{"sage.formats": "qk_int8_pv_fp16"}})
    for _ in range(20):
        model(*given)
print(found[0].entries[0].decision.reason)
"""
        share_libraries(tmp_path)
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        found = []
        for kind in ("scores of 5", "scores of 200", "scores of 200"):
            command = [sys.executable, "-c", code, kind]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found.append((done.stdout.splitlines()[-1][:15], "of its rows were computed exactly" in done.stderr))
        assert found == [("3.00x predicted", False), ("3.00x predicted", True), ("exact rows 100%", False)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("provider", ["hopper", "triton"])
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def can_run(self, provider):
        only = PROVIDERS[provider].compute_capability
        if only not in (None, torch.cuda.get_device_capability()):
            pytest.skip(f"{provider} needs a GPU of compute capability {only}")

    def test_calls_from_python_and_from_c(self, provider, site):
        given = [x.to("cuda", torch.bfloat16) for x in with_hard_heads()]
        for count in (1, 2, 3):
            ops.attention(*given, **HOW, provider=provider, site=site)
            calls, rows, exact = sagecompile.exact_rows()[site]
            assert (calls, rows) == (count, count * 800) and count * 200 <= exact < count * 800
            compiler.settle()

    def test_replays_of_a_graph_in_which_a_site_was_called_first(self, provider, site):
        given = [x.to("cuda", torch.bfloat16) for x in with_hard_heads()]
        ops.attention(*given, **HOW, provider=provider, site=f"{site}.once")
        once = sagecompile.exact_rows()[f"{site}.once"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.attention(*given, **HOW, provider=provider, site=site)
            counters.look()
        assert site not in sagecompile.exact_rows()
        for _ in range(3):
            graph.replay()
        assert sagecompile.exact_rows()[site] == tuple(3 * number for number in once)
