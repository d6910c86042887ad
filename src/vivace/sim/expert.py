"""The scripted expert: from the true state to one action, without memory.

Which stage of the work it is in is read off the scene (finger gap, height over the target, post still ahead), so the same
function labels a state that some other policy got into (DAgger), recovers from disturbances, and can be rolled forward
on a prediction to give a whole chunk. Memory would have to be rolled forward too.

Stages: go round the post, hover over the target, descend, close, lift; for the well: carry, lower, release, rise.
Every stage servoes to a point with gain KP and adds the belt's velocity while the target rides on the belt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..types import Observation
from .scene import BELT_Y_M, CONTROL_HZ, CUBE_HALF_M, REST_Z_M
from .world import COMMAND_M, Sight, Vector

KP = 10.0
"""Action per metre of error: 0.1 m and more is full speed."""
HOVER_M, GRASP_M = 0.12, 0.045
"""Height of the hand over the target's centre while approaching and while grasping."""
OPEN, CLOSE = -1.0, 1.0
GRIP_M = (0.030, 2 * CUBE_HALF_M + 0.0105)
"""Gap between pad centres (pads are 6 mm thick) that means a cube between them; 0.012 when closed on nothing."""
PASS_M, PASS_Y_M = 0.105, 0.60
UNDECIDED_M = 0.03
"""Up to here beside the middle of the post both ways round it are open to a demonstrator who has one in mind."""
CARRY_Z_M = 0.12

FOLLOW = 0.35
"""Share of the distance to its command that the hand covers in a tick (measured: 0.2 from rest, 0.37 in motion)."""
FINGERS_M = 0.0075
"""Change of the gap in a tick while opening or closing, mean over a stroke."""


def act(sight: Sight) -> NDArray[np.float32]:
    """The expert's action [4] for a state, see `ConveyorEnv.step`."""
    if sight.post_m is not None and sight.hand_m[1] < PASS_Y_M - 0.01:
        return _servo(sight, _round_the_post(sight), OPEN, speed_m_s=0.0)
    if sight.well_m is not None and (placing := _place(sight)) is not None:
        return placing
    return _pick(sight)


def lead(sight: Sight, seconds: float) -> Sight:
    """An old sight with the target moved on: what knowing one's own delay buys.

    On the belt it moves with the belt. Lifted, with the fingers around something, it is taken to be in the hand.
    """
    if _on_belt(sight):
        return replace(sight, target_m=np.add(sight.target_m, [sight.belt_m_s * seconds, 0.0, 0.0]))
    if sight.belt_m_s and _gripping(sight):
        return replace(sight, target_m=sight.hand_m - [0.0, 0.0, GRASP_M])
    return sight


def chunk(sight: Sight, horizon: int) -> NDArray[np.float32]:
    """The next `horizon` actions [horizon, 4] if the world does what `predict` says."""
    actions = np.empty((horizon, 4), np.float32)
    for i in range(horizon):
        actions[i] = act(sight)
        sight = predict(sight, actions[i])
    return actions


def predict(sight: Sight, action: NDArray[np.floating]) -> Sight:
    """The state one tick later by a plain model: the hand follows its command, fingers move at constant speed."""
    command = sight.hand_m + sight.offset_m + np.clip(action[:3], -1.0, 1.0) * COMMAND_M
    hand = sight.hand_m + FOLLOW * (command - sight.hand_m)
    if _held(sight) and action[3] > 0:
        target = sight.target_m + hand - sight.hand_m
    else:
        target = np.add(sight.target_m, [sight.belt_m_s / CONTROL_HZ * _on_belt(sight), 0.0, 0.0])
    around = np.hypot(*(target - hand)[:2]) < 0.03 and -0.02 < (hand - target)[2] < GRASP_M + 0.02
    closed = 0.040 if around else 0.012
    gap = float(np.clip(sight.gap_m - np.sign(action[3]) * FINGERS_M, min(closed, sight.gap_m), 0.094))
    return replace(sight, tick=sight.tick + 1, hand_m=hand, offset_m=command - hand, target_m=target, gap_m=gap)


@dataclass
class ExpertPolicy:
    """The expert as a chunk policy: looks at the simulator's true state at the moment of the observation.

    see      gives the true state (`ConveyorEnv.sight`)
    horizon  actions per chunk
    """

    see: Callable[[], Sight]
    horizon: int = 16

    def __call__(self, observation: Observation) -> ExpertChunk:
        """A chunk for the present state; the observation itself is not used."""
        return ExpertChunk(chunk(self.see(), self.horizon))


