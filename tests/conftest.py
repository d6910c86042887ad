"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton's first import, wherever that happens: its own library is decorated then. Without a GPU the kernels'
    # logic runs in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
EXTRAS = {
    "OpenGL", "PIL", "av", "beartype", "gymnasium", "hypothesis", "imageio", "jaxtyping", "matplotlib", "msgpack", "mujoco",
    "openpi_client", "prometheus_client", "psutil", "rich", "safetensors", "sentencepiece", "tensorstore", "tokenizers",
    "transformers", "tyro", "websockets",
}  # fmt: skip
"""What a GPU machine may lack without losing the GPU tests of the other modules."""
MISSING = re.compile(r"(?:ModuleNotFoundError: No module named '|vivace\.sim needs )(\w+)")


class MissingExtras:
    """`-m gpu`: a module or folder that cannot be imported for want of an extra is skipped by name, and stops nothing.

    Anything else that fails to import stays an error. A plugin of its own, because pytest does not ask a conftest about a
    folder whose own conftest is being imported.
    """

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, None]:
        outcome = yield
        report = outcome.get_result()
        found = MISSING.findall(str(report.longrepr)) if report.failed else []
        if found and found[-1] in EXTRAS and not _installed(found[-1]):
            reason = f"Skipped: {found[-1]} is not installed here; the GPU tests in this file or folder did not run"
            report.outcome, report.longrepr, report.result = "skipped", (str(collector.path), 0, reason), []


def pytest_configure(config: pytest.Config) -> None:
    """Never in CI, never in another selection: there everything is installed and everything must be imported."""
    if config.option.markexpr.strip() == "gpu" and not os.environ.get("CI"):
        config.pluginmanager.register(MissingExtras(), "missing-extras")


SLOW = (
    "conformance/test_backends.py", "ops/test_compiled_kernels.py", "ops/test_denoise.py", "sim/test_small_campaign.py",
    "tensorrt/test_build.py",
)  # fmt: skip
"""Files of a minute and more. They come first, or one worker is left with the last of them while the other is done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, everything else as it was."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(SLOW))


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="session")
def openpi_module() -> Callable[[str], Any]:
    """Imports a module of openpi-client. Not installed: an error in CI, a skip by name elsewhere."""

    def load(name: str) -> Any:
        full = f"openpi_client.{name}"
        return importlib.import_module(full) if os.environ.get("CI") else pytest.importorskip(full)

    return load


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


@pytest.fixture
def devices() -> tuple[Callable[[Any], AbstractContextManager[None]], list[Any]]:
    """(stands for `on` and `torch.cuda.device`, the devices that are current now, the innermost last)."""
    current: list[Any] = []

    @contextmanager
    def on(device: Any) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    return on, current
