"""One episode in simulated time: the world goes on while the policy computes.

Nothing sleeps. A delay is a number of control ticks between an observation and the first action that used it; during those
ticks the simulator steps. What the robot does meanwhile is the execution mode (docs/guides/simulation.md has a drawing):

    pause    it stands still, then runs `execute_ticks` actions of the new chunk, from its first
    naive    it goes on with the old chunk, then runs the new chunk from its first action, `delay` ticks late
    aligned  it goes on with the old chunk, then enters the new chunk at the action that belongs to the present tick

A new observation is taken `execute_ticks` after the last one, but not before that one's chunk has arrived (pause: after the
chunk was run). Equal seeds give equal episodes, whatever machine computes them. Definitions: Black et al., Real-Time
Execution of Action Chunking Flow Policies, NeurIPS 2025 (inference delay in control ticks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ShapeError
from ..types import Observation

Mode = Literal["pause", "naive", "aligned"]
MODES: tuple[Mode, ...] = ("pause", "naive", "aligned")
HELD = -1
"""Observation age of a tick at which no chunk had an action."""


class Chunk(Protocol):
    """What a policy answers; `types.ActionChunk` is one. actions: float [H, A], robot units."""

    @property
    def actions(self) -> NDArray[Any]:
        """Float [H, A]."""


Policy = Callable[[Observation], Chunk]


class Simulator(Protocol):
    """What a rollout needs of an environment; `ConveyorEnv` is one. `info` of `step` may carry success, position_m, ..."""

    control_hz: float

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""

    def step(self, action: NDArray[Any]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Advance one control tick."""

    def look(self) -> Observation:
        """Render and return what a policy sees."""

    def feel(self) -> Observation:
        """The same without images."""

    def hold(self, last: NDArray[Any] | None) -> NDArray[Any]:
        """The action of a robot that waits."""


@dataclass(frozen=True)
class Execution:
    """How chunks become actions.

    mode           see the module
    execute_ticks  execution horizon s
    delay_ticks    inference delay d: one number, or several from which each inference draws one (a measured latency file)
    """

    mode: Mode = "aligned"
    execute_ticks: int = 8
    delay_ticks: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError("execution mode", got=self.mode, wanted=f"one of {MODES}")
        if self.execute_ticks < 1:
            raise ConfigError("execute_ticks", got=self.execute_ticks, wanted="at least 1")
        if not self.delays or min(self.delays) < 0:
            raise ConfigError("delay_ticks", got=self.delay_ticks, wanted="numbers of at least 0")

    @property
    def delays(self) -> tuple[int, ...]:
        """The delays to draw from."""
        return (self.delay_ticks,) if isinstance(self.delay_ticks, int) else tuple(self.delay_ticks)


def ticks(milliseconds: Sequence[float], control_hz: float) -> tuple[int, ...]:
    """Latencies as delays: an action is usable at the first tick after it is ready, so every one is rounded up."""
    return tuple(math.ceil(ms * control_hz / 1000.0 - 1e-9) for ms in milliseconds)


@dataclass(frozen=True)
class Seam:
    """A change from one chunk to the next.

    apart  distance of the new chunk's action to what the old chunk would have done at this tick; None where it had ended
    step   distance of the executed action to the one before
    Both in action units, over all action dims but the last (the grip).
    """

    tick: int
    apart: float | None
    step: float


