"""The denoise kernels through Triton's interpreter (CPU) against the reference operations, at small and odd shapes.

On a GPU the same logic is tested at the model's shapes by tests/ops/test_denoise_gpu.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
CHILD = Path(__file__).with_name("interpreted_denoise.py")


@pytest.mark.parametrize(
    "group", ["products", "norms", "attention", "boundary", "strides", "policy", "scales", "poison"]
)
def test_kernels_agree_with_the_reference(group):
    """In a process of its own: the interpreter must be chosen before a kernel is defined, and only for these kernels."""
    run = subprocess.run(
        [sys.executable, str(CHILD), group],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "checked" in run.stdout
