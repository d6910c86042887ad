"""Marks: the table of settings, their rules, and what a result missed."""

import math

import pytest

from vivace.check import targets
from vivace.check.targets import SIZES, Size, parse_size
from vivace.errors import ConfigError


def test_every_setting_has_marks_in_both_precisions_and_stretch_is_harder():
    assert {name for name, _ in targets.LATENCY_MS} == set(SIZES)
    assert set(targets.RIVAL_RATIO) == set(SIZES)
    assert all(1 < must < stretch for must, stretch in targets.RIVAL_RATIO.values())
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


def test_reuse_is_judged_by_time_and_bits():
    time, same = targets.of_reuse("fp8", p50_ms=4.5, same=200, calls=200)
    assert (time.must_met, time.stretch_met, same.must_met) == (True, False, True)
    assert not targets.of_reuse("bfloat16", p50_ms=6.6, same=200, calls=200)[0].must_met
    assert not targets.of_reuse("bfloat16", p50_ms=6.4, same=199, calls=200)[1].must_met


def test_nothing_looked_at_meets_nothing():
    assert not targets.holds("x", 0, 0).must_met
    assert not targets.same_bits(0, 0).must_met


def proof_row(**changes):
    row = {"fresh": {"image": True, "image, and back": True}, "fresh_policy": {"state": True}}
    return row | {"poisoned": {"same": 3, "replays": 3}} | changes


# one thing wrong each: (table, what is not met)
BAD = {
    "rows, bits": ("rows", [targets.same_bits(999, 1000)]),
    "rows, not settled": ("rows", [targets.warmed_up(False)]),
    "accuracy, infer is another function": ("accuracy", [targets.of_two_calls(same=63, of=64)]),
    "proof, a stale image": ("proof", targets.of_proof(proof_row(fresh={"image": False, "image, and back": True}))),
    "proof, a stale state": ("proof", targets.of_proof(proof_row(fresh_policy={"state": False}))),
    "proof, poison": ("proof", targets.of_proof(proof_row(poisoned={"same": 2, "replays": 3}))),
    "memory reserved": ("memory", [targets.of_memory(reserved=1151, needed=1000)]),
    "soak, tail": ("soak", targets.of_soak(tail=1.06, allocated_growth=0, reserved_growth=0, same=9, checks=9)),
    "soak, allocated": ("soak", targets.of_soak(tail=1.0, allocated_growth=1, reserved_growth=0, same=9, checks=9)),
    "soak, reserved": ("soak", targets.of_soak(tail=1.0, allocated_growth=0, reserved_growth=1, same=9, checks=9)),
    "soak, bits": ("soak", targets.of_soak(tail=1.0, allocated_growth=0, reserved_growth=0, same=8, checks=9)),
    "start, warm": ("start", [targets.of_start("warm", every_bucket_s=30.5)]),
    "start, cold": ("start", [targets.of_start("cold", every_bucket_s=121.0)]),
    "coverage, a fallback": ("coverage", targets.of_coverage(ran=300, fell=1)),
    "coverage, nothing seen": ("coverage", targets.of_coverage(ran=0, fell=0)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_each_thing_that_can_be_wrong_in_a_table_fails_the_result(case):
    table, marks = BAD[case]
    document = {"not_run": [], table: [{"setting": "1,2,3", "engine": "e", "targets": marks}]}
    assert len(targets.missed(document)) == 1
    assert not targets.passed(document)


def test_good_rows_of_all_tables_pass():
    soak = targets.of_soak(tail=1.05, allocated_growth=0, reserved_growth=0, same=9, checks=9)
    good = {
        "rows": [targets.same_bits(1000, 1000), targets.warmed_up(True)], "proof": targets.of_proof(proof_row()),
        "accuracy": [targets.of_two_calls(same=64, of=64)], "soak": soak,
        "memory": [targets.of_memory(reserved=1150, needed=1000)],
        "start": [targets.of_start("warm", every_bucket_s=30.0), targets.of_start("cold", every_bucket_s=120.0)],
    }  # fmt: skip
    document = {"not_run": []} | {table: [{"engine": "e", "targets": marks}] for table, marks in good.items()}
    assert targets.missed(document) == []
    assert targets.passed(document)


def test_what_was_not_run_fails_a_result_unless_it_can_never_run():
    assert not targets.passed({"not_run": [{"phase": "rivals", "what": "x", "why": "not asked for"}]})
    assert targets.passed({"not_run": [{"phase": "rivals", "what": "x", "why": "not here", "informational": True}]})


def test_a_run_that_was_ended_from_outside_has_not_passed():
    assert not targets.passed({"not_run": [], "finished": False})
    assert targets.passed({"not_run": [], "finished": True})


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
