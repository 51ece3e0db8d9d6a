"""The decision, without a GPU: every reason to keep a site, and which candidate wins."""

from __future__ import annotations

from dataclasses import replace
from operator import ge

import pytest

from sagecompile import decide as module
from sagecompile.cost import Prediction
from sagecompile.decide import Keep, Use, decide
from sagecompile.lengths import long_enough
from sagecompile.mask import CAUSAL, Mask
from sagecompile.settings import Settings
from sagecompile.site import AttentionSite, Device, Prologue

SITE = AttentionSite(
    *("model.layers.0", "model.py:1", "sdpa"), 2, 16, 16, 4096, 4096, 128, 128, "bfloat16", "cuda:0", mask=CAUSAL
)
H200 = Device("cuda", "NVIDIA H200", (9, 0))
A100 = Device("cuda", "NVIDIA A100", (8, 0))
TURING = Device("cuda", "NVIDIA T4", (7, 5))
ALWAYS = Settings(policy="always")


def runs(site, format, provider):
    return None


def refuses_triton(site, format, provider):
    return "triton failed: CompilationError: no such instruction" if provider == "triton" else None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"obstacle": "attention weights: used elsewhere (by mean)"}, "attention weights: used elsewhere (by mean)"),
        ({"needs_grad": True}, "needs a gradient: run under torch.inference_mode() or torch.no_grad()"),
        ({"dropout_p": 0.1}, "dropout_p 0.1: needs 0 (model.eval())"),
        (
            {"mask": Mask(tensor="bool (2, 1, 8, 8)")},
            "mask bool (2, 1, 8, 8): needs none, or one that the graph shows to be causal",
        ),
        ({"value_dim": 64}, "value head_dim 64: needs q's and k's, 128"),
        ({"kv_len": 0}, "kv_len 0: nothing to compute"),
        ({"q_len": 0}, "q_len 0: nothing to compute"),
        ({"batch": 0}, "batch 0: nothing to compute"),
        ({"dtype": "float64"}, "dtype float64: needs float16, bfloat16, float32"),
        ({"head_dim": 256, "value_dim": 256}, "head_dim 256: needs at most 128"),
        ({"device": "mps"}, "device mps: no provider runs on it"),
    ],
)
def test_what_is_not_legal_is_kept_even_under_always(change, reason):
    site = replace(SITE, **change)
    device = H200 if site.device_type == "cuda" else Device(site.device_type, site.device_type)
    assert decide(site, device, ALWAYS, runs) == Keep(reason)


def test_never():
    assert decide(SITE, H200, Settings(policy="never"), runs).cause == "policy=never"


def test_compute_capability_is_named():
    fp8 = Settings(policy="always", formats=("qk_int8_pv_fp8",))
    assert decide(SITE, A100, fp8, runs) == Keep("compute capability 8.0: qk_int8_pv_fp8 needs 8.9")
    assert "qk_int8_pv_fp16 needs 8.0" in decide(SITE, TURING, ALWAYS, runs).reason


def test_always_takes_the_formats_in_the_users_order():
    assert decide(SITE, H200, ALWAYS, runs) == Use("qk_int8_pv_fp16", "hopper")
    turned = Settings(policy="always", formats=("qk_int8_pv_fp8", "qk_int8_pv_fp16"))
    assert decide(SITE, H200, turned, runs).format == "qk_int8_pv_fp8"


def test_a_provider_that_cannot_run_gives_way_to_the_next():
    assert decide(SITE, A100, ALWAYS, refuses_triton) == Use("qk_int8_pv_fp16", "sageattention")


def test_a_provider_for_one_compute_capability_is_no_candidate_on_another(monkeypatch):
    asked = []

    def can_run(site, format, provider):
        asked.append(provider)
        return f"{provider} broken"

    assert "hopper" not in decide(SITE, A100, ALWAYS, can_run).reason and asked == ["triton", "sageattention"]
    monkeypatch.setattr(module, "predict", lambda *_: None)
    assert "hopper" not in decide(SITE, A100, Settings(), runs).reason
    assert "qk_int8_pv_fp16 by hopper" in decide(SITE, H200, Settings(), runs).reason


def test_a_kernel_that_cannot_be_built_is_a_keep_with_its_message():
    decision = decide(SITE, H200, ALWAYS, lambda *_: "triton failed: CompilationError: no such instruction")
    assert decision == Keep("triton failed: CompilationError: no such instruction")


