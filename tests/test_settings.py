"""Options and environment variables: what is known, what is refused and with which words."""

from __future__ import annotations

import pytest

from sagecompile import settings
from sagecompile.errors import OptionError
from sagecompile.settings import Settings


def test_defaults():
    assert Settings() == Settings("auto", ("qk_int8_pv_fp16", "qk_int8_pv_fp8"), 1.05)


def test_options_are_split_and_inductors_untouched():
    ours, inductors = settings.resolve({"sage.policy": "always", "max_autotune": True, "triton.cudagraphs": True})
    assert ours.policy == "always" and inductors == {"max_autotune": True, "triton.cudagraphs": True}


def test_environment_and_options_over_it(monkeypatch):
    monkeypatch.setenv("SAGECOMPILE_POLICY", "never")
    monkeypatch.setenv("SAGECOMPILE_MIN_SPEEDUP", "1.5")
    assert settings.resolve(None)[0] == Settings(policy="never", min_speedup=1.5)
    assert settings.resolve({"sage.policy": "always"})[0] == Settings(policy="always", min_speedup=1.5)


@pytest.mark.parametrize("given", ["qk_int8_pv_fp8", ["qk_int8_pv_fp8"], ("qk_int8_pv_fp8",), " qk_int8_pv_fp8 "])
def test_formats_as_text_or_sequence(given):
    assert settings.resolve({"sage.formats": given})[0].formats == ("qk_int8_pv_fp8",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sage.polcy": "auto"},
            r"unknown option sage\.polcy; known are sage\.policy, sage\.formats, sage\.min_speedup",
        ),
        ({"policy": "always"}, r"unknown option policy; write sage\.policy"),
        ({"sage_policy": "always"}, r"unknown option sage_policy; write sage\.policy"),
        ({"sage-min_speedup": 2}, r"unknown option sage-min_speedup; write sage\.min_speedup"),
        ({1: 2}, r"option 1: names are text, such as sage\.policy"),
        ({"sage.policy": "allways"}, "'allways'; it can be auto, always, never"),
        ({"sage.formats": "fp4"}, "'fp4'; known formats are qk_int8_pv_fp16, qk_int8_pv_fp8"),
        ({"sage.formats": []}, "empty; name at least one of qk_int8_pv_fp16"),
        ({"sage.min_speedup": "fast"}, "'fast'; it is a number such as 1.05"),
        ({"sage.min_speedup": True}, "True; it is a number such as 1.05"),
        ({"sage.min_speedup": 0}, "a ratio above 0"),
        ({"sage.min_speedup": float("nan")}, "a ratio above 0"),
        ({"sage.min_speedup": "inf"}, "a ratio above 0"),
        ({"sage.formats": 3}, "sage.formats is 3; it is a list or text such as qk_int8_pv_fp16,"),
        ({"sage.cuda_graphs": "sometimes"}, r"sage\.cuda_graphs is 'sometimes'; it can be true"),
    ],
)
def test_bad_options_say_what_is_possible(options, message):
    with pytest.raises(OptionError, match=message):
        settings.resolve(options)


def test_an_empty_environment_variable_is_as_none():
    assert settings.from_environment({"SAGECOMPILE_POLICY": "", "SAGECOMPILE_FORMATS": ""}) == Settings()


def test_unknown_environment_variable_lists_the_known():
    with pytest.raises(
        OptionError, match=r"unknown variable SAGECOMPILE_POLCY .*SAGECOMPILE_POLICY, SAGECOMPILE_FORMATS"
    ):
        settings.from_environment({"SAGECOMPILE_POLCY": "auto"})