@dataclass(frozen=True)
class ExpertChunk:
    """actions: float32 [horizon, 4]."""

    actions: NDArray[np.float32]


def _pick(sight: Sight) -> NDArray[np.float32]:
    delta = sight.target_m - sight.hand_m
    across, above = float(np.hypot(delta[0], delta[1])), -float(delta[2])
    belt = sight.belt_m_s if _on_belt(sight) else 0.0
    if _held(sight):
        return np.array([belt / (CONTROL_HZ * COMMAND_M), 0.0, 0.5, CLOSE], np.float32)
    if above < GRASP_M + 0.010 and across < 0.02:
        return _servo(sight, np.add(sight.target_m, [0.0, 0.0, GRASP_M]), CLOSE, speed_m_s=belt)
    near = 0.012 if above > HOVER_M - 0.02 else 0.030  # stricter before the descent than during it
    height = GRASP_M if across < near else HOVER_M
    return _servo(sight, np.add(sight.target_m, [0.0, 0.0, height]), OPEN, speed_m_s=belt)


def _round_the_post(sight: Sight) -> Vector:
    """Sideways first, then past the post, on the side on which the hand is; right before the post on the one in mind."""
    assert sight.post_m is not None
    beside = float(sight.hand_m[0] - sight.post_m[0])
    side = 1.0 if beside >= 0.0 else -1.0
    if sight.way is not None and abs(beside) < UNDECIDED_M:
        side = sight.way
    x = sight.post_m[0] + PASS_M * side
    clear = abs(beside) > PASS_M - 0.02
    return np.array([x, PASS_Y_M if clear else min(sight.hand_m[1], 0.44), REST_Z_M + HOVER_M])


def _place(sight: Sight) -> NDArray[np.float32] | None:
    """The second half of `precise`; None while the cube still has to be picked up."""
    assert sight.well_m is not None
    cube, well = sight.target_m, sight.well_m
    error = well[:2] - cube[:2]
    across = float(np.hypot(*error))
    if across < 0.005 and cube[2] < CUBE_HALF_M + 0.004:  # it is in: let go, then rise
        return np.array([0.0, 0.0, 0.5 if sight.gap_m > 2 * CUBE_HALF_M + 0.03 else 0.0, OPEN], np.float32)
    if not _held(sight):
        return None
    if cube[2] < CARRY_Z_M - 0.03 and across > 0.02:
        return _servo(sight, np.add(sight.hand_m, [0.0, 0.0, 0.05]), CLOSE, speed_m_s=0.0)
    height = CUBE_HALF_M - 0.004 if across < (0.002 if cube[2] > 0.05 else 0.006) else max(CARRY_Z_M, cube[2])
    if across < 0.02 and height > cube[2]:
        height = cube[2]  # fine alignment at the height where it is
    hand = np.add(sight.hand_m, [*error, np.clip(height - cube[2], -0.04, 0.04)])
    return _servo(sight, hand, CLOSE, speed_m_s=0.0)


def _servo(sight: Sight, goal_m: Vector, grip: float, *, speed_m_s: float) -> NDArray[np.float32]:
    action = (goal_m - sight.hand_m) * KP
    action[0] += speed_m_s / (CONTROL_HZ * COMMAND_M)
    return np.array([*np.clip(action, -1.0, 1.0), grip], np.float32)


def _held(sight: Sight) -> bool:
    """Fingers stopped at a cube's width, and the target is roughly there.

    Roughly: while the hand rises, the target of an old sight lags behind it. A tight test here makes any delay above 60 ms
    look fatal at every belt speed, which is the expert's fault and not the delay's.
    """
    delta = sight.target_m - sight.hand_m
    across, above = np.hypot(delta[0], delta[1]), -delta[2]
    return bool(_gripping(sight) and across < 0.055 and 0.0 < above < GRASP_M + 0.12)


def _gripping(sight: Sight) -> bool:
    return GRIP_M[0] < sight.gap_m < GRIP_M[1]


def _on_belt(sight: Sight) -> bool:
    return bool(sight.target_m[2] < REST_Z_M + 0.005 and abs(sight.target_m[1] - BELT_Y_M) < 0.07)
