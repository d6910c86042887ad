"""Engines of others in the same rounds as ours: every boundary, ratios of those rounds, what a time limit cuts first."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vivace.check import bench, hopper, hopper_engines, hopper_estimate, hopper_rivals, hopper_rows, hopper_run
from vivace.check.hopper_engines import COMPILED, EAGER
from vivace.errors import VivaceError

SMALL = ("--network", "tiny", "--device", "cpu", "--observations", "2", "--draws", "1", "--calibration", "1",
         "--rival-calls", "4", "--plain-calls", "3")  # fmt: skip
BF16, FP8 = "cuda_graph bf16", "cuda_graph fp8-all"


@pytest.fixture(scope="module", autouse=True)
def _cold():
    """Nothing here is about speed: engines need not settle before they are timed, and a CPU has rivals too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_rows, "WARM_UP", bench.WarmUp(max_calls=2))
        patch.setattr(hopper, "NEEDS_GPU", ())
        yield


def options(folder, settings="1,48,50", plans="bf16,fp8-all", *more):
    arguments = ["--out", str(folder / "h.json"), "--settings", settings, "--plans", plans, *SMALL, *more]
    return hopper.options_of(hopper.parser().parse_args(arguments))


def rivals(folder, *given, phases=("rivals",)):
    return hopper.run(options(folder, *given), phases=phases, size="tiny", device="cpu", tell=lambda _: None)


