"""`vivace record OUT`: demonstrations of the scripted expert as a LeRobot dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import ConfigError
from ..places import writable_folder
from .output import OK, console, emit
from .policy_args import require


@dataclass(frozen=True)
class Args:
    """Record episodes with noise in the executed actions and clean labels, in LeRobot's dataset format v3.0.

    Example: vivace record demos --task static conveyor --episodes 50 --processes 2
    """

    out: tyro.conf.Positional[Path]
    """New folder for the dataset."""
    task: tuple[str, ...] = ("static", "conveyor")
    """Names of vivace.sim.tasks."""
    belt: str = ""
    """Belt speed of all tasks: off, slow, middle, fast, fastest; default: each task's own."""
    episodes: int = 50
    """Episodes of each task. Those in which the disturbed expert fails are left out."""
    sigma: tuple[float, ...] = (0.0, 0.25, 0.5)
    """Noise levels in action units (1 = 0.5 m/s); each episode draws one."""
    image_px: int = 224
    """Views are image_px x image_px."""
    horizon: int = 24
    """Length of the expert's plan that is stored with every frame."""
    seed: int = 0
    """Other seeds give other episodes."""
    processes: int = 1
    """Simulators that run at the same time; the data does not depend on it."""


def run(args: Args) -> int:
    """Record with a progress bar; prints one JSON line of facts."""
    from ..sim.record import Plan, Source, record  # Unsupported without the extra `sim`
    from ..train.stored import write_demos

    plan = Plan(
        tuple(Source(task, args.episodes, args.belt) for task in args.task), seed=args.seed, image_px=args.image_px,
        horizon=args.horizon, sigma=args.sigma,
    )  # fmt: skip
    require("--processes", args.processes, least=1)
    if args.out.is_dir() and any(args.out.iterdir()):
        raise ConfigError(f"{args.out} exists already", wanted="a new or empty folder")
    writable_folder(args.out, name="the folder of the dataset")
    total = len(plan.jobs())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("episodes", total=total)
        demos = record(plan, processes=args.processes, progress=lambda count: bar.advance(task, count))
        info = write_demos(args.out, demos, plan)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    kept, frames = info["total_episodes"], info["total_frames"]
    console.print(
        f"{args.out}: {kept} of {total} episodes succeeded and were kept, {frames} frames, {size / 1e6:,.1f} MB",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    facts = {"path": str(args.out), "episodes": kept, "attempted": total, "frames": frames, "bytes": size}
    emit({**facts, "tasks": args.task, "seed": args.seed, **info["vivace"]})
    return OK
