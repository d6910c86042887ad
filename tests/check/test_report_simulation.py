"""The report's section of a simulation result, from JSON alone."""

from __future__ import annotations

import copy

import pytest

from vivace.check.report_simulation import delay_figures, delay_ticks, reaction_figures, section


def arm(mode="aligned", ticks=0, rate=0.9, *, belt="fast", task="conveyor", committed=False, reaction=None):
    delay = {"name": f"{ticks * 20} ms", "ticks": {str(ticks): 1}, "measured": False}
    facts = {"task": task, "belt": belt, "policy": "expert", "engine": "auto", "precision": "auto", "steps": None}
    facts |= {"mode": mode, "committed": committed, "execute_ticks": 8, "delay": delay, "fault": None}
    return {
        "arm": facts, "n": 100, "finished": 100, "crashes": 0, "successes": 90, "rate": rate, "interval": [0.8, 0.95],
        "wrong_object": 0, "time_to_success_s": {"median": 1.5}, "age_ms": {"mean": 70.0, "p99": 140.0},
        "seams": {"plans_apart_m_s": 0.01}, "rms_jerk_m_s3": 3.0, "reaction": reaction,
    }  # fmt: skip


@pytest.fixture
def document():
    pair = {"difference": -0.1, "interval": [-0.2, 0.0], "gained": 1, "lost": 11, "noninferior": False}
    return {
        "simulator": {"mujoco": "4.0.0", "scene_sha256": "7468277f8e3c783a"},
        "seeds": {"first": 0, "n": 100},
        "method": {"margin": 0.05},
        "arms": [
            arm("aligned", 0), arm("naive", 0), arm("aligned", 5), arm("naive", 5, 0.4), arm("aligned", 0, belt="slow"),
            arm("aligned", 5, committed=True),
        ],
        "comparisons": [{"arm": 3, "reference": 2, "what": "mode", "result": pair, "holm_p": 0.006}],
        "controls": [{"name": "blanked", "policy": "expert", "status": "failed", "found": "9/10 <broken>"}],
    }  # fmt: skip


def test_one_figure_for_each_belt_that_has_several_delays(document):
    found = delay_figures(document)
    assert len(found) == 1
    svg = found[0][0]
    assert "conveyor, fast belt" in svg
    for label in ("aligned, told", "aligned", "naive", "inference delay, ms"):
        assert f">{label}</text>" in svg
    assert ">pause</text>" not in svg


def test_drawn_delays_stand_at_their_mean():
    drawn = arm()
    drawn["arm"]["delay"]["ticks"] = {"2": 3, "6": 1}
    assert delay_ticks(drawn) == 3.0


def test_reaction_is_drawn_with_its_theory(document):
    reaction = {"episodes": 4, "reacted": 4, "ticks": {"3": 2, "8": 2}, "theory_ticks": [3, 10]}
    document["arms"].append(arm("naive", 3, task="perturb", reaction=reaction))
    (svg, caption), *others = reaction_figures(document)
    assert not others
    assert "perturb fast: reaction" in svg
    assert "twins" in caption


def test_section_shows_pairs_and_controls_escaped(document):
    page = section(document)
    assert "9/10 &lt;broken&gt;" in page
    assert "-20.0 to +0.0" in page
    assert "0 / 1" in page


def test_a_result_of_libero_names_its_suite_and_has_its_own_ticks(document):
    document["arms"] = [arm("aligned", ticks, task="task", belt=None) for ticks in (0, 4)]
    document["comparisons"] = []
    conveyor = delay_figures(document)[0][0]
    document["simulator"] = {
        "name": "LIBERO", "suite": "libero_object", "convention": "openpi", "versions": {"mujoco": "3.2.3"},
        "control_hz": 20.0,
    }  # fmt: skip
    assert "libero_object, protocol openpi, mujoco 3.2.3" in section(document)
    assert ">80</text>" in conveyor  # the last label of the axis in ms
    assert ">200</text>" in delay_figures(document)[0][0]
    assert ">200</text>" not in conveyor


def test_void_and_unfinished_are_said(document):
    document["comparisons"][0]["result"] |= {"noninferior": None, "void": "reference too low"}
    document["unfinished"] = "a process was killed"
    page = section(document)
    assert "reference too low" in page
    assert "a process was killed" in page


def test_a_document_without_its_keys_is_a_key_error(document):
    broken = copy.deepcopy(document)
    del broken["arms"][0]["reaction"]
    with pytest.raises(KeyError):
        section(broken)
