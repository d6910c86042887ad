"""The named tasks of the conveyor benchmark: one environment, and a row of data for each task.

| task | what happens | what it isolates |
|---|---|---|
| static | the belt is off | baseline |
| conveyor | the belt runs | observation age: the hand goes where the cube was |
| bimodal | a post stands between hand and cube: left or right, never through | averaging of two modes, mode switching |
| precise | the cube goes into a well 2 mm wider on each side; 4 mm off slips in, 6 mm does not | precision: FP8, pruning |
| perturb | the target jumps to another place at a random time | reaction, blind spots of reuse |
| perturb-cube | a second cube is put down near the target at a random time | false reaction |
| swap | the instruction names the other cube from a random time on | the language path, cached text |
| distract | blobs move beside the belt, the exposure flickers | false refresh and false reuse |

A name with -moving is the same task on the slow belt. The family follows docs/guides/simulation.md. Difficulty of moving
tasks is the belt's speed: the delay that a policy survives is about (grasp tolerance, 25 mm) / speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

Range = tuple[float, float]

SPEEDS_M_S: dict[str, Range] = {
    "off": (0.0, 0.0),
    "slow": (0.05, 0.15),
    "middle": (0.12, 0.20),
    "fast": (0.25, 0.35),
    "fastest": (0.35, 0.45),
}
"""Named belt speeds: magnitude drawn uniformly, direction by a fair coin."""


@dataclass(frozen=True)
class Task:
    """What makes a task.

    belt_m_s     range from which the belt's speed is drawn, see SPEEDS_M_S
    cubes        cubes on the belt, 1 to 3; the instruction names one
    goal         lift: target above 12 cm in the hand for 10 ticks; insert: target released at the bottom of the well
    post         a post between hand and cube that must not be touched; the hand cannot go over it
    event        jump: the target is moved; swap: the instruction changes; enter: until then the target is alone, then the
                 other cubes come. Success counts only after it
    event_ticks  the event happens at a control tick drawn uniformly from here, both ends included
    blobs        moving things that cannot be touched
    flicker      exposure of every image is multiplied by a number from [1 - flicker, 1 + flicker]
    max_ticks    the episode is cut off here
    """

    name: str
    belt_m_s: Range = (0.0, 0.0)
    cubes: int = 2
    goal: Literal["lift", "insert"] = "lift"
    post: bool = False
    event: Literal["none", "jump", "swap", "enter"] = "none"
    event_ticks: tuple[int, int] = (8, 30)
    blobs: int = 0
    flicker: float = 0.0
    max_ticks: int = 250


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("static"),
        Task("conveyor", belt_m_s=SPEEDS_M_S["slow"]),
        Task("bimodal", post=True, cubes=1),
        Task("precise", goal="insert"),
        Task("perturb", event="jump"),
        Task("perturb-cube", event="enter"),
        Task("swap", event="swap"),
        Task("distract", belt_m_s=SPEEDS_M_S["slow"], cubes=3, blobs=2, flicker=0.4),
        Task("bimodal-moving", belt_m_s=SPEEDS_M_S["slow"], post=True, cubes=1),
        Task("precise-moving", belt_m_s=SPEEDS_M_S["slow"], goal="insert"),
        Task("perturb-moving", belt_m_s=SPEEDS_M_S["slow"], event="jump"),
        Task("perturb-cube-moving", belt_m_s=SPEEDS_M_S["slow"], event="enter"),
        Task("swap-moving", belt_m_s=SPEEDS_M_S["slow"], event="swap"),
    )
}


def task(name: str) -> Task:
    """The task of this name. Raises ConfigError naming those that exist."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}", wanted=f"one of {sorted(TASKS)}")
    return TASKS[name]


def belt_speed(name: str, belt: str | None) -> Range:
    """Range of the belt's speed in this task, m/s: the named one, or the task's own where none is named.

    Raises ConfigError for an unknown task or belt.
    """
    if belt and belt not in SPEEDS_M_S:
        raise ConfigError(f"unknown belt speed {belt!r}", wanted=f"one of {sorted(SPEEDS_M_S)}")
    return SPEEDS_M_S[belt] if belt else task(name).belt_m_s
