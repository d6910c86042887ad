"""What happened in one episode, and the figures that are read off it: ages, seams, jerk, reaction.

Actions of the conveyor are velocities of the commanded hand, so a seam's `apart` and `step` are jumps of velocity and its
`ahead` a jump of position; another robot's units are what its actions are. The last action dim (the grip) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

HELD = -1
"""Observation age of a tick at which no chunk had an action."""


@dataclass(frozen=True)
class Seam:
    """A change from one chunk to the next, in action units.

    apart  distance of the new chunk's action to what the old chunk would have done at this tick; None where it had ended
    ahead  distance of the two plans' sums over the ticks that both cover, one execution horizon at most; None likewise
    step   distance of the executed action to the one before
    """

    tick: int
    apart: float | None
    step: float
    ahead: float | None = None


@dataclass(frozen=True)
class Episode:
    """What happened. Ticks count from 0 = the first action.

    looks         ticks at which the policy observed, and `delays` the ticks that each of its answers took
    inference_ms  wall time of each call of the policy on this machine; counts only under a real clock
    age_ticks     int [T], observation age at actuation of each executed action, HELD where the robot waited
    starved       ticks at which the chunk in use had run out (part of the held ones)
    actions       float [T, A] as executed
    positions_m   float [T, 3] of the hand after each tick (info "position_m")
    """

    seed: int
    success: bool
    wrong_object: bool
    control_hz: float
    looks: tuple[int, ...]
    delays: tuple[int, ...]
    age_ticks: NDArray[np.int64]
    starved: int
    seams: tuple[Seam, ...]
    actions: NDArray[Any]
    positions_m: NDArray[Any]
    info: Mapping[str, Any] = field(default_factory=dict)
    inference_ms: tuple[float, ...] = ()

    @property
    def time_to_success_s(self) -> float | None:
        """Seconds, None without success."""
        return len(self.actions) / self.control_hz if self.success else None

    def summary(self) -> dict[str, Any]:
        """Numbers for a result file, JSON types only; the same on every machine."""
        used = self.age_ticks[self.age_ticks != HELD] * (1000.0 / self.control_hz)
        switches = [seam.tick for seam in self.seams]
        steps = np.linalg.norm(np.diff(self.actions[:, :-1], axis=0), axis=1)
        hand = hand_velocity_jumps(self.positions_m, self.control_hz)
        return {
            "seed": self.seed,
            "success": self.success,
            "wrong_object": self.wrong_object,
            "ticks": len(self.actions),
            "time_to_success_s": self.time_to_success_s,
            "inferences": len(self.looks),
            "observation_age_ms": {"mean": mean(used), "p99": float(np.percentile(used, 99)) if used.size else None},
            "held_ticks": int((self.age_ticks == HELD).sum()),
            "starved_ticks": self.starved,
            "seams": len(self.seams),
            "seam_apart": mean([seam.apart for seam in self.seams if seam.apart is not None]),
            "seam_ahead": mean([seam.ahead for seam in self.seams if seam.ahead is not None]),
            "seam_step": mean([seam.step for seam in self.seams]),
            "step_inside_chunks": mean(_apart_from(steps, switches)),
            "hand_jump_at_seams_m_s": mean(hand[[tick - 1 for tick in switches if 0 < tick <= len(hand)]]),
            "hand_jump_inside_m_s": mean(_apart_from(hand, switches)),
            "rms_jerk_m_s3": rms_jerk(self.positions_m, self.control_hz),
            "info": {key: value for key, value in self.info.items() if isinstance(value, str | int | float | None)},
        }


def hand_velocity_jumps(positions_m: NDArray[Any], control_hz: float) -> NDArray[np.float64]:
    """Change of the hand's measured velocity at each tick, m/s [T - 2]; entry i belongs to the action of tick i + 1."""
    if len(positions_m) < 3:
        return np.zeros(0)
    jumps: NDArray[np.float64] = np.linalg.norm(np.diff(positions_m, n=2, axis=0), axis=1) * control_hz
    return jumps


def rms_jerk(positions_m: NDArray[Any], control_hz: float) -> float | None:
    """Root mean square of the third derivative of a path [T, 3], m/s^3; None for fewer than 4 points or an unknown path."""
    if len(positions_m) < 4 or not np.isfinite(positions_m).all():
        return None
    jerk = np.diff(positions_m, n=3, axis=0) * control_hz**3
    return float(np.sqrt((jerk**2).sum(axis=1).mean()))


def reaction_ticks(changed: Episode, twin: Episode, *, event_tick: int, threshold: float = 1e-6) -> int | None:
    """Ticks from an event to the first action that differs from the twin without the event; None if none does.

    Theory: (first look at or after the event) + its delay - event, see `expected_reaction_ticks`.
    """
    n = min(len(changed.actions), len(twin.actions))
    if event_tick >= n:
        return None
    apart = np.abs(changed.actions[event_tick:n] - twin.actions[event_tick:n]).max(axis=1) > threshold
    return int(apart.argmax()) if apart.any() else None


def expected_reaction_ticks(episode: Episode, *, event_tick: int) -> int | None:
    """Ticks from an event to the first action of a chunk that saw it; None if the episode ended before."""
    for look, delay in zip(episode.looks, episode.delays, strict=True):
        if look >= event_tick:
            return look + delay - event_tick
    return None


def mean(values: Any) -> float | None:
    """Mean, None of nothing or of what is not finite (a path that the simulator does not tell)."""
    average = float(np.mean(values)) if len(values) else np.nan
    return average if np.isfinite(average) else None


def _apart_from(steps: NDArray[Any], switches: list[int]) -> NDArray[Any]:
    return np.delete(steps, [tick - 1 for tick in switches if 0 < tick <= len(steps)])
