"""Many episodes: arms on equal seeds, in blocks that any process can run, then counted, compared and controlled.

A block is an arm and some of its seeds, as plain data; every process builds its own environment and loads its own policy.
What a policy raises ends that episode as a crash, and the campaign goes on; what the simulator raises ends the campaign.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError, VivaceError, WorkerDied
from ..runtime.policy import Policy as ServedPolicy
from ..types import Observation
from . import scene
from .actors import Actor, Options, ServedActor, actor, load
from .arms import EXPERT, Arm, references
from .conveyor import ACTION_DIM, ConveyorEnv
from .episode import HELD, Episode, expected_reaction_ticks, reaction_ticks
from .faults import broken
from .orphans import begin_worker
from .outcomes import CONVEYOR, Comparison, Outcome, Units, compare, outcome
from .rollout import Chunk, Committed, Moment, Simulator, checked, rollout
from .stored import read
from .tasks import SPEEDS_M_S, Task, task

BLOCK = 20
"""Episodes of a block at most: a bar that moves, and a policy that is loaded once for many."""
REACTION_ACTION, REACTION_NOISE = 1e-6, 10.0
"""A reaction is an action that differs from the twin's by more than the first, and by the second times the largest
difference before the event (0 where arithmetic repeats itself): the moment at which what was seen reaches the robot."""
POLICY_RAISES = (
    VivaceError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all arms share.

    episodes   per arm, seeds first_seed, first_seed + 1, ...
    twins      episodes per arm that are run again without their event, for the reaction
    margin     loss of success rate that would not matter
    keep       store every episode's row
    """

    episodes: int = 50
    first_seed: int = 0
    twins: int = 50
    margin: float = 0.05
    keep: bool = False
    options: Options = field(default_factory=Options)

    @property
    def seeds(self) -> range:
        """Of every arm."""
        return range(self.first_seed, self.first_seed + self.episodes)


@dataclass(frozen=True)
class Job:
    """A block. twins: the leading seeds that are run again without the event. task: replaces the arm's, for controls."""

    index: int
    arm: Arm
    seeds: tuple[int, ...]
    twins: int = 0
    options: Options = field(default_factory=Options)
    task: Task | None = None


@dataclass(frozen=True)
class Block:
    """What came of a job: rows as in `Episode.summary`, with crash, reaction, ages, delays and inference_ms.

    renderer  which OpenGL drew the images, None = none were drawn
    """

    index: int
    rows: tuple[dict[str, Any], ...]
    engine: dict[str, Any] | None
    renderer: str | None = field(default=None, kw_only=True)


class PolicyCrash(VivaceError):
    """The policy raised, or answered with something that is no chunk of actions."""


@dataclass(frozen=True)
class Guarded:
    """Turns whatever an actor raises into a PolicyCrash, and nothing else."""

    inner: Actor
    action_dim: int = ACTION_DIM

    def policy(self, observation: Observation) -> Chunk:
        """See Actor."""
        return self._safe(lambda: self.inner.policy(observation))

    def continuing(self, observation: Observation, committed: Committed) -> Chunk:
        """See Actor."""
        return self._safe(lambda: self.inner.continuing(observation, committed))

    def _safe(self, call: Callable[[], Chunk]) -> Chunk:
        try:
            chunk = call()
            if (width := checked(chunk).shape[1]) != self.action_dim:
                raise ShapeError("actions of a chunk", got=f"{width} wide", wanted=self.action_dim)
        except POLICY_RAISES as error:
            raise PolicyCrash(f"{type(error).__name__}: {error}") from error
        return chunk


def environment(arm: Arm, *, options: Options, task_: Task | None = None) -> ConveyorEnv:
    """The arm's environment, with views of the size that its policy was trained on, else that of its network."""
    belt = SPEEDS_M_S[arm.belt] if arm.belt else None
    named = task_ or task(arm.task)
    if arm.policy == EXPERT:
        return ConveyorEnv(named, belt_m_s=belt, library=options.gl)  # a film draws what the expert does not look at
    size = read(arm.policy).image_px or load(arm.policy, arm.engine, arm.precision, arm.steps, options).io.image_size
    return ConveyorEnv(named, belt_m_s=belt, image_px=size, library=options.gl)


