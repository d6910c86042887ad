"""What the two families of LIBERO policies expect around the simulator. Rates are comparable only if all of it fits.

    simulator                                        policy
    agentview, eye-in-hand  uint8, as OpenGL stores  -> both rotated by 180 degrees       -> base_0_rgb, left_wrist_0_rgb
    eef position m, eef quaternion xyzw, finger m    -> position, axis-angle, fingers [8] -> state
    controller action [7], gripper -1 open, 1 close  <- clipped by the controller itself  <- action [7]

OpenGL stores the bottom row first, so a rotation by 180 degrees makes an image upright and mirrored; that is what the data
was recorded with, and a policy shown upright unmirrored images fails. Sources: openpi examples/libero/main.py and
policies/libero_policy.py; LeRobot envs/libero.py, envs/configs.py, processor/env_processor.py (0.4.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, ObservationError, ShapeError

ACTION_DIM = 7
CONTROL_HZ = 20.0
CAMERAS = {"base_0_rgb": "agentview", "left_wrist_0_rgb": "robot0_eye_in_hand"}
"""View of the policy -> camera of the simulator."""
OPEN, CLOSE, HOLD = -1.0, 1.0, 0.0
"""Gripper commands of robosuite's controller, of which only the sign counts: the fingers move at one speed."""


@dataclass(frozen=True)
class Convention:
    """One family's evaluation protocol.

    image_px       cameras are rendered at image_px x image_px; the policy's own preprocessing makes 224 of it
    rotate         both images by 180 degrees
    state_dtype    of the 8 numbers
    gripper_sign   multiplies the policy's last action: 1 where the policy says -1 open, 1 close, as robosuite does
    settle_ticks   no-op ticks after an initial state is set, because objects start a little above the table
    max_ticks      {suite: control ticks, settling not counted}
    execute_ticks  actions of a chunk that are executed before the next look, unless the caller says otherwise
    env_seed       robosuite's own seed of initial state 0, the others follow. Initial states hold all that moves, but
                   fixtures (a stove, a cabinet) are placed by this seed. openpi seeds once a task, LeRobot at each reset
    """

    name: str
    image_px: int
    state_dtype: type[Any]
    max_ticks: Mapping[str, int]
    execute_ticks: int
    rotate: bool = True
    gripper_sign: float = 1.0
    settle_ticks: int = 10
    env_seed: int = 7

    @property
    def idle(self) -> NDArray[np.float64]:
        """The no-op: stay, gripper open."""
        return np.array([0.0] * (ACTION_DIM - 1) + [OPEN])

    def limit(self, suite: str) -> int:
        """Control ticks of an episode. Raises ConfigError for an unknown suite."""
        if suite not in self.max_ticks:
            raise ConfigError(f"unknown LIBERO suite {suite!r}", wanted=f"one of {sorted(self.max_ticks)}")
        return self.max_ticks[suite]

    def view(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A camera image [h, w, 3] as OpenGL stores it (bottom row first), as the policy wants it."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ShapeError("an image of LIBERO", got=f"{pixels.dtype} {pixels.shape}", wanted="uint8 [h, w, 3]")
        return np.ascontiguousarray(pixels[::-1, ::-1] if self.rotate else pixels)

    def state(self, eef_m: Any, eef_quat_xyzw: Any, fingers_m: Any) -> NDArray[Any]:
        """The state [8]: position m (3), axis-angle rad (3), finger positions m (2: one positive, one negative)."""
        parts = eef_m, axis_angle(eef_quat_xyzw, dtype=self.state_dtype), fingers_m
        state = np.concatenate([np.asarray(part, self.state_dtype).ravel() for part in parts])
        if state.shape != (8,) or not np.isfinite(state).all():
            raise ObservationError("the robot's state in LIBERO", got=state.tolist(), wanted="8 finite numbers")
        return state

    def command(self, action: NDArray[Any]) -> NDArray[np.float64]:
        """What the controller gets for one action [7] of the policy. Not clipped: the controller does that."""
        command = np.array(action, np.float64)
        if command.shape != (ACTION_DIM,):
            raise ShapeError("an action for LIBERO", got=f"shape {command.shape}", wanted=f"[{ACTION_DIM}]")
        command[-1] *= self.gripper_sign
        return command


def axis_angle(quat_xyzw: Any, *, dtype: type[Any] = np.float64) -> NDArray[Any]:
    """Rotation vector rad [3] of a unit quaternion, angle in [0, 2 pi].

    Not the shortest one: a negative w gives an angle above pi, as in both families' training data. Zero where the axis
    cannot be told. Source: the formula of robosuite utils/transform_utils.py quat2axisangle.
    """
    quat = np.asarray(quat_xyzw, dtype)
    w = float(np.clip(quat[3], -1.0, 1.0))
    sine = math.sqrt(max(0.0, 1.0 - w * w))
    if sine < 1e-8:
        return np.zeros(3, dtype)
    rotation: NDArray[Any] = (quat[:3] * (2.0 * math.acos(w) / sine)).astype(dtype)
    return rotation


OPENPI = Convention(
    name="openpi",
    image_px=256,
    state_dtype=np.float64,
    max_ticks={
        "libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
    },
    execute_ticks=5,
)  # fmt: skip
LEROBOT = Convention(
    name="lerobot",
    image_px=360,
    state_dtype=np.float32,
    max_ticks={
        "libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400,
    },
    execute_ticks=10,
)  # fmt: skip
CONVENTIONS: dict[str, Convention] = {one.name: one for one in (OPENPI, LEROBOT)}
SUITES = tuple(OPENPI.max_ticks)


def convention(name: str) -> Convention:
    """A convention by name. Raises ConfigError for an unknown one."""
    if name not in CONVENTIONS:
        raise ConfigError(f"unknown convention {name!r}", wanted=f"one of {sorted(CONVENTIONS)}")
    return CONVENTIONS[name]