def test_what_only_the_reference_runs_is_kept_with_what_to_set():
    site, cpu = replace(SITE, device="cpu"), Device("cpu", "some CPU")
    kept = decide(site, cpu, Settings(formats=("qk_int8_pv_fp8",)), runs)
    reference = "qk_int8_pv_fp8 by reference"
    assert kept == Keep(f"device cpu: only {reference}, which never wins: sage.policy=always uses it")
    assert isinstance(decide(site, cpu, Settings("always", ("qk_int8_pv_fp8",)), runs), Use)


def test_auto_keeps_what_was_not_measured(monkeypatch):
    monkeypatch.setattr(module, "predict", lambda *_: None)
    decision = decide(SITE, H200, Settings(), runs)
    assert isinstance(decision, Keep)
    assert decision.cause == "not measured at this shape on NVIDIA H200, run `sagecompile calibrate`"


def test_auto_needs_a_head_dim_that_is_a_number():
    """Nothing would be measured of a symbol, nor does `calibrate` help."""
    head_dim = Length(64, "s3")
    decision = decide(replace(SITE, head_dim=head_dim, value_dim=head_dim), H200, Settings(), runs)
    assert decision == Keep("head_dim s3: needs a number, as after torch._dynamo.mark_static(q, 3)")


def speeds(table):
    return lambda site, format, provider, device, wanted, cuda_graphs: (
        Prediction(table[format, provider], "somewhere") if (format, provider) in table else None
    )


def test_auto_takes_the_largest_predicted_win(monkeypatch):
    table = {("qk_int8_pv_fp16", "triton"): 1.1, ("qk_int8_pv_fp8", "triton"): 1.3}
    monkeypatch.setattr(module, "predict", speeds(table))
    decision = decide(SITE, H200, Settings(), runs)
    assert decision == Use("qk_int8_pv_fp8", "triton", Prediction(1.3, "somewhere"))


def test_auto_takes_the_faster_provider_whichever_comes_first(monkeypatch):
    for faster, slower in (("hopper", "triton"), ("triton", "hopper")):
        table = {("qk_int8_pv_fp8", faster): 1.5, ("qk_int8_pv_fp8", slower): 1.2}
        monkeypatch.setattr(module, "predict", speeds(table))
        assert decide(SITE, H200, Settings(), runs) == Use("qk_int8_pv_fp8", faster, Prediction(1.5, "somewhere"))


def test_auto_takes_the_first_in_the_table_of_equal_ones(monkeypatch):
    table = {("qk_int8_pv_fp8", "triton"): 1.5, ("qk_int8_pv_fp8", "hopper"): 1.5}
    monkeypatch.setattr(module, "predict", speeds(table))
    assert decide(SITE, H200, Settings(), runs) == Use("qk_int8_pv_fp8", "hopper", Prediction(1.5, "somewhere"))


def refuses_hopper(site, format, provider):
    return "hopper failed: UnsupportedError: no libnvrtc.so.13" if provider == "hopper" else None


class Length:
    """A symbol that counts its comparisons, each of which is a Dynamo guard."""

    def __init__(self, value, name="s0"):
        self.value, self.name, self.compared = value, name, []

    def __str__(self):
        return self.name

    def __ge__(self, other):
        self.compared.append(other)
        return self.value >= other


@pytest.mark.parametrize(("tokens", "used"), [(700, False), (3000, False), (4000, True)])
def test_a_symbolic_length_is_compared_once_with_the_crossing_of_the_fastest(monkeypatch, tokens, used):
    """However many candidates: a model that sees every length compiles two graphs."""
    crossings = {"qk_int8_pv_fp16": (1.2, 2000), "qk_int8_pv_fp8": (1.5, 4000)}

    def predict(site, format, provider, device, wanted, cuda_graphs):
        return Prediction(crossings[format][0], "somewhere", crossings[format][1]) if provider == "hopper" else None

    monkeypatch.setattr(module, "predict", predict)
    length = Length(tokens)
    site = replace(SITE, q_len=length, kv_len=9999)
    (decision,) = long_enough([(site, decide(site, H200, Settings(), runs))], ge)
    assert length.compared == [4000] and isinstance(decision, Use) == used
    if not used:
        assert decision.reason == "fewer than 4000 tokens: qk_int8_pv_fp8 by hopper wins from there on"


