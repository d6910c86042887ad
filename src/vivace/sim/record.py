"""Expert demonstrations: the scripted expert drives, noise disturbs it, and every label is what it would do undisturbed.

Without noise a learner never sees what happens one centimetre off the expert's path, and cannot come back from there. So
noise is added to the executed action and left out of the label (DART, Laskey et al. 2017). The noise level of an episode is
drawn from `Plan.sigma`, and each draw is held for 1 or 8 ticks: as single jolts, or as the lasting error of a whole chunk.

Two labels for every tick: `action`, the expert's one action in this state, and `chunk`, its next `horizon` actions by its
own prediction. A chunk label does not depend on the noise that comes later, which a policy cannot know, so it is the better
target; a window of `action` is what datasets without chunks have.

And a third, at every look: what the expert would do if the instruction named another cube (`other_chunk`). In a
demonstration the hand's position gives the target away, so a learner need not read the instruction, and does not; with two
instructions and two answers to one and the same picture it must.

The seeds of an episode are (plan seed, number of the episode): any number of processes makes the same demonstrations.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, WorkerDied
from .conveyor import VIEWS, ConveyorEnv
from .expert import act, chunk
from .orphans import begin_worker
from .tasks import SPEEDS_M_S, belt_speed, task
from .world import HISTORY_TICKS

HOLD_TICKS = (1, 8)
MAX_PX = 4096
"""Every OpenGL draws images of this size."""
GRIP_SLIP = 0.02
"""Chance of a noisy draw to also turn the fingers round: dropped cubes and empty grasps must be seen too."""


@dataclass(frozen=True)
class Source:
    """Episodes of one kind.

    belt  a name of tasks.SPEEDS_M_S, "" = the task's own
    way   round a post: "near" = the side on which the hand is, so that the state says which; "coin" = drawn for each
          episode, so that nothing seen says which, and there are two right answers to one picture
    """

    task: str
    episodes: int
    belt: str = ""
    way: Literal["near", "coin"] = "near"

    def __post_init__(self) -> None:
        """Refuse what no environment has."""
        belt_speed(self.task, self.belt)
        if self.episodes < 1:
            raise ConfigError(f"episodes of task {self.task}", got=self.episodes, wanted="at least 1")
        if self.way not in ("near", "coin"):
            raise ConfigError(f"way of task {self.task}", got=self.way, wanted="near or coin")
        if self.way == "coin" and not task(self.task).post:
            raise ConfigError(f"a coin for task {self.task}", got="no post to pass", wanted="a task with a post")

    def way_of(self, seed: int) -> float | None:
        """What the demonstrator of the episode with this seed has in mind, for `Sight.way`."""
        return float(np.random.default_rng([seed, 8]).choice((-1.0, 1.0))) if self.way == "coin" else None


@dataclass(frozen=True)
class Plan:
    """What to record.

    image_px  views are image_px x image_px
    horizon   length of the chunk labels
    sigma     noise levels, in action units (1 = 0.5 m/s); each episode draws one
    stride    images at the first tick and then at every `stride`-th; 5 is cheapest, as the third view is the last first one
    """

    sources: tuple[Source, ...]
    seed: int = 0
    image_px: int = 224
    horizon: int = 24
    sigma: tuple[float, ...] = (0.0, 0.25, 0.5)
    stride: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be recorded."""
        if not self.sources:
            raise ConfigError("nothing to record", got="no sources", wanted="at least one task with episodes")
        if not 8 <= self.image_px <= MAX_PX or self.horizon < 1 or self.seed < 0 or self.stride < 1:
            raise ConfigError(
                "recording plan",
                got=f"image_px {self.image_px}, horizon {self.horizon}, seed {self.seed}, stride {self.stride}",
                wanted=f"image_px from 8 to {MAX_PX}, horizon >= 1, seed >= 0, stride >= 1",
            )
        if not self.sigma or not all(0 <= level <= 2 for level in self.sigma):
            raise ConfigError("noise levels sigma", got=self.sigma, wanted="numbers from 0 to 2")

    def jobs(self) -> list[tuple[Source, int]]:
        """(source, seed of the episode) of every episode; sources are interleaved, so a part of the list is a mixture."""
        every = [
            ((index + 0.5) / source.episodes, order, source)
            for order, source in enumerate(self.sources)
            for index in range(source.episodes)
        ]
        ordered = sorted(every, key=lambda one: one[:2])
        return [(source, 1_000_000 * (self.seed + 1) + index) for index, (_, _, source) in enumerate(ordered)]


