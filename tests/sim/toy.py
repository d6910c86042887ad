"""A point on a line, and policies whose actions say which tick they were meant for: delay arithmetic without physics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vivace.types import Observation

HZ = 50.0


@dataclass(frozen=True)
class Chunk:
    actions: np.ndarray


class Line:
    """State [tick, target]; the target changes from 0 to 1 at `event_tick`."""

    control_hz = HZ

    def __init__(self, length=60, event_tick=10**9):
        self.length, self.planned_event = length, event_tick
        self.looked = 0

    def reset(self, *, seed=None, options=None):
        self.tick, self.x = 0, 0.0
        self.event_tick = self.planned_event if (options or {}).get("event", True) else 10**9
        return {}, {}

    def step(self, action):
        self.tick += 1
        self.x += float(action[0]) / HZ
        info = {"position_m": np.array([self.x, 0.0, 0.0])}
        return {}, 0.0, False, self.tick >= self.length, info

    def feel(self):
        state = np.array([self.tick, float(self.tick >= self.event_tick)])
        return Observation(views={}, state=state, t_obs=self.tick / HZ)

    def look(self):
        self.looked += 1
        view = np.full((4, 4, 3), 200, np.uint8)
        return Observation(views={"base": view}, state=self.feel().state, t_obs=self.tick / HZ)

    def hold(self, last):
        return np.array([-1000.0, 0.0])


def clock(horizon):
    """Action i of a chunk observed at tick t is t + i: the tick it was planned for."""
    return lambda seen: Chunk(np.stack([seen.state[0] + np.arange(horizon), np.zeros(horizon)], axis=1))


def follow(horizon):
    """Every action is the target as observed."""
    return lambda seen: Chunk(np.tile([seen.state[1], 0.0], (horizon, 1)))