@pytest.mark.parametrize(("tokens", "used"), [(2999, False), (3000, True)])
def test_all_sites_of_a_length_share_one_crossing(tokens, used):
    """So that two kinds of attention make no third graph; what is kept or of numbers has no say in it."""

    def at(q_len, kv_len, crossing):
        found = Use("qk_int8_pv_fp8", "hopper", Prediction(1.5, "somewhere", at_least=crossing))
        return replace(SITE, q_len=q_len, kv_len=kv_len), found

    length, other = Length(tokens), Length(800, "s1")
    kept = replace(SITE, q_len=length, kv_len=length), Keep("mask: none")
    decided = [at(length, length, 1000), at(length, 9999, 3000), at(other, other, 700), at(64, 64, 0), kept]
    found = long_enough(decided, ge)
    assert length.compared == [3000] and other.compared == [700]
    assert [isinstance(decision, Use) for decision in found] == [used, used, True, True, False]
    if used:
        assert "(somewhere; all of this length from 3000 on)" in found[0].reason
    else:
        which = "qk_int8_pv_fp8 by hopper wins from"
        assert found[0].reason == f"fewer than 3000 tokens: {which} 1000 on, all of this length from there"
        assert found[1].reason == f"fewer than 3000 tokens: {which} there on"


def test_what_another_length_keeps_has_no_say_where_that_is_not_one():
    """Cross-attention to few keys, which is kept in any case, from more queries on than self-attention is used."""
    queries, keys = Length(1000), Length(77, "s1")
    found = Use("qk_int8_pv_fp8", "hopper", Prediction(1.5, "somewhere", at_least=500))
    late = replace(found, prediction=Prediction(1.5, "somewhere", at_least=3000))
    sites = [(replace(SITE, q_len=queries, kv_len=queries), found), (replace(SITE, q_len=queries, kv_len=keys), late)]
    assert [isinstance(decision, Use) for decision in long_enough(sites, ge)] == [True, False]


class Local:
    """A machine that remembers nothing and measures as it is told."""

    def __init__(self, why_not=lambda site, alternatives: None, measure=None):
        self.why_not, self.measure = why_not, measure

    def loss(self, site):
        return None

    def recall(self, site):
        return {}


def test_auto_does_not_ask_whom_another_beats(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "predict", lambda *_: None)
    local = Local(measure=lambda site, alternatives: asked.extend(alternatives) or {})
    decide(SITE, H200, Settings(), runs, local)
    assert asked == [("qk_int8_pv_fp16", "hopper"), ("qk_int8_pv_fp8", "hopper")]
    asked.clear()
    decide(SITE, H200, Settings(), refuses_hopper, local)
    assert {provider for _, provider in asked} == {"triton", "sageattention"}


@pytest.mark.parametrize("measured", [1.3, 0.9])
def test_a_prediction_that_is_not_sure_is_measured(monkeypatch, measured):
    monkeypatch.setattr(module, "predict", lambda *_: Prediction(1.1, "somewhere", sure=False))

    local = Local(measure=lambda site, alternatives: {one: Prediction(measured, "here") for one in alternatives})
    decision = decide(SITE, H200, Settings(formats=("qk_int8_pv_fp8",)), runs, local)
    assert isinstance(decision, Use) == (measured > 1.05) and f"{measured:.2f}x" in decision.reason


def test_a_refusal_is_asked_for_once(monkeypatch):
    """A trial that found no memory may find some the next time: what was refused is not used in the same decision."""
    monkeypatch.setattr(module, "predict", lambda *_: None)
    answers = iter(["cpu not tried: no memory left", None])

    local = Local(measure=lambda *_: pytest.fail("measured what was refused"))
    site = replace(SITE, device="cpu", dtype="float32")
    decision = decide(site, Device("cpu", "some CPU"), Settings(), lambda *_: next(answers), local)
    assert decision == Keep("cpu not tried: no memory left")


@pytest.mark.parametrize(
    ("sure", "expected"), [(1.5, {"qk_int8_pv_fp16", "qk_int8_pv_fp8"}), (1.2, {"qk_int8_pv_fp16"})]
)
def test_a_rival_of_what_is_measured_runs_beside_it(monkeypatch, sure, expected):
    """Not so one that is far behind, or was measured before."""
    found = {"qk_int8_pv_fp8": Prediction(sure, "somewhere"), "qk_int8_pv_fp16": Prediction(1.6, "near", sure=False)}
    monkeypatch.setattr(
        module, "predict", lambda site, format, provider, *_: found[format] if provider == "triton" else None
    )
    asked = []
    local = Local(measure=lambda site, alternatives: asked.extend(alternatives) or {})
    only = lambda site, format, provider: None if provider == "triton" else "not here"  # noqa: E731
    decide(SITE, H200, Settings(), only, local)
    assert {format for format, provider in asked if provider == "triton"} == expected
    found["qk_int8_pv_fp8"] = Prediction(sure, "here", measured=True)
    asked.clear()
    decide(SITE, H200, Settings(), only, local)
    assert {format for format, provider in asked if provider == "triton"} == {"qk_int8_pv_fp16"}