@dataclass(frozen=True)
class Demo:
    """One demonstration of T ticks, seen at R of them.

    ticks   int64 [R], those that were seen          views     uint8 [R, 3, px, px, 3]: front, wrist, front 100 ms ago
    state   float32 [T, 7]                           prompts   T strings (task `swap` changes them)
    action  float32 [T, 4], clean                    executed  float32 [T, 4], with noise
    chunk   float32 [T, horizon, 4]
    other_prompts, other_chunk  R strings, float32 [R, horizon, 4]: the same looks with another cube named; () and None
                                where there is only one
    """

    task: str
    seed: int
    success: bool
    sigma: float
    belt_m_s: float
    prompts: tuple[str, ...]
    ticks: NDArray[np.int64]
    views: NDArray[np.uint8]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    executed: NDArray[np.float32]
    chunk: NDArray[np.float32]
    other_prompts: tuple[str, ...] = ()
    other_chunk: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.action)


class _Noise:
    """Disturbance of one episode: normal, held for `hold` ticks; now and then the fingers turn round."""

    def __init__(self, rng: np.random.Generator, sigma: float) -> None:
        self._rng, self._sigma = rng, sigma
        self._hold, self._left = int(rng.choice(HOLD_TICKS)), 0
        self._offset, self._slip = np.zeros(3), False

    def apply(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """The action as executed, in [-1, 1]."""
        if self._left == 0:
            self._offset, self._left = self._rng.normal(0.0, 1.0, 3) * self._sigma, self._hold
            self._slip = bool(self._rng.random() < GRIP_SLIP * self._hold / max(HOLD_TICKS) and self._sigma > 0)
        self._left -= 1
        grip = -action[3] if self._slip else action[3]
        executed: NDArray[np.float32] = np.clip([*(action[:3] + self._offset), grip], -1.0, 1.0).astype(np.float32)
        return executed


class _Eyes:
    """Which ticks are seen, and the front views of the last 100 ms, so that most looks need two images instead of three."""

    def __init__(self, stride: int, phase: int) -> None:
        self._stride, self._phase = stride, phase
        self._fronts: dict[int, NDArray[np.uint8]] = {}
        self.ticks: list[int] = []
        self.views: list[NDArray[np.uint8]] = []

    def look(self, env: ConveyorEnv, tick: int) -> bool:
        """See this tick if its turn has come: 0, then phase, phase + stride, ... True if it had."""
        if tick and (tick < self._phase or (tick - self._phase) % self._stride):
            return False
        old = max(0, tick - HISTORY_TICKS)
        if tick == 0 or old in self._fronts:
            front, wrist = env.cameras()
            before = self._fronts.get(old, front)
        else:
            front, wrist, before = (env.look().views[name] for name in VIEWS)
        self._fronts = {at: image for at, image in self._fronts.items() if at >= old} | {tick: front}
        self.ticks.append(tick)
        self.views.append(np.stack([front, wrist, before]))
        return True


def other_instruction(env: ConveyorEnv, horizon: int) -> tuple[str, NDArray[np.float32]] | None:
    """Prompt and chunk if another cube were named: the one behind the target in the draw's order. None: there is none."""
    cubes, target = env.world.drawn.cubes, env.world.target
    if len(cubes) < 2:
        return None
    other = cubes[(cubes.index(target) + 1) % len(cubes)]
    sight = replace(env.sight(), target_m=env.world.cube_m(other))
    return env.prompt.replace(target, other), chunk(sight, horizon)


def record_episode(
    env: ConveyorEnv, *, seed: int, sigma: tuple[float, ...], horizon: int, stride: int = 1, way: float | None = None
) -> Demo:
    """Run the disturbed expert once. A function of its arguments; the environment may have been used before."""
    rng = np.random.default_rng([seed, 7])
    level = float(rng.choice(sigma))
    noise, eyes = _Noise(rng, level), _Eyes(stride, int(rng.integers(stride)))
    env.reset(seed=seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("state", "action", "executed", "chunk", "prompt")}
    others: list[tuple[str, NDArray[np.float32]]] = []
    ended = False
    info: dict[str, Any] = {}
    while not ended:
        if eyes.look(env, len(rows["action"])) and (other := other_instruction(env, horizon)) is not None:
            others.append(other)
        sight = replace(env.sight(), way=way)
        clean = act(sight)
        executed = noise.apply(clean)
        for name, value in zip(
            rows, (env.feel().state, clean, executed, chunk(sight, horizon), env.prompt), strict=True
        ):  # fmt: skip
            rows[name].append(value)
        _, _, terminated, truncated, info = env.step(executed)
        ended = terminated or truncated
    prompts = tuple(rows.pop("prompt"))
    arrays = {name: np.stack(values) for name, values in rows.items()}
    return Demo(
        task=env.task.name, seed=seed, success=bool(info["success"]), sigma=level, belt_m_s=info["belt_m_s"],
        prompts=prompts, ticks=np.array(eyes.ticks), views=np.stack(eyes.views), **arrays,
        other_prompts=tuple(text for text, _ in others),
        other_chunk=np.stack([actions for _, actions in others]) if others else None,
    )  # fmt: skip


Environments = dict[tuple[str, str, int], ConveyorEnv]


def record(plan: Plan, *, processes: int = 1, progress: Callable[[int], None] = lambda count: None) -> Iterator[Demo]:
    """All demonstrations of a plan in order, failed ones included (`Demo.success`); not more than a few are held.

    progress  called with 1 for every finished episode
    Raises: WorkerDied where a process is killed.
    """
    if processes < 1:
        raise ConfigError("processes", got=processes, wanted="at least 1")
    jobs = plan.jobs()
    if processes == 1:
        here: Environments = {}  # a context of OpenGL belongs to one thread: closed by the one that made it
        try:
            for job in jobs:
                yield _run(plan, job, here)
                progress(1)
        finally:
            for env in here.values():
                env.close()
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=begin_worker)
    try:
        waiting: dict[Future[Demo], int] = {}
        done: dict[int, Demo] = {}
        sent = 0
        for index in range(len(jobs)):
            while index not in done:
                while sent < len(jobs) and sent < index + 4 * processes:
                    waiting[pool.submit(_run_in_process, plan, jobs[sent])] = sent
                    sent += 1
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    done[waiting.pop(future)] = future.result()
                    progress(1)
            yield done.pop(index)
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a recording process was killed", got=f"{len(jobs)} episodes in {processes} processes",
            do="often it is out of memory: use fewer processes, or smaller images",
        ) from error  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


_of_this_process: Environments = {}


def _run_in_process(plan: Plan, job: tuple[Source, int]) -> Demo:
    """In a worker process, which keeps its environments for the next episode and ends with them."""
    return _run(plan, job, _of_this_process)


def _run(plan: Plan, job: tuple[Source, int], environments: Environments) -> Demo:
    source, seed = job
    key = (source.task, source.belt, plan.image_px)
    if key not in environments:
        belt = SPEEDS_M_S[source.belt] if source.belt else None
        environments[key] = ConveyorEnv(source.task, belt_m_s=belt, image_px=plan.image_px)
    return record_episode(
        environments[key],
        seed=seed,
        sigma=plan.sigma,
        horizon=plan.horizon,
        stride=plan.stride,
        way=source.way_of(seed),
    )
