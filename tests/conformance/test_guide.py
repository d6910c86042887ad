"""The backend of docs/guides/adding-a-backend.md, as printed there, passes the suite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from suite import CHECKS, Subject

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "adding-a-backend.md"


@pytest.fixture(scope="module")
def example() -> dict:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    space: dict = {}
    exec(compile(blocks[0], str(GUIDE), "exec"), space)
    return space


@pytest.mark.parametrize("check", CHECKS)
def test_example_backend_conforms(example, check):
    CHECKS[check](Subject(example["create"], "pi05"))


def test_example_says_why_not(example):
    assert example["why_not"](device="cpu") is None
    assert "cuda" in example["why_not"](device="cuda")