def warm(served: ServedPolicy, arm: Arm, env: Simulator, *, seed: int, action_dim: int = ACTION_DIM) -> None:
    """Run what the arm's looks will run before an episode's clock starts, as a server does before its robot.

    Loading has warmed the policy up without committed actions; with them a backend compiles or records once more, which
    takes up to a minute. Under a real clock a look of the simulator is answered too: the first one is the slowest.
    """
    if arm.committed:
        served.warmup(chunking=("trained",))
    if arm.delay.measured:
        env.reset(seed=seed)
        seen, guarded = env.look(), Guarded(ServedActor(served, seed), action_dim)
        with suppress(PolicyCrash):  # it will be counted in the episode
            chunk = guarded.policy(seen)
            if arm.committed:
                guarded.continuing(seen, Committed(chunk, start=0, ticks=1))


def play(
    env: ConveyorEnv,
    arm: Arm,
    *,
    seed: int,
    options: Options,
    event: bool = True,
    watch: Callable[[Moment], None] | None = None,
) -> Episode:
    """One episode of an arm. Raises PolicyCrash."""
    acting = actor(arm, env, seed=seed, options=options)
    if arm.fault is not None:
        acting = broken(arm.fault, acting, env)
    guarded = Guarded(acting)
    return rollout(
        env,
        guarded.policy,
        seed=seed,
        execution=arm.execution,
        continuing=guarded.continuing if arm.committed else None,
        images=arm.policy != EXPERT,
        options=None if event else {"event": False},
        watch=watch,
    )


def run_job(job: Job) -> Block:
    """Run a block in this process."""
    arm = job.arm
    env = environment(arm, options=job.options, task_=job.task)
    try:
        served = None
        if arm.policy != EXPERT:
            served = load(arm.policy, arm.engine, arm.precision, arm.steps, job.options)
            warm(served, arm, env, seed=job.seeds[0])
        rows = tuple(_row(env, job, seed, twin=i < job.twins) for i, seed in enumerate(job.seeds))
        renderer = env.renderer
    finally:
        env.close()
    return Block(job.index, rows, None if served is None else served.engine.to_json(), renderer=renderer)


def _row(env: ConveyorEnv, job: Job, seed: int, *, twin: bool) -> dict[str, Any]:
    try:
        episode = play(env, job.arm, seed=seed, options=job.options)
        event = env.world.event_tick
        react = None
        if twin and event is not None and event < len(episode.actions):
            other = play(env, job.arm, seed=seed, options=job.options, event=False)
            noise = np.abs(episode.actions[:event] - other.actions[:event]).max(initial=0.0)
            threshold = max(REACTION_ACTION, REACTION_NOISE * float(noise))
            react = {
                "event_tick": event,
                "ticks": reaction_ticks(episode, other, event_tick=event, threshold=threshold),
                "expected": expected_reaction_ticks(episode, event_tick=event),
            }
    except PolicyCrash as crash:
        return crashed_row(seed, crash)
    return finished_row(episode, react)


def crashed_row(seed: int, crash: PolicyCrash) -> dict[str, Any]:
    """The row of an episode that says nothing about how well the policy acts."""
    return {"seed": seed, "crash": str(crash), "ages": {}, "delays": {}, "inference_ms": ()}


def finished_row(episode: Episode, react: dict[str, Any] | None = None) -> dict[str, Any]:
    """The row of an episode that ran to its end."""
    used: NDArray[np.int64] = episode.age_ticks[episode.age_ticks != HELD]
    ages = dict(Counter(used.tolist()))
    return {
        **episode.summary(), "crash": None, "reaction": react, "ages": ages, "delays": dict(Counter(episode.delays)),
        "inference_ms": episode.inference_ms,
    }  # fmt: skip


