"""The conditions of a campaign as plain data: an arm is one combination of task, belt, policy, engine, mode and delay.

Every arm runs on the same seeds. Within one task and belt speed the first arm is the reference of the others.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ConfigError
from .latency import Latencies
from .rollout import Execution, Mode, ticks
from .scene import CONTROL_HZ
from .tasks import SPEEDS_M_S, TASKS, task

EXPERT = "expert"


@dataclass(frozen=True)
class Delay:
    """An inference delay. ticks: one, or several to draw from; measured: the real wall time is added."""

    name: str
    ticks: tuple[int, ...] = (0,)
    measured: bool = False


@dataclass(frozen=True)
class Arm:
    """One condition.

    belt       a name of SPEEDS_M_S, None = the task's own        policy     "expert", or a checkpoint folder
    steps      denoise steps, None = the checkpoint's             committed  the policy is told the committed actions
    fault      broken on purpose, see faults.FAULTS
    """

    task: str
    belt: str | None = None
    policy: str = EXPERT
    engine: str = "auto"
    precision: str = "auto"
    steps: int | None = None
    mode: Mode = "aligned"
    committed: bool = False
    execute_ticks: int = 8
    delay: Delay = Delay("0 ms")
    fault: str | None = None

    @property
    def execution(self) -> Execution:
        """How chunks become actions."""
        return Execution(self.mode, self.execute_ticks, self.delay.ticks, self.delay.measured)

    @property
    def scene(self) -> tuple[str, str | None]:
        """What has to be equal for two arms to be pairs."""
        return self.task, self.belt

    def named(self) -> dict[str, Any]:
        """For a result file: delays as counts, or the file of a measured latency stays thousands of lines long."""
        row = asdict(self)
        counts = {str(value): count for value, count in sorted(Counter(self.delay.ticks).items())}
        row["delay"] = {"name": self.delay.name, "ticks": counts, "measured": self.delay.measured}
        return row


@dataclass(frozen=True)
class Axes:
    """What to combine; see `product`. tasks ("all",) = every named task."""

    tasks: Sequence[str] = ("static", "conveyor")
    belts: Sequence[str] = ()
    policies: Sequence[str] = (EXPERT,)
    engines: Sequence[str] = ("auto",)
    precisions: Sequence[str] = ("auto",)
    steps: Sequence[int] = ()
    modes: Sequence[Mode] = ("aligned",)
    delays: Sequence[Delay] = (Delay("0 ms"),)
    execute_ticks: int = 8


def product(axes: Axes) -> list[Arm]:
    """Every combination, tasks outermost. The expert has no engine, precision or steps, so it gets one arm for them all.

    Raises: ConfigError for an unknown task or belt.
    """
    names = tuple(TASKS) if tuple(axes.tasks) == ("all",) else tuple(task(name).name for name in axes.tasks)
    for speed in axes.belts:
        if speed not in SPEEDS_M_S:
            raise ConfigError(f"unknown belt speed {speed!r}", wanted=f"one of {sorted(SPEEDS_M_S)}")
    belts: tuple[str | None, ...] = tuple(axes.belts) or (None,)
    combinations = itertools.product(
        names, belts, axes.policies, axes.engines, axes.precisions, axes.steps or (None,), axes.modes,
        axes.delays,
    )  # fmt: skip
    arms: dict[Arm, None] = {}
    for name, belt, policy, engine, precision, steps, mode, delay in combinations:
        arm = Arm(
            task=name, belt=belt, policy=policy, engine=engine, precision=precision, steps=steps, mode=mode, delay=delay,
            execute_ticks=axes.execute_ticks,
        )  # fmt: skip
        arms[replace(arm, engine="auto", precision="auto", steps=None) if arm.policy == EXPERT else arm] = None
    return list(arms)


def delays(
    milliseconds: Sequence[float],
    latencies: Sequence[Latencies] = (),
    *,
    measured: bool = False,
    control_hz: float = CONTROL_HZ,
) -> list[Delay]:
    """Fixed delays and measured distributions, rounded up to control ticks (of 20 ms on the conveyor).

    measured: the real wall time of each inference is added to every one of them.
    Raises: ConfigError for a negative delay.
    """
    if any(not 0.0 <= value < 60_000.0 for value in milliseconds):
        raise ConfigError("--delay-ms", got=list(milliseconds), wanted="milliseconds, at least 0 and below a minute")
    extra = "real clock" if measured else ""
    fixed = [Delay(_named(f"{value:g} ms", extra), ticks([value], control_hz), measured) for value in milliseconds]
    drawn = [Delay(_named(one.name, extra), ticks(one.milliseconds, control_hz), measured) for one in latencies]
    return [*fixed, *drawn]


def references(arms: Sequence[Arm]) -> list[int]:
    """For each arm the index of its reference: the first arm of its task and belt."""
    first: dict[tuple[str, str | None], int] = {}
    return [first.setdefault(arm.scene, i) for i, arm in enumerate(arms)]


def _named(name: str, extra: str) -> str:
    return f"{extra} + {name}" if extra and name != "0 ms" else extra or name
