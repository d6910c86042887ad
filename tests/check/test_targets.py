"""Marks: the table of settings, their rules, and what a result missed."""

import math

import pytest

from vivace.check import targets
from vivace.check.targets import SIZES, Size, parse_size
from vivace.errors import ConfigError


def test_every_setting_has_marks_in_both_precisions_and_stretch_is_harder():
    assert {name for name, _ in targets.LATENCY_MS} == set(SIZES)
    for (_, family), (must, stretch) in targets.LATENCY_MS.items():
        assert stretch < must
        assert family in ("bfloat16", "fp8")
    for name in SIZES:
        assert targets.LATENCY_MS[name, "fp8"][0] < targets.LATENCY_MS[name, "bfloat16"][0]


@pytest.mark.parametrize(
    ("got", "must_met", "stretch_met"), [(8.0, True, True), (10.0, True, False), (11.1, False, False)]
)
def test_latency_against_must_and_stretch(got, must_met, stretch_met):
    latency, tail = targets.of_latency("3,200,50", "fp8", p50_ms=got, p99_ms=got * 1.04)
    assert (latency.must_met, latency.stretch_met) == (must_met, stretch_met)
    assert tail.must_met
    assert not targets.of_latency("3,200,50", "fp8", p50_ms=got, p99_ms=got * 1.06)[1].must_met
    assert targets.of_latency("3,201,50", "fp8", p50_ms=got, p99_ms=got) == []


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_number_meets_nothing(broken):
    assert not targets.at_most("x", broken, 1e9, 1e9).must_met or broken < 1e9
    assert not targets.at_most("x", broken, 1e9).must_met
    assert not targets.at_least("x", broken, 0.0).must_met


def test_accuracy_is_relative_in_bfloat16_and_absolute_in_fp8():
    (mark,) = targets.of_accuracy("bfloat16", {"rel_l2": 0.011}, {"rel_l2": 0.010})
    assert not mark.must_met
    mean, worst = targets.of_accuracy("fp8", {"cosine_mean": 0.9991, "cosine_worst": 0.9949}, {"rel_l2": 0.01})
    assert (mean.must_met, worst.must_met) == (True, False)


def test_reuse_is_judged_where_the_chunk_is_50():
    assert targets.of_reuse(Size(2, 48, 10), "fp8", denoise_ms=1.0) == []
    (mark,) = targets.of_reuse(Size(3, 200, 50), "fp8", denoise_ms=4.5)
    assert (mark.must_met, mark.stretch_met) == (True, False)


def test_settings_are_read_and_nonsense_is_refused():
    assert parse_size("3,200,50") == Size(3, 200, 50)
    assert parse_size("3,200,50").name == "3,200,50"
    for text in ("3,200", "a,b,c", "0,1,2", "1,-1,5", "1,1,0", ""):
        with pytest.raises(ConfigError, match="setting"):
            parse_size(text)


def test_missed_names_row_and_mark():
    good, bad = targets.at_most("a", 1.0, 2.0), targets.at_most("b", 3.0, 2.0)
    rows = [{"setting": "1,2,3", "engine": "e", "boundary": "B0", "targets": [good, bad]}]
    assert targets.missed({"rows": rows, "memory": [{"engine": "m", "targets": [vars(bad)]}]}) == [
        "1,2,3 e B0: b 3.0, at most 2.0", "m: b 3.0, at most 2.0",
    ]  # fmt: skip
    assert targets.missed({}) == []
