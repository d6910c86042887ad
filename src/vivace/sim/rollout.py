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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, NumericsError, ShapeError
from ..types import Observation
from .episode import HELD, Episode, Seam

Mode = Literal["pause", "naive", "aligned"]
MODES: tuple[Mode, ...] = ("pause", "naive", "aligned")


class Chunk(Protocol):
    """What a policy answers; `types.ActionChunk` is one. actions: float [H, A], robot units."""

    @property
    def actions(self) -> NDArray[Any]:
        """Float [H, A]."""


Policy = Callable[[Observation], Chunk]


@dataclass(frozen=True)
class Committed:
    """What the robot will do while the policy computes: actions start .. start + ticks of the chunk in execution."""

    chunk: Chunk
    start: int
    ticks: int

    @property
    def actions(self) -> NDArray[Any]:
        """Float [ticks, A], the first is that of the tick of the observation."""
        return np.asarray(self.chunk.actions)[self.start : self.start + self.ticks]


Continuing = Callable[[Observation, Committed], Chunk]
"""A policy that is told the committed actions; its chunk begins with them."""


@dataclass(frozen=True)
class Moment:
    """One control tick, for whoever watches an episode (video, logs).

    age_ticks  observation age of the action, HELD where the robot waits
    chunk      how many chunks have been entered        index  of the action in the chunk in use, None where it waits
    """

    tick: int
    action: NDArray[Any]
    age_ticks: int
    chunk: int
    index: int | None


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
    measured       the wall time of each inference on this machine is added to its delay: the real clock
    """

    mode: Mode = "aligned"
    execute_ticks: int = 8
    delay_ticks: int | tuple[int, ...] = 0
    measured: bool = False

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


def rollout(
    env: Simulator,
    policy: Policy,
    *,
    seed: int,
    execution: Execution | None = None,
    continuing: Continuing | None = None,
    images: bool = True,
    options: dict[str, Any] | None = None,
    watch: Callable[[Moment], None] | None = None,
) -> Episode:
    """Run one episode to its end.

    Args:
        policy: called at each look, with the observation of that tick; its answer is used `delay` ticks later.
        continuing: answers in the policy's place where the robot will execute known actions of its chunk meanwhile
            (mode aligned only). Under a measured clock the delay is not known beforehand: the last one stands for it.
        images: False for policies that use none (experts); nothing is rendered then.
        options: given to `env.reset`.
        watch: called once a tick, before the world moves.
    Raises: ShapeError if a chunk has no action, NumericsError if one is not finite; what the policy raises passes through.
    """
    execution = execution or Execution()
    env.reset(seed=seed, options=options)
    player = _Player(execution, policy, continuing, np.random.default_rng([seed, 20]), env.control_hz)
    actions: list[NDArray[Any]] = []
    positions: list[Any] = []
    info: dict[str, Any] = {}
    ended = False
    while not ended:
        player.advance(len(actions), env.look if images else env.feel)
        planned = player.action(len(actions))
        action = np.asarray(env.hold(actions[-1] if actions else None) if planned is None else planned)
        player.record(len(actions), action, actions[-1] if actions else None)
        if watch is not None:
            watch(player.moment(len(actions), action))
        _, _, terminated, truncated, info = env.step(action)
        actions.append(action)
        positions.append(info.get("position_m", np.full(3, np.nan)))
        ended = terminated or truncated
    return player.episode(seed, np.stack(actions), np.stack(positions), info)


@dataclass(frozen=True)
class _Running:
    """A chunk with the tick of its observation, and the tick at which its action 0 is due."""

    chunk: Chunk
    actions: NDArray[Any]
    seen: int
    origin: int

    def at(self, tick: int) -> NDArray[Any] | None:
        index = tick - self.origin
        return self.actions[index] if index < len(self.actions) else None

    def left(self, tick: int, most: int) -> NDArray[Any]:
        """At most so many actions from a tick on."""
        return self.actions[tick - self.origin : tick - self.origin + most]


class _Player:
    """Which chunk is in use at which tick. Bookkeeping of one episode."""

    def __init__(
        self,
        execution: Execution,
        policy: Policy,
        continuing: Continuing | None,
        rng: np.random.Generator,
        control_hz: float,
    ) -> None:
        self._execution, self._rng, self._hz = execution, rng, control_hz
        self._policy, self._continuing = policy, continuing
        self._now: _Running | None = None
        self._coming: tuple[int, _Running] | None = None
        self._before: _Running | None = None
        self._next_look = 0
        self._switched = False
        self._chunks = 0
        self._looks: list[int] = []
        self._delays: list[int] = []
        self._milliseconds: list[float] = []
        self._ages: list[int] = []
        self._seams: list[Seam] = []
        self._starved = 0

    def advance(self, tick: int, see: Callable[[], Observation]) -> None:
        """Take over a chunk that is ready; look if it is time. In this order, and once more for a delay of 0."""
        self._switched = False
        self._take(tick)
        if self._coming is None and tick >= self._next_look:
            self._look(tick, see())
            self._take(tick)

    def _look(self, tick: int, observation: Observation) -> None:
        execution = self._execution
        delay = int(self._rng.choice(execution.delays))
        committed = self._committed(tick, delay)
        begin = time.perf_counter()
        if committed is not None and self._continuing is not None:
            chunk = self._continuing(observation, committed)
        else:
            chunk = self._policy(observation)
        milliseconds = (time.perf_counter() - begin) * 1e3
        if execution.measured:
            delay += ticks([milliseconds], self._hz)[0]
        actions = checked(chunk)
        ready, wait = tick + delay, execution.execute_ticks
        origin = tick if execution.mode == "aligned" else ready
        self._coming = ready, _Running(chunk, actions, seen=tick, origin=origin)
        self._next_look = ready + wait if execution.mode == "pause" else tick + max(wait, delay)
        if execution.mode == "pause":
            self._before, self._now = self._now, None
        self._looks.append(tick)
        self._delays.append(delay)
        self._milliseconds.append(milliseconds)

    def _committed(self, tick: int, delay: int) -> Committed | None:
        """What will be executed until the answer of a look now; None if nothing of a chunk will."""
        if self._now is None or self._execution.mode != "aligned":
            return None
        if self._execution.measured:
            delay = self._delays[-1]
        left = len(self._now.left(tick, delay))
        return Committed(self._now.chunk, tick - self._now.origin, left) if left else None

    def _take(self, tick: int) -> None:
        if self._coming is not None and tick >= self._coming[0]:
            if self._now is not None:
                self._before = self._now
            self._now, self._coming, self._switched = self._coming[1], None, True
            self._chunks += 1

    def action(self, tick: int) -> NDArray[Any] | None:
        """The chunk's action for this tick, None where the robot has to wait."""
        planned = None if self._now is None else self._now.at(tick)
        self._starved += self._now is not None and planned is None
        self._ages.append(HELD if self._now is None or planned is None else tick - self._now.seen)
        return planned

    def record(self, tick: int, action: NDArray[Any], last: NDArray[Any] | None) -> None:
        """Note a seam, if the chunk has just changed."""
        if not self._switched or self._now is None or self._before is None or last is None:
            return
        most = self._execution.execute_ticks
        old, new = self._before.left(tick, most)[:, :-1], self._now.left(tick, most)[:, :-1]
        both = min(len(old), len(new))
        self._seams.append(
            Seam(
                tick,
                apart=float(np.linalg.norm(new[0] - old[0])) if both else None,
                ahead=float(np.linalg.norm((new[:both] - old[:both]).sum(axis=0))) if both else None,
                step=float(np.linalg.norm((action - last)[:-1])),
            )
        )

    def moment(self, tick: int, action: NDArray[Any]) -> Moment:
        """The tick that `action` was last called for."""
        index = None if self._now is None or self._ages[-1] == HELD else tick - self._now.origin
        return Moment(tick, action, self._ages[-1], self._chunks, index)

    def episode(self, seed: int, actions: NDArray[Any], positions_m: NDArray[Any], info: dict[str, Any]) -> Episode:
        """Everything noted, together with what the world says."""
        return Episode(
            seed=seed,
            success=bool(info.get("success", False)),
            wrong_object=bool(info.get("wrong_object", False)),
            control_hz=self._hz,
            looks=tuple(self._looks),
            delays=tuple(self._delays),
            age_ticks=np.array(self._ages, np.int64),
            starved=self._starved,
            seams=tuple(self._seams),
            actions=actions,
            positions_m=positions_m,
            info=info,
            inference_ms=tuple(self._milliseconds),
        )


def checked(chunk: Chunk) -> NDArray[Any]:
    """The actions [H, A] of an answer. Raises ShapeError for none, NumericsError where one is not finite."""
    actions = np.asarray(chunk.actions)
    if actions.ndim != 2 or not len(actions):
        raise ShapeError("actions of a chunk", got=f"shape {actions.shape}", wanted="[H, A] with H at least 1")
    if not np.isfinite(actions).all():
        bad = np.argwhere(~np.isfinite(actions))[0]
        raise NumericsError("an action of the policy is not finite", got=f"action {bad[0]}, dim {bad[1]}")
    return actions
