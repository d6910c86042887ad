"""A LIBERO suite as a campaign: every arm in every task from the same official initial states, counted as the conveyor is.

An arm is a policy under one condition (engine, precision, steps, mode, delay); its n is tasks x episodes, and its letters
come task after task. Unlike in the usual LIBERO evaluation the world can go on while the policy computes: `--delay-ms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np

from ...errors import ConfigError
from ...types import Observation
from ..actors import Actor, Options, ServedActor, load
from ..arms import EXPERT, Arm, Axes, product
from ..campaign import Block, Guarded, PolicyCrash, crashed_row, finished_row, warm
from ..controls import Control, first_arms, must_fail
from ..conveyor import ConveyorEnv
from ..faults import broken
from ..outcomes import Outcome, Units
from ..rollout import Chunk, Committed, rollout
from .conventions import ACTION_DIM, CAMERAS, CONTROL_HZ, convention
from .environment import Answers, LiberoEnv, Sight, tasks_of
from .expert import Expert, ExpertChunk

UNITS = Units(1000.0 / CONTROL_HZ, None, None)
"""An action moves and turns the goal of a controller: no velocity."""
INITIAL_STATES = 50
"""Official ones of every task of every suite."""
SCRIPTED = "libero_object"
"""The suite that the expert is for."""
BLOCK = 10
"""Episodes of a block at most; each block starts LIBERO anew (5 to 20 s)."""


@dataclass(frozen=True)
class Suite:
    """What all arms share.

    tasks               numbers of the suite's tasks, () = all
    episodes_per_task   initial states first_state, first_state + 1, ... of each task
    python              interpreter that has LIBERO, None = this one
    """

    name: str = "libero_object"
    convention: str = "openpi"
    tasks: tuple[int, ...] = ()
    episodes_per_task: int = 50
    first_state: int = 0
    python: str | None = None
    options: Options = field(default_factory=lambda: Options(embodiment="libero"))

    def __post_init__(self) -> None:
        convention(self.convention).limit(self.name)
        last = self.first_state + self.episodes_per_task - 1
        if not 0 <= self.first_state <= last < INITIAL_STATES:
            raise ConfigError(
                "initial states of a task of LIBERO", got=f"{self.first_state} to {last}",
                wanted=f"some of 0 to {INITIAL_STATES - 1}", do="change --seed or --episodes-per-task",
            )  # fmt: skip
        if any(not 0 <= task < tasks_of(self.name) for task in self.tasks):
            raise ConfigError(f"tasks of {self.name}", got=self.tasks, wanted=f"0 to {tasks_of(self.name) - 1}")

    @property
    def numbers(self) -> tuple[int, ...]:
        """The tasks that are run."""
        return self.tasks or tuple(range(tasks_of(self.name)))

    @property
    def states(self) -> tuple[int, ...]:
        """The initial states that are run, of every task."""
        return tuple(range(self.first_state, self.first_state + self.episodes_per_task))


@dataclass(frozen=True)
class Job:
    """An arm, a task and some of its initial states. start: makes LIBERO's process, for tests."""

    index: int
    arm: Arm
    suite: Suite
    task: int
    seeds: tuple[int, ...]
    start: Callable[[], Answers] | None = None


@dataclass(frozen=True)
class Played(Block):
    """A block, and which task and which versions it was played with."""

    task: int
    prompt: str
    versions: dict[str, str]


@dataclass
class ExpertActor:
    """The scripted expert of one episode, looking at every tick; blind: it takes the thing to be elsewhere."""

    see: Callable[[], Sight]
    blind: bool = False
    expert: Expert = field(default_factory=Expert)

    def policy(self, observation: Observation) -> Chunk:
        """One action."""
        sight = self.see()
        if self.blind:
            guess = {name: (np.zeros(3), turned) for name, (_, turned) in list(sight.objects.items())[:1]}
            sight = replace(sight, objects={**sight.objects, **guess})
        return ExpertChunk(self.expert.act(sight)[None])

    def continuing(self, observation: Observation, committed: Committed) -> Chunk:
        """It has no plan that could go on."""
        raise ConfigError("the scripted expert of LIBERO", got="committed actions", wanted="--committed never")


def arms(axes: Axes, suite: Suite) -> list[Arm]:
    """Every combination of the axes on the suite. The expert looks at every tick, so it knows no delay.

    Raises: ConfigError for a belt, or for the expert with a delay, in another mode or in another suite.
    """
    if axes.belts:
        raise ConfigError("--belt with --suite", got=list(axes.belts), wanted="nothing: LIBERO has no belt")
    if EXPERT in axes.policies and suite.name != SCRIPTED:
        raise ConfigError(f"no scripted expert for {suite.name}", wanted=SCRIPTED, do="pass --policy FOLDER")
    found: dict[Arm, None] = {}
    for arm in product(replace(axes, tasks=("static",))):  # the conveyor's task only stands in for the suite's name
        if arm.policy == EXPERT and (max(arm.delay.ticks) or arm.delay.measured or arm.mode != "aligned"):
            raise ConfigError(
                "the scripted expert of LIBERO", got=f"{arm.mode}, {arm.delay.name}", wanted="aligned, 0 ms",
                do="it answers single actions; simulate delays with a policy",
            )  # fmt: skip
        ticks = 1 if arm.policy == EXPERT else arm.execute_ticks
        found[replace(arm, task=suite.name, execute_ticks=ticks)] = None
    return list(found)


