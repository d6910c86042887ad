"""The simulated conveyor (vivace.sim): a Sawyer arm over a moving belt, 50 Hz.

Three views: front camera, wrist camera, and the front camera 100 ms ago in the slot of the second wrist, because one frame
does not show how fast the belt runs. Actions are velocities of the commanded hand position, so nothing is a difference.
"""

from __future__ import annotations

from ..types import Camera, Embodiment, PolicyKind, StatePart


def embodiment(kind: PolicyKind) -> Embodiment:
    """The same for both kinds."""
    return Embodiment(
        name="conveyor",
        cameras=(
            Camera("base_0_rgb", "observation/image"),
            Camera("left_wrist_0_rgb", "observation/wrist_image"),
            Camera("right_wrist_0_rgb", "observation/image_before"),
        ),
        state=(StatePart("observation/state", 7, "hand m (3), finger gap m, command minus hand m (3)"),),
        action_dim=4,
        control_hz=50.0,
        action_units=("0.5 m/s",) * 3 + ("-1 open .. 1 closed",),
    )
