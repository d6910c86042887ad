"""`vivace make-checkpoint OUT`: a random checkpoint of any size in any of the three formats, complete enough to serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoints.make import Recipe, make_checkpoint
from ..checkpoints.sizes import SIZES
from .output import OK, console, emit


@dataclass(frozen=True)
class Args:
    """Write a random checkpoint; the weights depend on size, kind, seed and outliers only, not on the format."""

    out: tyro.conf.Positional[Path]
    """Folder to write."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """What to write; its fields are options of this verb."""
    overwrite: bool = False
    """Replace a checkpoint that is already there."""


def run(args: Args) -> int:
    """Write the folder with a progress bar; prints one JSON line of facts."""
    recipe = args.recipe
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
        f"{args.out}: {recipe.kind} {recipe.size} ({SIZES[recipe.size].about}), "
        f"{recipe.parameters() / 1e6:,.1f} M parameters, {size / 1e6:,.1f} MB, {recipe.format} format",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    facts = {"path": str(args.out), "parameters": recipe.parameters(), "bytes": size, "kind": model.kind}
    emit({**facts, "size": recipe.size, "format": recipe.format, "dtype": recipe.dtype, "seed": recipe.seed})
    return OK
