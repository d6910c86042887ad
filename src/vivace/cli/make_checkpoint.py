"""`vivace make-checkpoint OUT`: a random checkpoint of any size in any of the three formats, complete enough to serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoints.make import Format, Recipe, make_checkpoint
from ..checkpoints.make_settings import Dtype, Robot
from ..checkpoints.sizes import SIZES, Size
from ..types import PolicyKind
from .output import OK, console, emit


@dataclass(frozen=True)
class Args:
    """Write a random checkpoint; the weights depend on size, kind, seed and outliers only, not on the format."""

    out: tyro.conf.Positional[Path]
    """Folder to write."""
    size: Size = "tiny"
    """tiny: unit tests; small: CPU demos; base: 0.3 B; full: the real pi0 / pi0.5 dimensions, 6.7 GB in bfloat16."""
    kind: PolicyKind = "pi05"
    """Which policy."""
    format: Format = "lerobot"
    """Whose folder layout; jax needs vivace[jax-checkpoints]."""
    seed: int = 0
    """The same seed gives the same weights in every format."""
    dtype: Dtype = "float32"
    """Storage and declared compute dtype."""
    outliers: int = 0
    """Channels per stack that are 20 times louder than the rest, as trained networks have; hard for low precision."""
    horizon: int = 50
    """Actions per chunk (a jax folder cannot store it)."""
    cameras: tuple[str, ...] = ("front", "wrist")
    """LeRobot: camera names."""
    state_dim: int = 8
    """LeRobot: numbers of the robot's state."""
    action_dim: int = 7
    """LeRobot: numbers of one action."""
    robot: Robot = "libero"
    """openpi and jax: whose statistics to write."""
    tokenizer: bool = True
    """Ship a toy tokenizer (its ids are not PaliGemma's)."""
    overwrite: bool = False
    """Replace a checkpoint that is already there."""


def run(args: Args) -> int:
    """Write the folder with a progress bar; prints one JSON line of facts."""
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__})
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"writing {args.out}", total=recipe.parameters())
        model = make_checkpoint(args.out, recipe, overwrite=args.overwrite, progress=lambda n: bar.advance(task, n))
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    console.print(
        f"{args.out}: {args.kind} {args.size} ({SIZES[args.size].about}), {recipe.parameters() / 1e6:,.1f} M parameters, "
        f"{size / 1e6:,.1f} MB, {args.format} format",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    facts = {"path": str(args.out), "parameters": recipe.parameters(), "bytes": size, "kind": model.kind}
    emit({**facts, "size": args.size, "format": args.format, "dtype": args.dtype, "seed": args.seed})
    return OK
