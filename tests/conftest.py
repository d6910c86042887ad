"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton's first import, wherever that happens: its own library is decorated then. Without a GPU the kernels'
    # logic runs in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of fixtures written by openpi, LeRobot and Orbax, beside the checkout.

    Missing: a failure in CI, a skip by name in a plain clone.
    """
    folder = REPOSITORY.parent / "shared" / "golden"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"the golden fixtures are missing: {folder}")
        pytest.skip("golden fixtures are not beside this checkout (../shared/golden)")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread_each() -> None:
    """Small tensors on two cores: more threads only fight each other."""
    torch.set_num_threads(1)