def test_what_cannot_catch_up_with_a_sure_winner_is_not_measured(monkeypatch):
    found = {"qk_int8_pv_fp8": Prediction(1.8, "somewhere"), "qk_int8_pv_fp16": Prediction(1.1, "near", sure=False)}
    monkeypatch.setattr(module, "predict", lambda site, format, provider, *_: found[format])

    local = Local(why_not=lambda *_: pytest.fail("asked to measure"))
    assert decide(SITE, H200, Settings(), runs, local).format == "qk_int8_pv_fp8"


def test_a_length_that_is_a_number_is_compared_first(monkeypatch):
    monkeypatch.setattr(module, "predict", lambda *_: Prediction(1.5, "somewhere", at_least=2814))
    length = Length(4000)
    site = replace(SITE, q_len=length, kv_len=77)
    (decision,) = long_enough([(site, decide(site, H200, Settings(), runs))], ge)
    assert isinstance(decision, Keep) and not length.compared


def test_auto_falls_back_to_another_provider_that_wins_too(monkeypatch):
    table = {("qk_int8_pv_fp8", "hopper"): 1.5, ("qk_int8_pv_fp8", "triton"): 1.2}
    monkeypatch.setattr(module, "predict", speeds(table))
    decision = decide(SITE, H200, Settings(), refuses_hopper)
    assert decision == Use("qk_int8_pv_fp8", "triton", Prediction(1.2, "somewhere"))


def test_the_winner_that_cannot_run_is_the_first_reason(monkeypatch):
    """And not that the others are slow, which nothing can be done about."""
    table = {("qk_int8_pv_fp8", "hopper"): 1.5, ("qk_int8_pv_fp8", "triton"): 0.9}
    monkeypatch.setattr(module, "predict", speeds(table))
    decision = decide(SITE, H200, Settings(formats=("qk_int8_pv_fp8",)), refuses_hopper)
    assert decision.cause == "hopper failed"
    assert "predicted below 1.05x: 0.90x for qk_int8_pv_fp8 by triton (somewhere)" in decision.reason


@pytest.mark.parametrize(
    ("speedup", "measured", "asked", "used"),
    [
        (1.04, True, 1.05, True),
        (1.04, False, 1.05, False),
        (1.02, True, 1.05, False),
        (0.99, True, 1.0, False),
        (0.95, True, 0.9, True),
    ],
)
def test_what_is_measured_may_miss_min_speedup_by_its_noise(monkeypatch, speedup, measured, asked, used):
    """But it is no loss that was not asked for."""
    monkeypatch.setattr(module, "predict", lambda *_: Prediction(speedup, "here", measured=measured))
    asked = Settings(formats=("qk_int8_pv_fp8",), min_speedup=asked)
    assert isinstance(decide(SITE, H200, asked, runs), Use) == used


def test_what_fusing_saves_is_not_all_measured(monkeypatch):
    """And gets no discount for the noise of a measurement."""
    made = (Prologue(rope="half", table="float32"),) * 2
    site, asked = replace(SITE, prologues=made), Settings(formats=("qk_int8_pv_fp8",))
    for speedup, used in ((1.04, False), (1.06, True)):

        def measured(site, format, provider, *_, speedup=speedup):
            return Prediction(speedup, "here", measured=True) if provider == "hopper" else None

        monkeypatch.setattr(module, "predict", measured)
        assert isinstance(decide(site, H200, asked, runs), Use) == used


def test_auto_asks_for_min_speedup(monkeypatch):
    monkeypatch.setattr(module, "predict", speeds({("qk_int8_pv_fp16", "triton"): 1.04}))
    only = ("qk_int8_pv_fp16",)
    assert decide(SITE, H200, Settings(formats=only), runs).reason.startswith(
        "predicted below 1.05x: 1.04x for qk_int8_pv_fp16 by triton (somewhere)"
    )
    assert isinstance(decide(SITE, H200, Settings(formats=only, min_speedup=1.0), runs), Use)
