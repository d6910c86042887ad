"""`make test-gpu` on a machine without the extras: their modules are skipped by name, real errors stay errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tyro", "websockets", "mujoco", "beartype", "not_written_yet"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Blocked())
"""


def collect(tmp_path, *arguments, ci=False):
    """pytest --collect-only in a process where some packages do not exist."""
    (tmp_path / "blocker.py").write_text(BLOCKER)
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    environment |= {"CI": "1"} if ci else {}
    command = [sys.executable, "-m", "pytest", "-p", "blocker", "-p", "no:xdist", "--collect-only", "-q", *arguments]
    # as `make test-gpu` collects: from the top; only what this test does not speak of is left out
    kept = {"check", "serving", "cli", "model", "lint", "__pycache__"}
    command += [
        f"--ignore={folder}" for folder in (ROOT / "tests").iterdir() if folder.is_dir() and folder.name not in kept
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_gpu_tests_are_collected_without_the_extras(tmp_path):
    done = collect(tmp_path, "-m", "gpu")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_bench_gpu.py::test_device_time" in done.stdout
    assert "websockets is not installed here" in done.stdout, "the folder is named"
    assert "tyro is not installed here" in done.stdout
    assert "error" not in done.stdout.splitlines()[-1]


def test_they_stay_errors_in_ci_and_in_other_selections(tmp_path):
    for done in (collect(tmp_path, "-m", "gpu", ci=True), collect(tmp_path, "-m", "not gpu")):
        assert done.returncode == 2, done.stdout[-2000:]
        assert "No module named 'websockets'" in done.stdout


def test_a_module_that_nobody_knows_stays_an_error(tmp_path):
    folder = ROOT / "tests" / "lint"
    broken = folder / "test_broken_import_for_this_test.py"
    broken.write_text("import not_written_yet\n")
    try:
        done = collect(tmp_path, "-m", "gpu", str(broken))
    finally:
        broken.unlink()
    assert done.returncode != 0
    assert "not_written_yet" in done.stdout
