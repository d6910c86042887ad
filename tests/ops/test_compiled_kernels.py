"""Kernels compiled without a GPU: for Hopper none drops NaN on its way into E4M3; older GPUs have room for them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CHILD = Path(__file__).with_name("compiled_kernels.py")
OLDER = Path(__file__).with_name("compiled_older.py")


def test_no_kernel_drops_nan_and_narrow_heads_compile(compiled_alone):
    assert "checked 17 clamps and 16 products of narrow heads" in compiled_alone(CHILD)


def test_kernels_compile_for_other_gpus_and_fit(compiled_alone):
    assert "compiled 50 kernels" in compiled_alone(OLDER)
