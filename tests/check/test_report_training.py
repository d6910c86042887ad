"""The report's section of a training: the loss and the success rates that its log tells, and of which run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vivace.check import report_plots
from vivace.check.report import build
from vivace.check.report_training import losses, read_log, section, successes

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def stored(day="2026-11-30"):
    return json.loads((RESULTS / f"conveyor-small-training-h200-{day}.json").read_text())


@pytest.fixture
def drawn(monkeypatch):
    axes, finish = {}, report_plots.Canvas.svg

    def noted(canvas):
        axes[canvas.axes.get_title(loc="left")] = canvas.axes
        return finish(canvas)

    monkeypatch.setattr(report_plots.Canvas, "svg", noted)
    return axes


def step(at, loss=0.5):
    return {"event": "step", "step": at, "loss": loss}


def corrected(at, rate=0.5, **more):
    row = {"task": "conveyor", "belt": "fast", "n": 10, "successes": int(10 * rate), "rate": rate, "wrong_object": 0}
    return {
        "event": "corrected",
        "step": at,
        "rates": [row | {"interval": [rate - 0.1, rate + 0.1]}],
        "examples": 3,
        **more,
    }


DATA = {"event": "data", "episodes": 4, "examples": 100}


def test_the_loss_is_that_of_the_log(drawn):
    log = stored()["log"]
    page = section({"log": log})
    axes = drawn["Training loss"]
    (curve, *lines) = axes.lines
    steps = [row for row in log if row["event"] == "step"]
    assert list(curve.get_xdata()) == [row["step"] for row in steps]
    assert list(curve.get_ydata()) == [row["loss"] for row in steps]
    assert (axes.get_yscale(), axes.get_ylabel(), axes.get_xlabel()) == ("log", "loss (logarithmic)", "step")
    assert [line.get_xdata()[0] for line in lines] == [row["step"] for row in log if row["event"] == "corrected"]
    assert "<b>9,000</b><span>steps</span>" in page
    assert "<title>Training loss</title>" in page


def test_success_of_corrections_stands_at_their_step_with_its_interval(drawn):
    log = stored()["log"]
    page = section({"log": log})
    axes = drawn["Success on the way"]
    reports = [(row["step"], rate) for row in log if row["event"] == "corrected" for rate in row["rates"]]
    shown = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata())]
    assert sorted(shown) == sorted((at, 100 * rate["rate"]) for at, rate in reports)
    segments = [tuple(map(tuple, segment)) for one in axes.collections for segment in one.get_segments()]
    assert sorted(segments) == sorted(tuple((at, 100 * side) for side in rate["interval"]) for at, rate in reports)
    for text in (
        "bimodal",
        "conveyor",
        "conveyor, middle belt",
        "corrections",
        "corrections, 8 ticks late",
        "% success",
    ):
        assert f">{text}</text>" in page
    assert axes.get_xlim() == (0, 1.05 * 9000)


def test_held_out_success_is_told_from_corrections():
    log = [DATA, step(50), corrected(50, delay_ticks=5), {**corrected(100, 0.9), "event": "success"}]
    rows = [(row["name"], row["step"], row["rate"]) for row in successes(log)]
    assert rows == [("corrections, 5 ticks late", 50, 0.5), ("held out", 100, 0.9)]
    assert ">held out</text>" in section({"log": log})


def test_an_earlier_log_does_not_say_how_late_its_corrections_were():
    assert {row["name"] for row in successes(stored("2026-11-25")["log"])} == {"corrections"}


def test_a_resumed_run_replaces_what_came_after_the_step_it_went_on_from():
    first = [DATA, step(50, 0.9), corrected(60, 0.1), step(100, 0.8), step(150, 0.7)]
    second = [DATA, corrected(60, 0.2), step(150, 0.6), step(200, 0.5)]
    assert [(row["step"], row["loss"]) for row in losses(first + second)] == [
        (50, 0.9), (100, 0.8), (150, 0.6), (200, 0.5),
    ]  # fmt: skip
    assert [row["rate"] for row in successes(first + second)] == [0.2]
    assert [row["rate"] for row in successes([*first, DATA])] == [0.1], "one that ended before its corrections"
    assert "<b>3</b><span>examples of corrections</span>" in section({"log": first + second})


@pytest.mark.parametrize("losses_", [(0.5, 0.4), (0.5, "nan"), (0.5, 0.0)])
def test_a_loss_that_needs_no_logarithm_has_none(drawn, losses_):
    section({"log": [step(50 * (i + 1), loss) for i, loss in enumerate(losses_)]})
    assert drawn["Training loss"].get_yscale() == "linear"


def test_a_log_without_steps_has_no_figures():
    page = section({"log": [{"event": "start", "device": "cpu"}, DATA]})
    assert "<svg" not in page
    assert "<b>100</b><span>examples recorded</span>" in page


def test_a_log_reads_like_a_stored_result(tmp_path):
    log = stored()["log"]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    document = read_log(tmp_path / "log.jsonl")
    assert section(document) == section({"log": log})
    assert "<h2>Training</h2>" in build([("log.jsonl", document)])


def test_a_training_result_without_a_log_is_shown_as_facts():
    pilot = json.loads((RESULTS / "training-pilot-cpu-2026-11-25.json").read_text())
    page = build([("pilot.json", pilot)])
    assert "1,346,824" in page
    assert "<svg" not in page


def test_text_of_a_log_is_escaped():
    log = [DATA, step(50), corrected(50)]
    log[2]["rates"][0]["task"] = "<script>"
    assert "<script" not in section({"log": log, "note": "<script>"})
