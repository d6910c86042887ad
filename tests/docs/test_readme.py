"""The README says what the committed result says, and its commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def readme_table():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_speed_table_is_that_of_the_result():
    made = readme_table()
    text = made.table(json.loads(made.RESULT.read_text()))
    assert made.with_table(README, text) == README, "run: python benchmarks/readme_table.py --write"


def test_every_verb_of_the_readme_exists():
    from vivace.cli.main import VERBS

    named = set(re.findall(r"`vivace ([a-z-]+)", README)) | set(
        re.findall(r"^    vivace ([a-z-]+)", README, re.MULTILINE)
    )
    assert named
    assert named <= set(VERBS)


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_changelog_has_numerics():
    assert "### Numerics" in (ROOT / "CHANGELOG.md").read_text()
