"""`vivace budget RESULT`: what must shrink, and by how much, to reach a rate, on the measured GPU or on another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from ..check.budget import Budget, budget, read_run
from ..check.gpus import find_gpu
from ..check.results import read_result, result
from .output import OK, console, deliver, refuse_output


@dataclass(frozen=True)
class Args:
    """Hold one measured run against a target rate.

    Example: vivace budget bench.json --target-hz 20 --gpu thor
    """

    result: tyro.conf.Positional[Path]
    """A file of `vivace bench -o`, or a hand-written one with stages_ms (docs/measured.md)."""
    target_hz: float | None = None
    """Inferences per second to reach."""
    control_hz: float | None = None
    """The robot's control rate; with --execution-horizon this is another way to name the target."""
    execution_horizon: int | None = None
    """Actions executed per inference."""
    gpu: str | None = None
    """Scale to this GPU by roofline (a model, not a measurement), e.g. h100, rtx-5090, orin, thor."""
    precision: Literal["float32", "bfloat16", "fp8", "int8", "fp4"] | None = None
    """Precision of the floors; default: that of the run."""
    engine: str | None = None
    """Which engine of the result; default: the one with the lowest median."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also write the JSON here."""


def run(args: Args) -> int:
    """Print the table and the JSON. A target that cannot be met is an answer, not a failure: exit code 0."""
    refuse_output(args.output)
    measured = read_run(read_result(args.result), engine=args.engine)
    answer = budget(
        measured,
        target_hz=args.target_hz,
        gpu=find_gpu(args.gpu) if args.gpu else None,
        control_hz=args.control_hz,
        execution_horizon=args.execution_horizon,
        precision=args.precision,
    )
    document = result("budget", {"measured": measured, "budget": answer})
    _show(answer)
    deliver(document, args.output)
    return OK


def _show(answer: Budget) -> None:
    title = (
        f"{answer.target_hz:.4g} Hz = {answer.budget_ms:.1f} ms; now {answer.total_ms:.1f} ms = {answer.rate_hz:.1f} Hz"
    )
    table = Table(title=title, caption=escape(answer.basis))
    for name in ("stage", "ms", "share", "if alone, ms", "times faster", "if evenly, ms", "floor, ms"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in answer.stages:
        alone = "impossible" if stage.alone_ms is None else f"{stage.alone_ms:.1f}"
        if stage.alone_ms is not None and stage.floor_ms is not None and stage.alone_ms < stage.floor_ms:
            alone += " (below floor)"
        factor = "" if stage.alone_factor is None else f"{stage.alone_factor:.2f}x"
        floor = "" if stage.floor_ms is None else f"{stage.floor_ms:.3g} ({stage.bound})"
        share, evenly = f"{stage.share:.1%}", f"{stage.evenly_ms:.1f}"
        table.add_row(stage.stage, f"{stage.ms:.1f}", share, alone, factor, evenly, floor)
    console.print(table)
    floor = "" if answer.floor_ms is None else f", sum of floors {answer.floor_ms:.3g} ms"
    shrink = f"must shrink by {answer.must_shrink_ms:.1f} ms ({answer.factor:.2f}x)"
    console.print(f"verdict: [bold]{answer.verdict}[/]; {shrink}{floor}")
    for note in answer.notes:
        console.print(escape(note), highlight=False)
