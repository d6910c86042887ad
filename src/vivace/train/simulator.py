"""What runs in a simulator's process: episodes whose policy is at the other end of a pipe. No torch, see `pieces`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..sim.conveyor import VIEWS, ConveyorEnv
from ..sim.expert import ExpertChunk, chunk
from ..sim.record import Source, other_instruction
from ..sim.rollout import Execution, rollout
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
    seen: list[tuple[Observation, NDArray[np.float32]]] = []
    others: list[tuple[str, NDArray[np.float32]]] = []

    way = job.source.way_of(job.seed)

    def policy(observation: Observation) -> ExpertChunk:
        if job.correct:
            seen.append((observation, chunk(replace(env.sight(), way=way), job.horizon)))
            if (other := other_instruction(env, job.horizon)) is not None:
                others.append(other)
        pipe.send(observation)
        return ExpertChunk(pipe.recv())

    episode = rollout(env, policy, seed=job.seed, execution=job.execution)
    piece = _piece(seen, others) if job.correct else None
    return Ended(job, episode.success, episode.wrong_object, len(episode.actions), piece)


def _piece(
    seen: Sequence[tuple[Observation, NDArray[np.float32]]], others: Sequence[tuple[str, NDArray[np.float32]]]
) -> Piece:
    chunks = np.stack([actions for _, actions in seen])
    return Piece(
        ticks=np.arange(len(seen)),
        views=np.stack([np.stack([observation.views[name] for name in VIEWS]) for observation, _ in seen]),
        state=np.stack([np.asarray(observation.state, np.float32) for observation, _ in seen]),
        prompts=tuple(observation.prompt for observation, _ in seen),
        executed=chunks[:, 0],
        chunk=chunks,
        joined=False,
        other_prompts=tuple(text for text, _ in others),
        other_chunk=np.stack([actions for _, actions in others]) if others else None,
    )
