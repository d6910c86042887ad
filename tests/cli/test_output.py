"""Where the verbs write: an unwritable place is refused before the work, and nothing half-written stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vivace.check.results import write_text
from vivace.cli import bench, build, calibrate, check, report
from vivace.cli.output import refuse_output, refuse_output_folder
from vivace.errors import ConfigError

VERBS = {
    "calibrate": ("{checkpoint}", "--observations", "2", "--synthetic"),
    "check": ("{checkpoint}",),
    "bench": ("{checkpoint}",),
    "build": ("{checkpoint}", "--target", "sm89"),
    "report": ("{checkpoint}/config.json",),
    "budget": ("{checkpoint}/config.json", "--target-hz", "10"),
    "doctor": (),
    "simulate": ("--task", "static"),
}


@pytest.fixture
def no_work(monkeypatch):
    """Whatever the verbs would do for minutes fails the test."""

    def work(*arguments, **options):
        raise AssertionError("worked before it looked where to write")

    for module, name in ((calibrate, "load"), (check, "load"), (bench, "load"), (build, "_source"), (report, "build")):
        monkeypatch.setattr(module, name, work)


def places(tmp_path):
    """{what is wrong: a path that cannot be written}."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("x")
    folder.mkdir()
    return {"under a file": file / "deep" / "out.json", "a folder": folder, "the folder": folder / ".."}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("wrong", ["under a file", "a folder", "the folder"])
def test_an_unwritable_output_exits_2_before_any_work(vivace, checkpoint, tmp_path, no_work, verb, wrong):
    path = places(tmp_path)[wrong]
    before = sorted(tmp_path.rglob("*"))
    options = [text.format(checkpoint=checkpoint) for text in VERBS[verb]]
    code, document, text = vivace(verb, *options, "-o", path)
    assert (code, document) == (2, None)
    assert "cannot write" in " ".join(text.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_the_preset_looks_first_too(vivace, tmp_path, monkeypatch):
    from vivace.check import hopper

    monkeypatch.setattr(hopper, "run", lambda *a, **k: pytest.fail("measured before it looked where to write"))
    code, _, text = vivace("bench", "--preset", "hopper", "-o", places(tmp_path)["under a file"])
    assert code == 2
    assert "cannot write" in " ".join(text.split())


def test_a_folder_of_engines_that_cannot_be_exits_2(vivace, checkpoint, tmp_path, no_work):
    for path in (tmp_path / "file", tmp_path / "file" / "engines"):
        (tmp_path / "file").write_text("x")
        code, _, text = vivace("build", checkpoint, "--target", "sm89", "--engines", path)
        assert code == 2
        assert "cannot write" in " ".join(text.split())


def test_a_place_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a chmod does not stop root
    for refuse in (refuse_output, refuse_output_folder):
        with pytest.raises(ConfigError, match="not writable"):
            refuse(tmp_path / "new" / "out")


def test_what_can_be_written_passes_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "old.json"
    old.write_text("{}")
    for path in (None, old, tmp_path / "a" / "b" / "c.json", Path("relative.json")):
        refuse_output(path)
    refuse_output_folder(tmp_path / "x" / "y")
    assert list(tmp_path.iterdir()) == [old]


def test_a_write_that_fails_is_one_message_and_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="cannot write"):
        write_text(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write"):
        write_text(tmp_path / "file" / "out", "text")


def test_a_device_is_not_replaced_by_a_file():
    with pytest.raises(ConfigError, match="no file"):
        refuse_output(Path("/dev/null"))
