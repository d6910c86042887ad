"""Many episodes: cells of task, belt speed, execution mode and delay, all on the same seeds, so that cells can be paired.

A cell is plain data, so it can be sent to another process; every process builds its own environment.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from . import scene
from .conveyor import ConveyorEnv
from .expert import ExpertPolicy
from .rollout import Episode, Execution, Mode, rollout
from .tasks import SPEEDS_M_S

EXPERT_HORIZON = 48
"""Enough for a delay of 24 ticks: a chunk has to last for delay + max(delay, execution horizon) ticks."""


@dataclass(frozen=True)
class Cell:
    """One condition. belt: a name of SPEEDS_M_S, None = the task's own. delay_ticks: one, or several to draw from."""

    task: str
    belt: str | None = None
    mode: Mode = "aligned"
    execute_ticks: int = 8
    delay_ticks: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Outcome:
    """What came of a cell. `interval` is Wilson's, 95 %; `episodes` are summaries in the order of the seeds."""

    cell: Cell
    n: int
    successes: int
    rate: float
    interval: tuple[float, float]
    wrong_object: int
    median_time_to_success_s: float | None
    observation_age_ms: float | None
    seam_apart: float | None
    rms_jerk_m_s3: float | None
    episodes: tuple[dict[str, Any], ...]


def wilson(successes: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a rate, 95 % by default. Source: Wilson 1927; Newcombe 1998, method 3.

    Raises: ConfigError unless 0 <= successes <= n and n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ConfigError("a rate", got=f"{successes} of {n}", wanted="0 <= successes <= n, n >= 1")
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def run_expert(cell: Cell, seeds: Sequence[int]) -> Outcome:
    """The scripted expert, in chunks of 48 actions, on one cell."""
    if cell.belt is not None and cell.belt not in SPEEDS_M_S:
        raise ConfigError(f"unknown belt speed {cell.belt!r}", wanted=f"one of {sorted(SPEEDS_M_S)}")
    env = ConveyorEnv(cell.task, belt_m_s=SPEEDS_M_S[cell.belt] if cell.belt else None)
    policy = ExpertPolicy(env.sight, EXPERT_HORIZON)
    execution = Execution(cell.mode, cell.execute_ticks, cell.delay_ticks)
    return outcome(cell, [rollout(env, policy, seed=seed, execution=execution, images=False) for seed in seeds])


def run_cells(cells: Sequence[Cell], seeds: Sequence[int], *, processes: int = 1) -> Iterator[Outcome]:
    """All cells on the same seeds, in the order given, each as it is done."""
    if processes == 1:
        yield from (run_expert(cell, seeds) for cell in cells)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run_expert, cells, [seeds] * len(cells))


def outcome(cell: Cell, episodes: Sequence[Episode]) -> Outcome:
    """Count and average. Raises ConfigError without episodes."""
    rows = [episode.summary() for episode in episodes]
    successes = sum(row["success"] for row in rows)
    interval = wilson(successes, len(rows))
    times = [row["time_to_success_s"] for row in rows if row["success"]]
    return Outcome(
        cell=cell,
        n=len(rows),
        successes=successes,
        rate=successes / len(rows),
        interval=interval,
        wrong_object=sum(row["wrong_object"] for row in rows),
        median_time_to_success_s=float(np.median(times)) if times else None,
        observation_age_ms=_mean([row["observation_age_ms"]["mean"] for row in rows]),
        seam_apart=_mean([row["seam_apart"] for row in rows]),
        rms_jerk_m_s3=_mean([row["rms_jerk_m_s3"] for row in rows]),
        episodes=tuple(rows),
    )


def as_json(outcomes: Sequence[Outcome], seeds: Sequence[int]) -> dict[str, Any]:
    """The body of a result file: versions of the simulator, seeds, and a row for each cell."""
    return {
        "policy": "expert",
        "simulator": scene.versions(),
        "seeds": {"first": seeds[0], "n": len(seeds)},
        "cells": [asdict(one) for one in outcomes],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
