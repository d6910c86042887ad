"""Blocks that pair two results say what the letters of both say: a block is put into a file by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from vivace.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SMALL, DATE = "conveyor-small-", "-2026-11-30.json"
BLOCKS = {
    ("plans-cpu", "against_h200"): (["plans-h200"], "plans-cpu", "precision"),
    ("plans-fp8-cpu", "against_float32"): (["plans-fp8-cpu"], "plans-cpu", "precision"),
    ("untold", "told_against_untold"): (["plans-cpu", "100ms#0"], "untold", "delay"),
    ("untold", "untold_against_naive"): (["untold#1"], "100ms#1", "delay"),
}
"""{(file, block): (files of the arms, file of the reference, what an arm is called)}."""


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("pair_results", ROOT / "benchmarks" / "pair_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def path(name):
    name, _, places = name.partition("#")
    return str(RESULTS / f"{SMALL}{name}{DATE}") + (f"#{places}" if places else "")


def simulated():
    found = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    return {name: document for name, document in found.items() if document.get("kind") == "simulate"}


def test_every_block_of_pairs_is_held_against_letters():
    """One that is not in the table would be believed."""
    blocks = {
        (name, key)
        for name, document in simulated().items()
        for key, value in document.items()
        if isinstance(value, dict) and any(isinstance(row, dict) and "mcnemar_p" in row for row in value.values())
    }
    assert blocks == {(f"{SMALL}{name}{DATE}", key) for name, key in BLOCKS}


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_a_block_is_what_the_letters_of_both_files_say(made, name, block):
    arms, reference, by = BLOCKS[name, block]
    again = made.pair([path(one) for one in arms], path(reference), by=by)
    stored = json.loads(Path(path(name)).read_text(encoding="utf-8"))[block]
    assert list(again) == list(stored)
    for label, row in stored.items():
        assert list(again[label]) == list(row)
        for key, value in row.items():
            got = list(again[label][key]) if isinstance(value, list) else again[label][key]
            assert got == (pytest.approx(value, rel=1e-9) if isinstance(value, float | list) else value), (label, key)


@pytest.mark.parametrize(("name", "document"), simulated().items())
def test_counts_and_comparisons_of_a_result_are_those_of_its_letters(name, document):
    arms = document["arms"]
    for arm in arms:
        assert [arm["outcomes"].count(letter) for letter in "SWC"] == [
            arm["successes"], arm["wrong_object"], arm["crashes"],
        ]  # fmt: skip
        assert len(arm["outcomes"]) == arm["n"]
    for one in document["comparisons"]:
        both = zip(arms[one["arm"]]["outcomes"], arms[one["reference"]]["outcomes"], strict=True)
        whole = [pair for pair in both if "C" not in pair]
        gained, lost = (sum((a == "S", b == "S") == wanted for a, b in whole) for wanted in ((1, 0), (0, 1)))
        row = one["result"]
        assert (row["n"], row["gained"], row["lost"]) == (len(whole), gained, lost)


def test_arms_that_are_no_pairs_are_refused(made):
    for arms, reference, by in (
        (["rates"], "plans-cpu", "delay"),  # another task
        (["untold#1"], "plans-cpu", "delay"),  # another delay
        (["delay#27"], "plans-cpu", "delay"),  # other seeds
        (["100ms"], "untold", "delay"),  # two arms of one name
    ):
        with pytest.raises(ConfigError, match="pairs of"):
            made.pair([path(one) for one in arms], path(reference), by=by)
