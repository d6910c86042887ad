"""`vivace simulate`: success against delay in the simulated conveyor, for the scripted expert."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import track
from rich.table import Table

from ..check.environment import collect
from ..check.results import result, write_result
from ..errors import ConfigError
from .output import OK, console, emit


@dataclass(frozen=True)
class Args:
    """Run every combination of tasks, belts, modes and delays on the same seeds. Time is simulated: nothing sleeps.

    Example: vivace simulate --task conveyor --belt slow fast --mode naive aligned --delay-ms 0 100 160
    """

    task: tuple[str, ...] = ("static", "conveyor")
    """Names of vivace.sim.tasks, or all."""
    policy: Literal["expert"] = "expert"
    """Who acts: the scripted expert, which sees the true state."""
    belt: tuple[Literal["off", "slow", "middle", "fast", "fastest"], ...] = ()
    """Belt speeds; default: each task's own."""
    mode: tuple[Literal["pause", "naive", "aligned"], ...] = ("aligned",)
    """What the robot does while the policy computes."""
    delay_ms: tuple[float, ...] = (0.0,)
    """Inference delays, each a condition of its own, rounded up to control ticks of 20 ms."""
    execute_ticks: int = 8
    """Execution horizon: control ticks from one observation to the next."""
    episodes: int = 50
    """Episodes of each condition."""
    seed: int = 0
    """First seed; the others follow."""
    processes: int = 1
    """Conditions that run at the same time."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also write the JSON here."""


def run(args: Args) -> int:
    """Print one row for each condition and the JSON."""
    from ..sim import campaign, rollout, scene, tasks  # Unsupported without the extra `sim`

    if args.episodes < 1 or args.processes < 1 or args.seed < 0:
        raise ConfigError("--episodes and --processes must be at least 1, --seed at least 0")
    names = tuple(tasks.TASKS) if args.task == ("all",) else tuple(tasks.task(name).name for name in args.task)
    delays = rollout.ticks(args.delay_ms, scene.CONTROL_HZ)
    cells = [
        campaign.Cell(name, belt, mode, args.execute_ticks, (delay,))
        for name, belt, mode, delay in itertools.product(names, args.belt or (None,), args.mode, delays)
    ]
    seeds = range(args.seed, args.seed + args.episodes)
    work = campaign.run_cells(cells, seeds, processes=args.processes)
    outcomes = list(track(work, description="conditions", total=len(cells), console=console))
    table = Table(title=f"{args.policy}, {args.episodes} episodes each, equal seeds")
    for head in ("task", "belt", "mode", "delay, ms", "success", "95 % interval", "time, s", "age, ms", "wrong"):
        table.add_column(head, justify="left" if head in ("task", "belt", "mode") else "right")
    for one in outcomes:
        cell, (low, high) = one.cell, one.interval
        time = "" if one.median_time_to_success_s is None else f"{one.median_time_to_success_s:.2f}"
        age = "" if one.observation_age_ms is None else f"{one.observation_age_ms:.0f}"
        delay = f"{cell.delay_ticks[0] * 1000 / scene.CONTROL_HZ:.0f}"
        interval = f"{low:.1%} to {high:.1%}"
        table.add_row(
            cell.task, cell.belt or "", cell.mode, delay, f"{one.rate:.1%}", interval, time, age, str(one.wrong_object)
        )
    console.print(table)
    document = result("simulate", campaign.as_json(outcomes, seeds), environment=collect())
    if args.output is not None:
        write_result(args.output, document)
    emit(document)
    return OK
