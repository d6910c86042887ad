"""Kernels compiled for Hopper without a GPU: none drops NaN on its way into E4M3, and small heads compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CHILD = Path(__file__).with_name("compiled_kernels.py")


def test_no_kernel_drops_nan_and_narrow_heads_compile(tmp_path):
    """In a process of its own, because other tests of this one choose the interpreter."""
    run = subprocess.run(
        [sys.executable, str(CHILD)],
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "checked 14 clamps and 16 products of narrow heads" in run.stdout