def jobs(found: Sequence[Arm], suite: Suite) -> list[Job]:
    """Blocks of all arms, arm after arm, task after task."""
    states = [suite.states[i : i + BLOCK] for i in range(0, len(suite.states), BLOCK)]
    return [
        Job(index, arm, suite, task, part)
        for index, arm in enumerate(found)
        for task in suite.numbers
        for part in states
    ]


def control_jobs(found: Sequence[Arm], suite: Suite, *, episodes: int) -> list[Job]:
    """The first arm of each policy, blind: one episode of each task in turn until there are `episodes`."""
    numbers = suite.numbers
    return [
        Job(
            place,
            replace(found[place], fault="blanked"),
            suite,
            task,
            suite.states[: -(-(episodes - i) // len(numbers))],
        )
        for place in first_arms(found).values()
        for i, task in enumerate(numbers[:episodes])
    ]


def judge(outcomes: Sequence[Outcome], work: Sequence[Job], blocks: Sequence[Block]) -> list[Control]:
    """Blind policies must fail."""
    found = []
    for place in first_arms([one.arm for one in outcomes]).values():
        mine = [block for job, block in zip(work, blocks, strict=True) if job.index == place]
        if mine:
            rows = tuple(row for block in mine for row in block.rows)
            judged = must_fail("blanked", outcomes[place], Block(place, rows, None))
            found.append(replace(judged, arm=place))
    return found


def run_job(job: Job) -> Played:
    """Run a block in this process; LIBERO runs beside it."""
    expert, chosen = job.arm.policy == EXPERT, convention(job.suite.convention)
    # the policy first: its errors are known in seconds
    served = None if expert else _served(job)
    policy = None if served is None else partial(ServedActor, served)
    process = job.start() if job.start is not None else None
    env = LiberoEnv(
        job.suite.name, job.task, convention=chosen, python=job.suite.python, images=not expert, process=process
    )
    try:
        if served is not None:
            warm(served, job.arm, env, seed=job.seeds[0], action_dim=ACTION_DIM)
        rows = tuple(_row(env, job, seed, policy) for seed in job.seeds)
    finally:
        env.close()
    engine = None if served is None else served.engine.to_json()
    return Played(job.index, rows, engine, job.task, env.prompt, env.versions)


def _served(job: Job) -> Any:
    """The loaded policy. Raises ConfigError for one with other cameras."""
    arm = job.arm
    policy = load(arm.policy, arm.engine, arm.precision, arm.steps, job.suite.options, action_dim=ACTION_DIM)
    needed = {camera.view for camera in policy.io.embodiment.cameras if camera.required}
    if not needed <= set(CAMERAS):
        raise ConfigError(
            f"{arm.policy} needs other views than LIBERO has", got=sorted(needed), wanted=sorted(CAMERAS),
            do="leave --embodiment out",
        )  # fmt: skip
    return policy


def _row(env: LiberoEnv, job: Job, seed: int, policy: Callable[[int], Actor] | None) -> dict[str, Any]:
    """One episode. The noise of a policy depends on task, initial state and look alone, so arms are paired in it."""
    acting: Actor = ExpertActor(env.sight, blind=job.arm.fault is not None)
    if policy is not None:
        acting = policy(1000 * job.task + seed)
        if job.arm.fault is not None:
            acting = broken(job.arm.fault, acting, cast(ConveyorEnv, env))  # blanking asks nothing of the environment
    guarded = Guarded(acting, ACTION_DIM)
    told = guarded.continuing if job.arm.committed else None
    try:
        episode = rollout(
            env, guarded.policy, seed=seed, execution=job.arm.execution, continuing=told, images=policy is not None
        )
    except PolicyCrash as crash:
        return {"task": job.task, **crashed_row(seed, crash)}
    return {"task": job.task, **finished_row(episode)}


def simulator(blocks: Sequence[Block], suite: Suite) -> dict[str, Any]:
    """For a result file: versions and the protocol.

    Raises: ConfigError where blocks were played with different versions.
    """
    played = [block for block in blocks if isinstance(block, Played)]
    if any(block.versions != played[0].versions for block in played):
        raise ConfigError("LIBERO changed during the campaign", got=[block.versions for block in played])
    chosen = convention(suite.convention)
    return {
        "name": "LIBERO",
        "versions": played[0].versions if played else {},
        "suite": suite.name,
        "convention": chosen.name,
        "max_ticks": chosen.limit(suite.name),
        "settle_ticks": chosen.settle_ticks,
        "image_px": chosen.image_px,
        "control_hz": CONTROL_HZ,
        "env_seed": chosen.env_seed,
        "initial_states": "official",
    }


def by_task(outcomes: Sequence[Outcome], blocks: Sequence[Block], suite: Suite) -> list[dict[str, Any]]:
    """For each task its instruction, and the letters of every arm in the order of its initial states."""
    prompts = {block.task: block.prompt for block in blocks if isinstance(block, Played)}
    n = suite.episodes_per_task
    return [
        {
            "task": task,
            "prompt": prompts.get(task, ""),
            "arms": [
                {"outcomes": letters, "successes": letters.count("S"), "crashes": letters.count("C"), "n": n}
                for letters in (one.outcomes[i * n : (i + 1) * n] for one in outcomes)
            ],
        }
        for i, task in enumerate(suite.numbers)
    ]
