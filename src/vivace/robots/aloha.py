"""ALOHA: two ViperX arms, three cameras as [3, h, w], 50 Hz; pi's training data used another arm's signs and gripper angle.

On the way in the state's signs are flipped and each gripper's linear reading becomes the angle of pi's robot, in [0, 1]; on
the way out the signs are flipped back and the angle is scaled to ALOHA's joint range.

Source: openpi policies/aloha_policy.py (adapt_to_pi) and training/config.py (pi0_aloha*).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Camera, Embodiment, PolicyKind, StatePart

ARM_SIGNS = (1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0)
ARM_DELTAS = (True,) * 6 + (False,)
GRIPPER_CLOSED_M, GRIPPER_OPEN_M = 0.01844, 0.05800
"""Finger position behind ALOHA's normalised gripper reading 0 and 1."""
HORN_M, ROD_M = 0.022, 0.036
"""Interbotix gripper linkage: servo horn and connecting rod."""
PI_GRIPPER_RAD = (0.5476, 1.6296)
"""Gripper angle in pi's training data that became 0 and 1."""
ALOHA_GRIPPER_RAD = (-0.6213, 1.4910)
"""Joint range that ALOHA scales gripper commands by."""


def embodiment(kind: PolicyKind) -> Embodiment:
    """The real robot: joints are predicted as differences, grippers absolute. Only `cam_high` is required."""
    return Embodiment(
        name="aloha",
        cameras=(
            Camera("base_0_rgb", "images/cam_high", chw=True),
            Camera("left_wrist_0_rgb", "images/cam_left_wrist", required=False, chw=True),
            Camera("right_wrist_0_rgb", "images/cam_right_wrist", required=False, chw=True),
        ),
        state=(StatePart("state", 14, "rad (6), gripper 0 closed .. 1 open; left arm, then right"),),
        action_dim=14,
        delta_mask=ARM_DELTAS * 2,
        joint_signs=ARM_SIGNS * 2,
        gripper_dims=(6, 13),
        gripper_adapter="aloha",
        ignored_keys=("images/cam_low",),
        control_hz=50.0,
        action_units=(("rad",) * 6 + ("gripper joint, normalised",)) * 2,
        metadata={"reset_pose": [0, -1.5, 1.5, 0, 0, 0]},
    )


def simulated(kind: PolicyKind) -> Embodiment:
    """pi0_aloha_sim: the same robot in MuJoCo, trained on absolute actions."""
    return replace(embodiment(kind), name="aloha_sim", delta_mask=(), default_prompt="Transfer cube")


def gripper_to_angle(reading: NDArray[Any]) -> NDArray[Any]:
    """ALOHA's normalised finger position to pi's normalised gripper angle, through the linkage's law of cosines."""
    metres = reading * (GRIPPER_OPEN_M - GRIPPER_CLOSED_M) + GRIPPER_CLOSED_M
    sine = (HORN_M**2 + metres**2 - ROD_M**2) / (2 * HORN_M * metres)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    scaled: NDArray[Any] = (angle - PI_GRIPPER_RAD[0]) / (PI_GRIPPER_RAD[1] - PI_GRIPPER_RAD[0])
    return scaled


def gripper_from_angle(action: NDArray[Any]) -> NDArray[Any]:
    """pi's gripper action to ALOHA's normalised joint command; not scaled by pi's own range, as it was trained."""
    low, high = ALOHA_GRIPPER_RAD
    scaled: NDArray[Any] = (action + PI_GRIPPER_RAD[0] - low) / (high - low)
    return scaled
