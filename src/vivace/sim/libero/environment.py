"""One task of a LIBERO suite as a simulator for `rollout`: 20 control ticks a second, 7-D actions, official initial states.

The seed of an episode is the number of its initial state, so equal seeds are equal scenes. Physics goes on in the control
ticks alone; cameras are rendered when `look` is called and at no other time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from ...types import Observation
from .client import LiberoProcess
from .conventions import CAMERAS, CONTROL_HZ, Convention

ROBOT = ("eef_m", "eef_quat_xyzw", "fingers_m")
"""Keys of the worker's state, in the order of the policy's."""


class Answers(Protocol):
    """What the environment needs of the process; `client.LiberoProcess` is one."""

    versions: dict[str, str]
    gl: str

    def ask(self, do: str, **what: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Header and arrays of one answer."""

    def close(self) -> None:
        """End."""


@dataclass(frozen=True)
class Sight:
    """The true state, for scripted experts. Metres; quaternions xyzw.

    objects  {name: (position [3], quaternion [4])} of the goal's objects, in the goal's order
    """

    eef_m: NDArray[np.float64]
    eef_quat_xyzw: NDArray[np.float64]
    fingers_m: NDArray[np.float64]
    objects: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


class LiberoEnv:
    """A `rollout.Simulator`.

    Args:
        suite, task: e.g. "libero_object", 0 to 9.
        convention: what the policy's family does around the simulator.
        python: interpreter that has LIBERO, see `client`; ignored where `process` is given.
        images: False: no cameras and no OpenGL.
    Raises: ConfigError for an unknown suite or task, Unsupported without LIBERO.
    """

    control_hz = CONTROL_HZ

    def __init__(
        self,
        suite: str,
        task: int,
        *,
        convention: Convention,
        python: str | Path | None = None,
        images: bool = True,
        process: Answers | None = None,
    ) -> None:
        self.max_ticks = convention.limit(suite)
        if not 0 <= task < tasks_of(suite):
            raise ConfigError(f"task of {suite}", got=task, wanted=f"0 to {tasks_of(suite) - 1}")
        self.convention = convention
        self._process = process or LiberoProcess(python, images=images)
        about, _ = self._process.ask("open", suite=suite, task=task, image_px=convention.image_px if images else 0)
        self.prompt: str = about["language"]
        self.name: str = about["name"]
        self.initial_states: int = about["initial_states"]
        self.goal_objects: tuple[str, ...] = tuple(about["goal_objects"])
        self.versions = {**self._process.versions, "gl": self._process.gl}
        self.looks = 0
        self._state: dict[str, Any] = {}
        self._ticks = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Set initial state number `seed` and let it settle. Raises ConfigError for a number that there is not."""
        number = 0 if seed is None else seed
        if not 0 <= number < self.initial_states:
            raise ConfigError(
                f"initial state of {self.name}", got=number, wanted=f"0 to {self.initial_states - 1}",
                do="lower --seed or --episodes-per-task",
            )  # fmt: skip
        setting, idle = self.convention, self.convention.idle.tolist()
        self._state, _ = self._process.ask(
            "reset", initial_state=number, seed=setting.env_seed + number, settle=setting.settle_ticks, idle=idle
        )
        self._ticks = 0
        return self.feel(), self.info()

    def step(self, action: NDArray[Any]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One control tick; terminated at success, truncated at the suite's limit."""
        self._state, _ = self._process.ask("step", action=self.convention.command(action).tolist())
        self._ticks += 1
        success = bool(self._state["success"])
        return self.feel(), float(success), success, self._ticks >= self.max_ticks, self.info()

    def look(self) -> Observation:
        """Render and return what a policy sees."""
        self.looks += 1
        _, pixels = self._process.ask("look", cameras=list(CAMERAS.values()))
        views = {view: self.convention.view(pixels[camera]) for view, camera in CAMERAS.items()}
        return Observation(views=views, state=self._numbers(), prompt=self.prompt)

    def feel(self) -> Observation:
        """The same without images."""
        return Observation(views={}, state=self._numbers(), prompt=self.prompt)

    def hold(self, last: NDArray[Any] | None) -> NDArray[np.float64]:
        """A robot that waits: no motion, the gripper as it was told last (in the policy's sign)."""
        still = self.convention.idle
        still[-1] = still[-1] * self.convention.gripper_sign if last is None else last[-1]
        return still

    def sight(self) -> Sight:
        """The true state."""
        state = self._state
        pairs = {
            name: (np.asarray(where), np.asarray(turned))
            for name in self.goal_objects
            if name in state["objects"]
            for where, turned in [state["objects"][name]]
        }
        eef, turned, fingers = (np.asarray(state[key]) for key in ROBOT)
        return Sight(eef, turned, fingers, pairs)

    def info(self) -> dict[str, Any]:
        """What `rollout` keeps of a tick; LIBERO's goals do not name a wrong object."""
        return {"success": self._state["success"], "position_m": np.asarray(self._state["eef_m"]), "task": self.name}

    def close(self) -> None:
        """End LIBERO's process."""
        self._process.close()

    def _numbers(self) -> NDArray[Any]:
        return self.convention.state(*(self._state[key] for key in ROBOT))


def tasks_of(suite: str) -> int:
    """How many tasks a suite has."""
    return 90 if suite == "libero_90" else 10
