"""Intervals, pairing, processes, and the verb."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from vivace.cli.main import main
from vivace.errors import ConfigError
from vivace.sim.campaign import Cell, run_cells, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    """Newcombe 1998, table I, method 3."""
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_what_is_no_rate():
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ConfigError, match="a rate"):
            wilson(successes, n)


def test_processes_do_not_change_the_outcome():
    cells = [Cell("static"), Cell("conveyor", belt="fast", mode="naive", delay_ticks=(2, 6))]
    alone = [asdict(one) for one in run_cells(cells, range(3))]
    assert alone == [asdict(one) for one in run_cells(cells, range(3), processes=2)]
    assert [row["seed"] for row in alone[1]["episodes"]] == [0, 1, 2]


def test_verb_writes_one_row_for_each_condition(capsys, tmp_path):
    path = tmp_path / "simulate.json"
    asked = ["--task", "conveyor", "--belt", "fast", "--mode", "pause", "aligned", "--delay-ms", "0", "150"]
    assert main(["simulate", *asked, "--episodes", "4", "-o", str(path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads(path.read_text()) == document
    rates = {(row["cell"]["mode"], row["cell"]["delay_ticks"][0]): row["successes"] for row in document["cells"]}
    assert rates == {("pause", 0): 4, ("pause", 8): 0, ("aligned", 0): 4, ("aligned", 8): 4}
    assert set(document["simulator"]) == {"scene_sha256", "mujoco"}


def test_verb_names_a_bad_task(capsys):
    assert main(["simulate", "--task", "juggle"]) == 2
    assert "unknown task 'juggle'" in capsys.readouterr().err
