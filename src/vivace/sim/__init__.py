"""Closed loop in simulation: does an optimised policy still pick up the cube? Needs the extra `sim` (mujoco, gymnasium).

tasks     what differs between the named tasks, as data
scene     the MuJoCo model, its version and hash
render    images without a screen
conveyor  the environment (Gymnasium)
expert    the scripted expert: one action, or a whole chunk, from the true state
rollout   one episode in simulated time: the world goes on while the policy computes
"""

from __future__ import annotations

import importlib.util

from ..errors import Unsupported

for _package in ("mujoco", "gymnasium"):
    if importlib.util.find_spec(_package) is None:
        raise Unsupported(f"vivace.sim needs {_package}, which is not installed", do="pip install 'vivace[sim]'")

from .registration import register  # noqa: E402  the check above comes first

register()