def jobs(arms: Sequence[Arm], settings: Settings, *, processes: int) -> list[Job]:
    """Blocks of all arms, arm after arm. Twins are spread over the blocks, so that every process has its share."""
    size = max(1, min(BLOCK, math.ceil(settings.episodes / processes)))
    found = []
    for index, arm in enumerate(arms):
        left = settings.twins if task(arm.task).event != "none" else 0
        for start in range(0, settings.episodes, size):
            seeds = tuple(settings.seeds[start : start + size])
            found.append(Job(index, arm, seeds, twins=min(left, len(seeds)), options=settings.options))
            left = max(0, left - len(seeds))
    return found


def run_jobs(work: Sequence[Any], *, processes: int = 1, run: Callable[[Any], Block] = run_job) -> Iterator[Block]:
    """Run blocks, in this process or in others; in the order given, each as soon as it and those before are done.

    run: what plays one block of `work`; a function of a module, so that other processes find it.
    Raises: WorkerDied where a process is killed; the blocks before it have been yielded then.
    """
    if processes == 1:
        yield from map(run, work)
        return
    count = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=begin_worker) as pool:
        try:
            for block in pool.map(run, work):
                yield block
                count += 1
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a process of the campaign was killed", got=f"{count} of {len(work)} blocks of episodes finished before it",
                do="often it is out of memory: run with fewer --processes",
            ) from error  # fmt: skip


def collect(
    arms: Sequence[Arm], blocks: Sequence[Block], *, keep: bool = False, units: Units = CONVEYOR
) -> list[Outcome]:
    """Join the blocks of each arm."""
    joined = []
    for index, arm in enumerate(arms):
        mine = [block for block in blocks if block.index == index]
        rows = [row for block in mine for row in block.rows]
        joined.append(outcome(arm, rows, engine=mine[0].engine if mine else None, keep=keep, units=units))
    return joined


def comparisons(outcomes: Sequence[Outcome], *, margin: float) -> list[Comparison]:
    """Every arm against its reference; aligned against naive against pause; told the committed actions against not told."""
    arms = [one.arm for one in outcomes]
    pairs = [(i, r, "reference") for i, r in enumerate(references(arms)) if i != r]
    places = {arm: i for i, arm in enumerate(arms)}
    for i, arm in enumerate(arms):
        lesser = {"aligned": "naive", "naive": "pause"}.get(arm.mode)
        other = places.get(replace(arm, mode=lesser, committed=False)) if lesser else None  # type: ignore[arg-type]
        if other is not None:
            pairs.append((i, other, "mode"))
        untold = places.get(replace(arm, committed=False)) if arm.committed else None
        if untold is not None:
            pairs.append((i, untold, "committed"))
    return compare(outcomes, pairs, margin=margin)


def simulator(blocks: Sequence[Block]) -> dict[str, Any]:
    """For a result file: versions of the conveyor, and which OpenGL drew the images (None: none were drawn)."""
    drawn = sorted({block.renderer for block in blocks if block.renderer is not None})
    return {**scene.versions(), "renderer": ", ".join(drawn) or None, "control_hz": scene.CONTROL_HZ}


def as_json(
    outcomes: Sequence[Outcome],
    settings: Settings,
    found: Sequence[Comparison],
    *,
    simulator: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of a result file: versions of the simulator, seeds, a row an arm, comparisons."""
    rows = []
    for one in outcomes:
        row = asdict(replace(one, episodes=()))
        row["arm"] = one.arm.named()
        row["episodes"] = list(one.episodes)
        rows.append(row)
    return {
        "simulator": dict(simulator),
        "seeds": {"first": settings.first_seed, "n": settings.episodes},
        "method": {
            "interval": "Wilson, 95 %",
            "pairs": "equal seeds and noise; McNemar exact, Tango score interval 95 %, non-inferiority one-sided 5 %",
            "margin": settings.margin,
            "several_arms": "Holm",
            "reaction_threshold": {"action": REACTION_ACTION, "times_before_the_event": REACTION_NOISE},
        },
        "arms": rows,
        "comparisons": [asdict(one) for one in found],
    }
