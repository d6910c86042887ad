"""Networks are written and built with TensorRT-RTX, which needs no GPU for that; tiny models of tests/model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from vivace.backends.tensorrt import module
from vivace.errors import Unsupported

TESTS = Path(__file__).resolve().parents[1]
for folder in ("model", "conformance", "tensorrt"):
    sys.path.insert(0, str(TESTS / folder))


@pytest.fixture(scope="module", autouse=True)
def without_gradients():
    """For models made by fixtures too; ends with the module, because others do train."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def rtx() -> module.Module:
    """TensorRT-RTX. Missing: a failure in CI, a skip by name elsewhere."""
    try:
        return module.load("tensorrt_rtx")
    except Unsupported as error:
        if os.environ.get("CI"):
            pytest.fail(f"TensorRT-RTX is not installed: {error}")
        pytest.skip("TensorRT-RTX is not installed (pip install 'vivace[tensorrt]')")
