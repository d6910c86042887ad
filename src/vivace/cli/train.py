"""`vivace train RECIPE.toml`: from demonstrations to a checkpoint folder, with success rates."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..errors import ConfigError
from .output import OK, console, emit

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Args:
    """Train a policy from a recipe. The folder gets policy/ (LeRobot's format), log.jsonl and state.safetensors.

    Example: vivace train recipes/conveyor_small.toml --out runs/small --device cuda
    """

    recipe: tyro.conf.Positional[Path]
    """TOML file, see docs/guides/training.md."""
    out: Path = Path("run")
    """Folder of the run; must have no policy yet."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto = cuda if there is one."""
    resume: bool = False
    """Go on from state.safetensors in the folder."""
    seconds: float | None = None
    """End in about this time: fewer episodes and steps than the recipe says, as the log then tells."""
    also: tuple[Literal["openpi", "jax"], ...] = ()
    """Write the policy in these formats too, beside policy/."""


def run(args: Args) -> int:
    """Train with a progress bar; one JSON line a report in log.jsonl, the last success rates on stdout."""
    import torch

    from ..train.config import read_recipe  # Unsupported without the extra `sim`
    from ..train.loop import prepare, train

    recipe = read_recipe(args.recipe)
    if args.seconds is not None and not 0.0 < args.seconds < math.inf:
        raise ConfigError("--seconds", got=args.seconds, wanted="a time above 0")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = _device(name)
    state = args.out / "state.safetensors"
    if args.resume and not state.is_file():
        raise ConfigError(f"there is nothing to resume in {args.out}", wanted=state.name, do="leave --resume out")
    prepare(args.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True) as bar,
        (args.out / "log.jsonl").open("a", encoding="utf-8") as log,
    ):
        told = Told(bar, log, recipe.optimise.steps)
        folder = train(
            recipe, args.out, device=device, report=told, resume=state if args.resume else None,
            compiled=device.type == "cuda", seconds=args.seconds, also=args.also,
        )  # fmt: skip
    console.print(f"{folder}: {told.summary()}", highlight=False, markup=False, soft_wrap=True)
    emit({"policy": str(folder), "log": str(args.out / "log.jsonl"), "success": told.rates})
    return OK


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("--device", got=repr(name), wanted="cpu, cuda, cuda:1 ... or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("--device", got=repr(name), wanted="cpu, cuda, cuda:1 ... or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError("no such CUDA device", got=name, do="use --device cpu, or install a CUDA build of torch")
    return device


class Told:
    """Takes reports: writes them down, moves the bar."""

    def __init__(self, bar: Progress, log: Any, steps: int) -> None:
        self._bar, self._log, self._began = bar, log, time.perf_counter()
        self._recording: TaskID | None = None
        self._training = bar.add_task("steps", total=steps)
        self.rates: list[dict[str, Any]] = []
        self._loss: float | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        """One report."""
        self._log.write(json.dumps({"t_s": round(time.perf_counter() - self._began, 2), **row}) + "\n")
        self._log.flush()
        if row["event"] == "recorded":
            if self._recording is None:
                self._recording = self._bar.add_task("episodes recorded", total=row["of"])
            self._bar.update(self._recording, completed=row["episodes"])
        elif row["event"] == "cut":
            self._bar.update(self._training, total=row["steps"])
        elif row["event"] == "step":
            self._loss = row["loss"]
            self._bar.update(self._training, completed=row["step"], description=f"steps, loss {row['loss']:.3f}")
        elif row["event"] == "success":
            self.rates = row["rates"]

    def summary(self) -> str:
        """Of the run, for people."""
        parts = [] if self._loss is None else [f"last loss {self._loss:.3f}"]
        parts += [
            f"{one['task']} {one['successes']}/{one['n']} ({one['interval'][0]:.0%} to {one['interval'][1]:.0%})"
            for one in self.rates
        ]
        return ", ".join(parts) or "no step was taken"
