"""LIBERO: a simulated Franka arm, two cameras; actions are end-effector differences by themselves.

Source: openpi policies/libero_policy.py and training/config.py (pi0_libero, pi05_libero).
"""

from __future__ import annotations

from ..types import Camera, Embodiment, PolicyKind, StatePart


def embodiment(kind: PolicyKind) -> Embodiment:
    """pi0_libero was trained on differences of its (already relative) actions; pi05_libero was not, and uses no state."""
    return Embodiment(
        name="libero",
        cameras=(
            Camera("base_0_rgb", "observation/image"),
            Camera("left_wrist_0_rgb", "observation/wrist_image"),
        ),
        state=(StatePart("observation/state", 8, "position m (3), axis-angle rad (3), gripper fingers m (2)"),),
        action_dim=7,
        delta_mask=(True,) * 6 + (False,) if kind == "pi0" else (),
        state_in_prompt=kind != "pi05",
        control_hz=20.0,
        action_units=("controller units",) * 6 + ("-1 open .. 1 closed",),
    )