@dataclass(frozen=True)
class Episode:
    """What happened. Ticks count from 0 = the first action.

    looks        ticks at which the policy observed, and `delays` the ticks that each of its answers took
    age_ticks    int [T], observation age at actuation of each executed action, HELD where the robot waited
    starved      ticks at which the chunk in use had run out (part of the held ones)
    actions      float [T, A] as executed          positions_m  float [T, 3] of the hand after each tick (info "position_m")
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

    @property
    def time_to_success_s(self) -> float | None:
        """Seconds, None without success."""
        return len(self.actions) / self.control_hz if self.success else None

    def summary(self) -> dict[str, Any]:
        """Numbers for a result file, JSON types only."""
        used = self.age_ticks[self.age_ticks != HELD] * (1000.0 / self.control_hz)
        inside = np.linalg.norm(np.diff(self.actions[:, :-1], axis=0), axis=1)
        inside = np.delete(inside, [seam.tick - 1 for seam in self.seams if 0 < seam.tick <= len(inside)])
        apart = [seam.apart for seam in self.seams if seam.apart is not None]
        return {
            "seed": self.seed,
            "success": self.success,
            "wrong_object": self.wrong_object,
            "ticks": len(self.actions),
            "time_to_success_s": self.time_to_success_s,
            "inferences": len(self.looks),
            "observation_age_ms": {"mean": _mean(used), "p99": float(np.percentile(used, 99)) if used.size else None},
            "held_ticks": int((self.age_ticks == HELD).sum()),
            "starved_ticks": self.starved,
            "seam_apart": _mean(apart),
            "seam_step": _mean([seam.step for seam in self.seams]),
            "step_inside_chunks": _mean(inside),
            "rms_jerk_m_s3": rms_jerk(self.positions_m, self.control_hz),
            "info": {key: value for key, value in self.info.items() if isinstance(value, str | int | float | None)},
        }


def rollout(
    env: Simulator,
    policy: Policy,
    *,
    seed: int,
    execution: Execution | None = None,
    images: bool = True,
    options: dict[str, Any] | None = None,
) -> Episode:
    """Run one episode to its end.

    Args:
        policy: called at each look, with the observation of that tick; its answer is used `delay` ticks later.
        images: False for policies that use none (experts); nothing is rendered then.
        options: given to `env.reset`.
    Raises: ShapeError if a chunk has no action; what the policy raises passes through.
    """
    execution = execution or Execution()
    env.reset(seed=seed, options=options)
    player = _Player(execution, np.random.default_rng([seed, 20]))
    actions: list[NDArray[Any]] = []
    positions: list[Any] = []
    info: dict[str, Any] = {}
    ended = False
    while not ended:
        player.advance(len(actions), policy, env.look if images else env.feel)
        planned = player.action(len(actions))
        action = env.hold(actions[-1] if actions else None) if planned is None else planned
        player.record(len(actions), action, actions[-1] if actions else None)
        _, _, terminated, truncated, info = env.step(action)
        actions.append(np.asarray(action))
        positions.append(info.get("position_m", np.full(3, np.nan)))
        ended = terminated or truncated
    return Episode(
        seed=seed,
        success=bool(info.get("success", False)),
        wrong_object=bool(info.get("wrong_object", False)),
        control_hz=env.control_hz,
        looks=tuple(player.looks),
        delays=tuple(player.delays),
        age_ticks=np.array(player.ages, np.int64),
        starved=player.starved,
        seams=tuple(player.seams),
        actions=np.stack(actions),
        positions_m=np.stack(positions),
        info=info,
    )


@dataclass(frozen=True)
class _Running:
    """A chunk with the tick of its observation, and the tick at which its action 0 is due."""

    actions: NDArray[Any]
    seen: int
    origin: int

    def at(self, tick: int) -> NDArray[Any] | None:
        index = tick - self.origin
        return self.actions[index] if index < len(self.actions) else None


class _Player:
    """Which chunk is in use at which tick. Bookkeeping of one episode."""

    def __init__(self, execution: Execution, rng: np.random.Generator) -> None:
        self._execution, self._rng = execution, rng
        self._now: _Running | None = None
        self._coming: tuple[int, _Running] | None = None
        self._next_look = 0
        self._before: _Running | None = None
        self._switched = False
        self.looks: list[int] = []
        self.delays: list[int] = []
        self.ages: list[int] = []
        self.seams: list[Seam] = []
        self.starved = 0

    def advance(self, tick: int, policy: Policy, see: Callable[[], Observation]) -> None:
        """Take over a chunk that is ready; look if it is time. In this order, and once more for a delay of 0."""
        self._switched = False
        self._take(tick)
        if self._coming is None and tick >= self._next_look:
            self._look(tick, policy(see()))
            self._take(tick)

    def _look(self, tick: int, chunk: Chunk) -> None:
        actions = np.asarray(chunk.actions)
        if actions.ndim != 2 or not len(actions):
            raise ShapeError("actions of a chunk", got=f"shape {actions.shape}", wanted="[H, A] with H at least 1")
        delay = int(self._rng.choice(self._execution.delays))
        ready, wait = tick + delay, self._execution.execute_ticks
        self._coming = ready, _Running(actions, seen=tick, origin=tick if self._execution.mode == "aligned" else ready)
        self._next_look = ready + wait if self._execution.mode == "pause" else tick + max(wait, delay)
        if self._execution.mode == "pause":
            self._before, self._now = self._now, None
        self.looks.append(tick)
        self.delays.append(delay)

    def _take(self, tick: int) -> None:
        if self._coming is not None and tick >= self._coming[0]:
            if self._now is not None:
                self._before = self._now
            self._now, self._coming, self._switched = self._coming[1], None, True

    def action(self, tick: int) -> NDArray[Any] | None:
        """The chunk's action for this tick, None where the robot has to wait."""
        planned = None if self._now is None else self._now.at(tick)
        self.starved += self._now is not None and planned is None
        self.ages.append(HELD if self._now is None or planned is None else tick - self._now.seen)
        return planned

    def record(self, tick: int, action: NDArray[Any], last: NDArray[Any] | None) -> None:
        """Note a seam, if the chunk has just changed."""
        if not self._switched or self._before is None or last is None:
            return
        old = self._before.at(tick)
        apart = None if old is None else float(np.linalg.norm((action - old)[:-1]))
        self.seams.append(Seam(tick, apart, float(np.linalg.norm((action - last)[:-1]))))


def blanked(policy: Policy) -> Policy:
    """Control: the same policy with black images. A campaign in which it succeeds does not test seeing."""

    def blind(observation: Observation) -> Chunk:
        return policy(
            replace(observation, views={name: np.zeros_like(view) for name, view in observation.views.items()})
        )

    return blind


# --- figures ------------------------------------------------------------------------------------------------------------


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
    apart = np.abs(changed.actions[event_tick:n] - twin.actions[event_tick:n]).max(axis=1) > threshold
    return int(apart.argmax()) if apart.any() else None


def expected_reaction_ticks(episode: Episode, *, event_tick: int) -> int | None:
    """Ticks from an event to the first action of a chunk that saw it; None if the episode ended before."""
    for look, delay in zip(episode.looks, episode.delays, strict=True):
        if look >= event_tick:
            return look + delay - event_tick
    return None


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None
