"""A scripted pick and place that sees the true state: the control that actions, states and goals are wired right.

For tasks whose goal names a thing and a container, as all ten of libero_object do. The hand keeps its orientation, so the
fingers close along y; every stage is a straight move that is corrected at each tick:

    over the thing -> down around it -> close -> up -> over the container -> down -> open
         ^                                       |
         +------- the thing is not in the hand --+

A plan is a Python generator: it yields an action and is sent the next sight, so the stage is the place in the code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import Unsupported
from .conventions import ACTION_DIM, CLOSE, OPEN
from .environment import Sight

Vector = NDArray[np.float64]
Plan = Generator[Vector, Sight, Sight]

GAIN = 10.0
"""Action per metre of error. The controller moves its goal by 0.05 m a tick at action 1, and follows with a lag."""
OVER_M, CARRY_M, DROP_M = 0.15, 0.25, 0.15
"""Heights: over the thing before the descent; then of the hand above the table while carrying, and when it lets go."""
BESIDE_M, DEEP_M = 0.01, 0.003
"""How near the hand has to be: sideways before it goes down, and in height before it closes. Flat boxes are 18 mm high."""
IN_HAND_M = 0.06
"""A thing farther from the hand than this was lost."""
ASIDE_M = (0.0, -0.022, 0.022)
"""Where along x the thing is taken, try after try: in the middle, or aside where the palm landed on a neighbour."""
RELIEF_M = 0.008
"""A hand that was stopped higher than this above the middle goes up by as much before it closes."""
STALL_M, STALL_TICKS = 0.002, 6
"""A move that gains less than this in so many ticks is blocked: the palm lies on a tall thing, which is well, or on a
neighbour, which the next try avoids."""


@dataclass(frozen=True)
class ExpertChunk:
    """One action: the expert looks at every tick. actions [1, 7]."""

    actions: Vector


class Expert:
    """One episode's expert. `act` is called once a control tick, with the state of that tick."""

    def __init__(self) -> None:
        self._plan: Plan | None = None

    def act(self, sight: Sight) -> Vector:
        """The action [7] for this tick. Raises Unsupported for a task that is not thing-into-container."""
        if self._plan is None:
            self._plan = pick_and_place(sight)
            return next(self._plan)
        return self._plan.send(sight)


def pick_and_place(sight: Sight) -> Plan:
    """The whole task. Never ends: after the release the hand stays above the container."""
    if len(sight.objects) != 2:
        raise Unsupported(
            "the scripted expert of LIBERO", got=f"a goal about {list(sight.objects)}",
            wanted="a thing and a container", do="use --suite libero_object, or a policy",
        )  # fmt: skip
    thing, container = sight.objects
    table_m, place = _floor(sight, thing), sight.objects[container][0].copy()
    tries = itertools.cycle(ASIDE_M)
    while True:
        sight = yield from _grasp(sight, thing, next(tries))
        sight = yield from _move(sight, lambda s: _at(s.eef_m, table_m + CARRY_M), CLOSE, near=(np.inf, 0.03))
        if np.linalg.norm(sight.objects[thing][0] - sight.eef_m) > IN_HAND_M:
            continue
        sight = yield from _move(sight, lambda s: _at(place, table_m + CARRY_M), CLOSE, near=(0.02, np.inf))
        sight = yield from _move(sight, lambda s: _at(place, table_m + DROP_M), CLOSE, near=(np.inf, 0.02))
        sight = yield from _stay(sight, OPEN, ticks=15)


def _grasp(sight: Sight, thing: str, aside_m: float) -> Plan:
    """Over the thing, down around it, close."""

    aside, over = np.array([aside_m, 0.0, 0.0]), np.array([0.0, 0.0, OVER_M])

    def there(seen: Sight) -> Vector:
        where: Vector = seen.objects[thing][0] + aside
        return where

    sight = yield from _move(sight, lambda s: there(s) + over, OPEN, near=(BESIDE_M, 0.05))
    sight = yield from _move(sight, there, OPEN, near=(BESIDE_M, DEEP_M))
    if (
        sight.eef_m[2] - there(sight)[2] > RELIEF_M
    ):  # pressing has pushed the hand aside: off, and over the middle again
        height_m = float(sight.eef_m[2]) + RELIEF_M
        sight = yield from _move(sight, lambda s: _at(there(s), height_m), OPEN, near=(BESIDE_M / 2, np.inf))
    return (yield from _stay(sight, CLOSE, ticks=10))


def _move(sight: Sight, goal: Callable[[Sight], Vector], grip: float, *, near: tuple[float, float]) -> Plan:
    """Go towards a place that may itself move, until near it (sideways m, in height m) or blocked."""
    best, idle = np.inf, 0
    while idle < STALL_TICKS:
        error = goal(sight) - sight.eef_m
        if np.hypot(*error[:2]) < near[0] and abs(error[2]) < near[1]:
            break
        gained = float(np.linalg.norm(error)) < best - STALL_M
        best, idle = (float(np.linalg.norm(error)), 0) if gained else (best, idle + 1)
        sight = yield _action(error, grip)
    return sight


def _stay(sight: Sight, grip: float, *, ticks: int) -> Plan:
    """Only the fingers move."""
    for _ in range(ticks):
        sight = yield _action(np.zeros(3), grip)
    return sight


def _action(error_m: Vector, grip: float) -> Vector:
    action = np.zeros(ACTION_DIM)
    action[:3] = np.clip(GAIN * error_m, -1.0, 1.0)
    action[-1] = grip
    return action


def _at(where: Vector, height_m: float) -> Vector:
    """The same place at another height."""
    return np.array([where[0], where[1], height_m])


def _floor(sight: Sight, thing: str) -> float:
    """About where the table is: things stand 1 to 6 cm above it with their centres."""
    return float(sight.objects[thing][0][2]) - 0.03
