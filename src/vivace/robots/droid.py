"""DROID: a Franka arm with a Robotiq gripper, one exterior and one wrist camera, 15 Hz.

Clients of DROID stations may also send the second exterior camera and the right eyes of the stereo cameras; the policies
were not trained on them.

Source: openpi policies/droid_policy.py, training/config.py, examples/droid.
"""

from __future__ import annotations

from dataclasses import replace

from ..types import Camera, Embodiment, PolicyKind, StatePart

UNUSED_CAMERAS = (
    "observation/exterior_image_2_left",
    "observation/exterior_image_1_right",
    "observation/exterior_image_2_right",
    "observation/wrist_image_right",
)


def embodiment(kind: PolicyKind) -> Embodiment:
    """Joint velocities, as in pi0_droid and pi05_droid; the same for both kinds."""
    return Embodiment(
        name="droid",
        cameras=(
            Camera("base_0_rgb", "observation/exterior_image_1_left"),
            Camera("left_wrist_0_rgb", "observation/wrist_image_left"),
        ),
        state=(
            StatePart("observation/joint_position", 7, "rad"),
            StatePart("observation/gripper_position", 1, "0 open .. 1 closed"),
        ),
        action_dim=8,
        ignored_keys=UNUSED_CAMERAS,
        control_hz=15.0,
        action_units=("joint velocity, normalised",) * 7 + ("0 open .. 1 closed",),
    )


def joint_position(kind: PolicyKind) -> Embodiment:
    """The configurations that predict joint positions, as differences to the current ones; the gripper is absolute."""
    return replace(
        embodiment(kind),
        name="droid_jointpos",
        delta_mask=(True,) * 7 + (False,),
        action_units=("rad",) * 7 + ("0 open .. 1 closed",),
    )
