"""Success against denoise steps and for each plan: there where a result has such arms, with the file's own numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from vivace.check import report_plots
from vivace.check.report import build
from vivace.check.report_simulation import plan_figures, step_figures

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def stored(name):
    return json.loads((RESULTS / f"conveyor-small-{name}-2026-11-30.json").read_text())


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure, in order, as they are when it is finished."""
    axes, finish = [], report_plots.Canvas.svg

    def noted(canvas):
        axes.append(canvas.axes)
        return finish(canvas)

    monkeypatch.setattr(report_plots.Canvas, "svg", noted)
    return axes


def points(axes):
    """{label: [(x, y)]} of lines with a label that stands for data."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines}


def bars(axes):
    """[((x, y) of one end, (x, y) of the other)] of all intervals."""
    return [tuple(map(tuple, segment)) for one in axes.collections for segment in one.get_segments()]


def steps_of(document):
    return [(arm["arm"]["steps"], 100 * arm["rate"]) for arm in document["arms"]]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("steps", "conveyor, aligned, 8 ticks a chunk"),
        ("steps-bimodal", "bimodal, aligned, 8 ticks a chunk"),
        ("steps-bimodal-24", "bimodal, aligned, 24 ticks a chunk"),
    ],
)
def test_the_line_and_its_intervals_are_those_of_the_file(drawn, name, line):
    document = stored(name)
    ((svg, caption),) = step_figures(document)
    (axes,) = drawn
    assert points(axes) == {line: steps_of(document)}
    arms = document["arms"]
    ends = [[(arm["arm"]["steps"], 100 * side) for side in arm["interval"]] for arm in arms]
    assert bars(axes) == [tuple(end) for end in ends]
    for text in (line, "% success", "denoise steps of a chunk (logarithmic)", "1", "2", "3", "5", "10"):
        assert f">{text}</text>" in svg
    assert "<title>Success against denoise steps</title>" in svg
    assert caption == "conveyor-small, delay 0 ms; bars: Wilson, 95 %"


def test_one_line_for_each_task_and_number_of_ticks_and_one_figure_for_each_delay(drawn):
    often, seldom, other = (stored(name) for name in ("steps-bimodal", "steps-bimodal-24", "steps"))
    later = copy.deepcopy(seldom["arms"])
    for arm in later:
        arm["arm"]["delay"] = {"name": "100 ms", "ticks": {"5": 1}}
    alone = copy.deepcopy(other["arms"][0])
    alone["arm"]["mode"] = "naive"
    figures = step_figures({"arms": [*often["arms"], *seldom["arms"], *other["arms"], *later, alone]})
    assert [caption.split(";")[0] for _, caption in figures] == [
        "conveyor-small, delay 0 ms", "conveyor-small, delay 100 ms",
    ]  # fmt: skip
    first, second = map(points, drawn)
    assert list(first) == [
        "bimodal, aligned, 8 ticks a chunk", "bimodal, aligned, 24 ticks a chunk", "conveyor, aligned, 8 ticks a chunk",
    ]  # fmt: skip
    assert first["bimodal, aligned, 24 ticks a chunk"] == second["bimodal, aligned, 24 ticks a chunk"]


def test_an_arm_without_a_rate_or_a_number_of_steps_is_left_out(drawn):
    document = stored("steps")
    document["arms"][0]["rate"] = None
    document["arms"][1]["arm"]["steps"] = None
    step_figures(document)
    ((line,),) = (points(axes).values() for axes in drawn)
    assert [at for at, _ in line] == [3, 5, 10]


def test_labels_of_close_steps_do_not_touch():
    assert report_plots._apart([1, 2, 3, 5, 10]) == [1, 2, 3, 5, 10]
    assert report_plots._apart([1, 2, 47, 48, 50]) == [1, 2, 47]


@pytest.mark.parametrize("name", ["plans-fp8-cpu", "plans-h200"])
def test_plans_stand_side_by_side_and_the_margin_beside_the_differences(drawn, name):
    document = stored(name)
    (alone, _), (paired, said) = plan_figures(document)
    rates, differences = drawn
    arms, pairs = document["arms"], document["comparisons"]
    labels = [arm["arm"]["precision"] for arm in arms]
    assert [tick.get_text() for tick in rates.get_yticklabels()] == labels
    *marks, reference = rates.lines
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [
        (100 * arm["rate"], y) for y, arm in enumerate(arms)
    ]
    assert bars(rates) == [tuple((100 * side, y) for side in arm["interval"]) for y, arm in enumerate(arms)]
    assert [mark.get_marker() for mark in marks] == ["s", "o", "o"], "the reference is marked"
    assert set(reference.get_xdata()) == {100 * arms[0]["rate"]}
    assert f">{labels[0]} (reference)</text>" in alone
    assert [text.get_text() for text in rates.texts] == [f"{100 * arm['rate']:.1f}" for arm in arms]

    assert [tick.get_text() for tick in differences.get_yticklabels()] == labels[1:]
    *marks, zero, margin = differences.lines
    assert [mark.get_xdata()[0] for mark in marks] == [100 * one["result"]["difference"] for one in pairs]
    assert bars(differences) == [
        tuple((100 * side, y) for side in one["result"]["interval"]) for y, one in enumerate(pairs)
    ]
    assert set(zero.get_xdata()) == {0.0}
    assert set(margin.get_xdata()) == {-100 * document["method"]["margin"]}
    assert ">margin: 5 % worse</text>" in paired
    assert "Tango" in said


def test_without_pairs_there_is_no_reference_and_no_margin(drawn):
    document = stored("plans-h200")
    document["comparisons"] = []
    assert len(plan_figures(document)) == 1
    assert len(drawn[0].lines) == 3
    assert "s" not in {line.get_marker() for line in drawn[0].lines}


def test_an_engine_that_was_not_asked_for_by_name_is_named_by_what_ran(drawn):
    document = stored("plans-fp8-cpu")
    document["arms"][1]["engine"]["backend"] = "compiled"
    document["comparisons"] = []
    plan_figures(document)
    names = [tick.get_text() for tick in drawn[0].get_yticklabels()]
    assert names == ["eager, bfloat16", "compiled, fp8-mlp.json", "eager, fp8-all.json"]


def test_results_of_one_page_share_a_figure_where_weights_scene_and_seeds_are_equal(drawn):
    names = ("plans-cpu", "plans-fp8-cpu", "plans-h200")
    assert plan_figures(stored("plans-cpu")) == [], "one plan"
    documents = [(f"{name}.json", stored(name)) for name in names]
    page = build(documents)
    assert page.count("<svg") == 1 + 2 + 2
    assert "with arms of plans-fp8-cpu.json, plans-h200.json; lines: Wilson" in page
    every = [arm for _, document in documents for arm in document["arms"]]
    assert [line.get_xdata()[0] for line in drawn[0].lines] == [100 * arm["rate"] for arm in every]
    assert [tick.get_text() for tick in drawn[0].get_yticklabels()][:2] == ["eager, float32", "eager, bfloat16"]

    for change in ("weights", "seeds", "scene"):
        first, other = copy.deepcopy(documents[0][1]), documents[1][1]
        if change == "weights":
            first["arms"][0]["engine"]["checkpoint_hash"] = "8e63470b8d6930af"
        elif change == "seeds":
            first["seeds"]["first"] = 1000
        else:
            first["simulator"]["scene_sha256"] = "0"
        assert build([("a", first), ("b", other)]).count("<svg") == 2, f"only its own: other {change}"


@pytest.mark.parametrize("name", ["delay", "events", "100ms", "belts"])
def test_results_without_such_arms_have_no_such_figures(name):
    document = stored(name)
    assert step_figures(document) == []
    assert plan_figures(document) == []