@pytest.fixture
def untimed(monkeypatch):
    """Every call is said to take 1 ms, for tests of what is begun at all."""

    def time_rows(size, boundary, timed, **_):
        return [
            {
                "setting": size.name, "engine": one.engine.name, "precision": one.engine.precision, "boundary": boundary,
                "latency": bench.summary([1.0] * one.calls), "clock": "none", "targets": [],
            }
            for one in timed
        ]  # fmt: skip

    monkeypatch.setattr(hopper_rows, "time_rows", time_rows)
    monkeypatch.setattr(hopper_rows, "stage_ms", lambda *_, **__: {})
    monkeypatch.setattr(hopper_rows, "parts_ms", lambda *_, **__: {})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the document, [(boundary, rows of everything that was called in turn)])"""
    rounds, real = [], hopper_rows.time_rows

    def time_rows(size, boundary, timed, **more):
        rows = real(size, boundary, timed, **more)
        rounds.append((boundary, [dict(row) for row in rows]))
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_rows, "time_rows", time_rows)
        given = ("1,48,50;2,0,6", "bf16,fp8-all", "--rival-settings", "2", "--plain-settings", "2")
        return rivals(tmp_path_factory.mktemp("rivals"), *given), rounds


def test_every_rival_is_timed_at_every_boundary_what_matters_most_first(measured):
    document, _ = measured
    assert [(row["engine"], row["boundary"], row["setting"]) for row in document["rows"]] == [
        (COMPILED, "B0", "1,48,50"), (COMPILED, "B0", "2,0,6"),
        (COMPILED, "B1", "1,48,50"), (COMPILED, "B2", "1,48,50"), (COMPILED, "B1", "2,0,6"),
        (EAGER, "B0", "1,48,50"), (EAGER, "B0", "2,0,6"), (EAGER, "B1", "1,48,50"), (EAGER, "B1", "2,0,6"),
        (EAGER, "B2", "1,48,50"),
    ]  # fmt: skip
    for row in document["rows"]:
        assert row["calls"] == row["latency"]["samples"] == (4 if row["engine"] == COMPILED else 3)
        assert row["bit_identical"]["same"] == row["bit_identical"]["of"] >= row["calls"]
        assert row["targets"] == [], "nothing of a rival is judged"
        assert ("stages_ms" in row) == (row["boundary"] == "B0")
        assert ("parts_ms" in row) == (row["boundary"] == "B2")
        assert ("compile_mode" in row) == (row["engine"] == COMPILED)
        assert ("no graph" in row["clock"]) == (row["engine"] == EAGER and row["boundary"] == "B0")
        if row["boundary"] == "B2":
            assert {"total", "preprocess", "postprocess"} <= set(row["parts_ms"])
    assert [(row["engine"], row["setting"]) for row in document["accuracy"]] == [
        (COMPILED, "1,48,50"), (COMPILED, "2,0,6"),
    ]  # fmt: skip
    assert document["setup"]["calls"]["rivals"] == 4
    assert document["setup"]["calls"]["plain PyTorch"] == 3


def test_ratios_are_those_of_the_same_rounds(measured):
    document, rounds = measured
    assert len(document["rows"]) == len(rounds)
    for row, (boundary, (rival, *ours)) in zip(document["rows"], rounds, strict=True):
        assert (boundary, rival["engine"]) == (row["boundary"], row["engine"])
        assert [one["engine"] for one in ours] == ([BF16, FP8] if row["engine"] == COMPILED else [FP8])
        assert {one["calls"] for one in ours} == {row["calls"]}, "in every round"
        assert row["latency"]["p50_ms"] == rival["latency"].p50_ms
        p50 = {one["engine"]: one["latency"].p50_ms for one in ours}
        assert row["ours_in_the_same_rounds"] == {
            name: {"p50_ms": ms, "ratio": row["latency"]["p50_ms"] / ms} for name, ms in p50.items()
        }


def test_a_setting_without_prompt_tokens_has_no_b2_and_says_so(measured):
    document, _ = measured
    assert document["remarks"] == ["no B2 of rivals for 2,0,6: policies refuse a prompt without tokens"]
    assert [row["informational"] for row in document["not_run"]] == [True], "the ratio that is never run"
    assert document["passed"]


def test_where_the_headline_plan_is_not_measured_another_engine_of_ours_stands_beside_plain_pytorch(untimed, tmp_path):
    document = rivals(tmp_path, "1,48,5", "bf16", "--rival-settings", "0")
    assert [(row["boundary"], [*row["ours_in_the_same_rounds"]]) for row in document["rows"]] == [
        ("B0", [BF16]), ("B1", [BF16]), ("B2", [BF16]),
    ]  # fmt: skip


def test_settings_without_a_rival_and_the_ratio_that_cannot_run_are_named(untimed, tmp_path, monkeypatch):
    made, real = [], hopper_rivals.make
    monkeypatch.setattr(
        hopper_rivals, "make", lambda name, *a, **how: made.append((name, how)) or real(name, *a, **how)
    )
    more = ("--plain-settings", "0", "--compile-mode", "max-autotune-no-cudagraphs")
    document = rivals(tmp_path, "1,48,50;2,0,6", "bf16", *more)
    assert made == [(COMPILED, {"compile_mode": "max-autotune-no-cudagraphs"})]
    ratio, *absent = document["not_run"]
    assert ratio["informational"]
    assert "--realtime-vla" in ratio["why"]
    assert "at least 2.2" in ratio["what"]
    assert [(row["what"], row["why"], row["informational"]) for row in absent] == [
        ("2,0,6 compiled graph", "not asked for: --rival-settings 1", True),
        ("1,48,50 eager", "not asked for: --plain-settings 0", True),
        ("2,0,6 eager", "not asked for: --plain-settings 0", True),
    ]
    assert {row["engine"] for row in document["rows"]} == {COMPILED}
    assert document["passed"], "what nobody asked for decides nothing"


@pytest.mark.parametrize("boundaries", [3, 2, 1, 0])
def test_a_time_limit_cuts_b2_of_plain_pytorch_first_then_its_b1(untimed, tmp_path, monkeypatch, boundaries):
    """Time for torch.compile and so many boundaries; each of plain PyTorch takes what is estimated."""
    one_s = hopper_estimate.plain_s(options(tmp_path), "B2")

    def left_s(run):
        engines = [row["engine"] for row in run.document["rows"]]
        if engines.count(COMPILED) < 3:
            return 1e6
        return one_s * (boundaries - engines.count(EAGER)) + 1.0

    monkeypatch.setattr(hopper_run.Run, "left_s", property(left_s))
    document = rivals(tmp_path)
    timed = [row["boundary"] for row in document["rows"] if row["engine"] == EAGER]
    assert timed == ["B0", "B1", "B2"][:boundaries]
    cut = [row["what"] for row in document["not_run"] if not row["informational"]]
    assert cut == [f"1,48,50 eager {boundary}" for boundary in ("B0", "B1", "B2")[boundaries:]]
    assert document["passed"] == (boundaries == 3)


def test_each_boundary_of_torch_compile_waits_for_its_time(untimed, tmp_path, monkeypatch):
    """And a boundary that is not begun is a line of its own."""
    needs = {boundary: hopper_estimate.rival_s(options(tmp_path), boundary) for boundary in ("B0", "B1", "B2")}
    monkeypatch.setattr(hopper_run.Run, "left_s", property(lambda run: needs["B0"] - 1.0))
    document = rivals(tmp_path, "1,48,50", "bf16", "--plain-settings", "0")
    assert "1,48,50 compiled graph" in [row["what"] for row in document["not_run"]]
    assert document["rows"] == []
    between = (needs["B1"] + needs["B2"]) / 2
    monkeypatch.setattr(hopper_run.Run, "left_s", property(lambda run: between if run.document["rows"] else 1e6))
    document = rivals(tmp_path, "1,48,50", "bf16,fp8-all", "--plain-settings", "0")
    assert [row["boundary"] for row in document["rows"]] == ["B0", "B1"]
    assert "1,48,50 compiled graph B2" in [row["what"] for row in document["not_run"]]


def test_plain_pytorch_leaves_later_phases_their_time(untimed, tmp_path, monkeypatch):
    """What it takes is there, but not beside the proof that comes behind it."""
    later_s = hopper_estimate.seconds(options(tmp_path), ["proof"])["proof"]
    needs_s = hopper_estimate.plain_s(options(tmp_path), "B0")
    monkeypatch.setattr(hopper_run.Run, "left_s", property(lambda run: needs_s + later_s / 2))
    more = ("1,48,50", "bf16,fp8-all", "--rival-settings", "0")
    document = rivals(tmp_path, *more, phases=("rivals", "proof"))
    why = {row["what"]: row["why"] for row in document["not_run"]}
    assert f"beside {later_s:.0f} s of later phases" in why["1,48,50 eager B0"]
    assert len(document["proof"]) == 2
    assert [row["boundary"] for row in rivals(tmp_path, *more)["rows"]] == ["B0", "B1", "B2"], "nothing comes behind it"


def test_a_boundary_that_fails_is_a_line_and_the_others_go_on(untimed, tmp_path, monkeypatch):
    real = hopper_rows.with_copies

    def broken(engine, *given):
        if engine.name == COMPILED:
            raise VivaceError("this rival is broken")
        return real(engine, *given)

    monkeypatch.setattr(hopper_rows, "with_copies", broken)
    document = rivals(tmp_path)
    assert [row["boundary"] for row in document["rows"]] == ["B0", "B2", "B0", "B1", "B2"]
    failed = [row for row in document["not_run"] if not row["informational"]]
    assert [row["what"] for row in failed] == ["1,48,50 compiled graph B1"]
    assert "this rival is broken" in failed[0]["why"]


def test_the_estimate_counts_every_boundary_of_every_rival():
    base = hopper.options_of(hopper.parser().parse_args(["--out", "h.json"]))

    def more_s(**changes):
        before, after = (hopper_estimate.seconds(o, ["rivals"])["rivals"] for o in (base, replace(base, **changes)))
        return after - before

    e = hopper_estimate
    per_round = e.RIVAL_S + 2 * e.CALL_S
    assert more_s(rival_calls=1100) == pytest.approx(100 * (3 * per_round + 3 * e.HOST_S))
    assert more_s(plain_calls=1100) == pytest.approx(100 * (3 * (e.PLAIN_S + e.CALL_S) + 2 * e.HOST_S))
    two = more_s(rival_settings=2)
    assert two == pytest.approx(e.FIXED_S["rival"] + 1000 * (3 * per_round + 3 * e.HOST_S))
    assert more_s(rival_settings=3) - two == pytest.approx(e.FIXED_S["rival"] + 1000 * 2 * per_round), "no B2"
    assert more_s(rival_settings=9) == more_s(rival_settings=5)
    assert more_s(plain_settings=0) < -600, "0.2 s a call"
    assert more_s(rival_settings=0, plain_settings=0) == pytest.approx(-e.seconds(base, ["rivals"])["rivals"])
    found = e.seconds(base, list(hopper.PHASES))
    assert list(found) == ["setup", *hopper.PHASES], "in the order in which they run"
    assert e.later_s(found, "rivals") == pytest.approx(
        sum(found[name] for name in ("soak", "proof", "memory", "start"))
    )


def test_torch_compiles_engine_answers_from_host_buffers_and_as_a_policy_as_plain_pytorch_does(tmp_path, monkeypatch):
    """The engine itself, with what it would capture run at once; on a CPU `make` puts plain PyTorch in its place."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(hopper_engines.CompiledGraph, "_run", lambda self, name, work: work())
    answers, runs, real = {}, [], hopper_rivals.make

    def make(name, network, *, compile_mode="default"):
        engine = real(name, network, compile_mode=compile_mode)
        if name != COMPILED:
            return engine
        return replace(engine, backend=hopper_engines.CompiledGraph(engine.model, hopper_engines.CONFIG))

    def time_rows(size, boundary, timed, **_):
        answers[boundary] = {one.engine.name: np.asarray(one.run()) for one in timed}
        raise VivaceError("seen")

    monkeypatch.setattr(hopper_rivals, "make", make)
    monkeypatch.setitem(hopper.PHASES, "rivals", runs.append)
    rivals(tmp_path)
    run = runs[0]
    monkeypatch.setattr(hopper_rows, "time_rows", time_rows)
    size = run.options.sizes[0]
    one = hopper_rivals.Beside(size, make(COMPILED, run.base()), [make(EAGER, run.base())], run.held_out(size))
    for boundary in ("B0", "B1", "B2"):
        with torch.no_grad(), pytest.raises(VivaceError, match="seen"):
            hopper_rivals._rival_row(run, one, boundary, calls=1)
        assert np.array_equal(answers[boundary][COMPILED], answers[boundary][EAGER]), boundary
    assert answers["B2"][EAGER].shape != answers["B1"][EAGER].shape, "robot actions"
