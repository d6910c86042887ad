"""What runs in a simulator's process: episodes whose policy is at the other end of a pipe. No torch, see `pieces`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..sim.conveyor import VIEWS, ConveyorEnv
from ..sim.expert import chunk
from ..sim.record import Source, other_instruction
from ..sim.rollout import Committed, Execution, Moment, rollout
from ..sim.tasks import SPEEDS_M_S
from ..types import Observation
from .pieces import Piece


@dataclass(frozen=True)
class Job:
    """One episode."""

    source: Source
    seed: int
    image_px: int
    horizon: int
    execution: Execution = field(default_factory=Execution)
    correct: bool = False


@dataclass(frozen=True)
class Look:
    """What a simulator asks.

    older, ticks  the rest of the chunk in execution, float32 [H, width] in model space, from this look on, of which the
                  first `ticks` actions will be executed before the answer comes; None, 0: no such action is known
    """

    observation: Observation
    older: NDArray[np.float32] | None = None
    ticks: int = 0


@dataclass(frozen=True)
class Answered:
    """A policy's chunk: actions [H, 4] in robot units, actions_normalized float32 [H, width] in model space."""

    actions: NDArray[Any]
    actions_normalized: NDArray[np.float32]


@dataclass(frozen=True)
class Ended:
    """What came of a job; `piece` holds its corrections."""

    job: Job
    success: bool
    wrong_object: bool
    ticks: int
    piece: Piece | None


def simulate(pipe: Connection[Any, Any]) -> None:
    """Jobs in, looks out and chunks in, results out, until the pipe closes."""
    env: ConveyorEnv | None = None
    key: tuple[Any, ...] = ()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            break
        if env is None or key != (job.source.task, job.source.belt, job.image_px):
            if env is not None:
                env.close()
            key = (job.source.task, job.source.belt, job.image_px)
            belt = SPEEDS_M_S[job.source.belt] if job.source.belt else None
            env = ConveyorEnv(job.source.task, belt_m_s=belt, image_px=job.image_px)
        try:
            pipe.send(_episode(env, job, pipe))
        except (EOFError, BrokenPipeError):
            break
    if env is not None:
        env.close()


def _episode(env: ConveyorEnv, job: Job, pipe: Connection[Any, Any]) -> Ended:
    notes = _Notes(env, job) if job.correct else None

    def ask(look: Look) -> Answered:
        if notes is not None:
            notes.look(look.observation)
        pipe.send(look)
        answered: Answered = pipe.recv()
        return answered

    episode = rollout(
        env,
        lambda observation: ask(Look(observation)),
        continuing=lambda observation, committed: ask(Look(observation, _rest(committed), committed.ticks)),
        seed=job.seed,
        execution=job.execution,
        watch=None if notes is None else notes.tick,
    )
    piece = None if notes is None else notes.piece()
    return Ended(job, episode.success, episode.wrong_object, len(episode.actions), piece)


def _rest(committed: Committed) -> NDArray[np.float32]:
    """The chunk in execution from the look on, zeros behind its end."""
    assert isinstance(committed.chunk, Answered)
    whole = committed.chunk.actions_normalized
    moved = np.zeros_like(whole)
    moved[: len(whole) - committed.start] = whole[committed.start :]
    return moved


class _Notes:
    """What the expert would do at every tick of an episode that somebody else acts in, and what was executed there."""

    def __init__(self, env: ConveyorEnv, job: Job) -> None:
        self._env, self._horizon, self._way = env, job.horizon, job.source.way_of(job.seed)
        self._executed: list[NDArray[np.float32]] = []
        self._chunks: list[NDArray[np.float32]] = []
        self._ticks: list[int] = []
        self._seen: list[Observation] = []
        self._others: list[tuple[str, NDArray[np.float32]]] = []

    def look(self, observation: Observation) -> None:
        """The policy sees this; `tick` of the same tick follows."""
        self._ticks.append(len(self._executed))
        self._seen.append(observation)
        if (other := other_instruction(self._env, self._horizon)) is not None:
            self._others.append(other)

    def tick(self, moment: Moment) -> None:
        """The world is about to move."""
        self._executed.append(np.asarray(moment.action, np.float32))
        self._chunks.append(chunk(replace(self._env.sight(), way=self._way), self._horizon))

    def piece(self) -> Piece:
        """All of it."""
        seen = self._seen
        return Piece(
            ticks=np.array(self._ticks),
            views=np.stack([np.stack([one.views[name] for name in VIEWS]) for one in seen]),
            state=np.stack([np.asarray(one.state, np.float32) for one in seen]),
            prompts=tuple(one.prompt for one in seen),
            executed=np.stack(self._executed),
            chunk=np.stack(self._chunks),
            other_prompts=tuple(text for text, _ in self._others),
            other_chunk=np.stack([actions for _, actions in self._others]) if self._others else None,
        )
