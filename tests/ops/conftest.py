"""What several kernel tests need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def compiled_alone(tmp_path):
    """Runs a script that compiles kernels in a process of its own, because tests of this one choose the interpreter.

    script -> what it printed; a failure of the script fails the test with its output
    """

    def run(script: Path) -> str:
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
