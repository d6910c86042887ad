"""A small robot for tests that need no fixture folder: two cameras, 5 + 1 state values, one token per character."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vivace.robots.embodiment import from_toml
from vivace.robots.io import resolve
from vivace.robots.pipeline import RobotPipeline
from vivace.types import NormStats, RobotFacts, RobotIO


class Characters:
    """A tokenizer whose ids can be read: code point + 3, BOS = 2."""

    source = "test"

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        return [2] * add_bos + [ord(letter) + 3 for letter in text]


def stats(n: int) -> NormStats:
    mean = np.linspace(-0.5, 0.5, n)
    return NormStats(
        mean=mean,
        std=np.full(n, 0.5),
        min=mean - 2,
        max=mean + 2,
        q01=mean - 1,
        q99=mean + 1,
        q10=mean - 0.5,
        q90=mean + 0.5,
    )


@pytest.fixture
def toml() -> Path:
    return Path(__file__).parent / "so101.toml"


@pytest.fixture
def openpi_facts() -> RobotFacts:
    return RobotFacts("openpi", {"so101": (stats(6), stats(6))}, "quantiles", "quantiles", 1e-6, "openpi_pi05")


@pytest.fixture
def lerobot_facts() -> RobotFacts:
    return RobotFacts(
        "lerobot",
        {"": (stats(6), stats(6))},
        "mean_std",
        "mean_std",
        1e-8,
        "lerobot_pi05",
        cameras=("observation.images.front", "observation.images.wrist"),
        state_dim=6,
        action_dim=6,
        relative_mask=(True,) * 5 + (False,),
    )


@pytest.fixture
def io(openpi_facts: RobotFacts, toml: Path) -> RobotIO:
    return resolve(openpi_facts, "pi05", embodiment=from_toml(toml))


@pytest.fixture
def pipeline(io: RobotIO) -> RobotPipeline:
    return RobotPipeline(io, Characters())


@pytest.fixture
def characters() -> Characters:
    return Characters()


@pytest.fixture
def request_of() -> Callable[..., dict]:
    def make(**changes) -> dict:
        rng = np.random.default_rng(0)
        request = {
            "cameras/front": rng.integers(0, 256, (60, 80, 3), dtype=np.uint8),
            "cameras/wrist": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
            "joints": np.linspace(-0.4, 0.4, 5),
            "gripper": 0.25,
            "prompt": "stack",
        }
        for key, value in changes.items():
            name = {"front": "cameras/front", "wrist": "cameras/wrist"}.get(key, key)
            if value is None:
                request.pop(name, None)
            else:
                request[name] = value
        return request

    return make
