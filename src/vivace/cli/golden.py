"""`vivace golden DIR`: replay fixtures of openpi and LeRobot stage by stage. Exit 1 if any stage fails."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.progress import track
from rich.table import Table

from ..check import environment, results
from ..check.golden import folders, replay
from ..check.rows import Row
from .output import FAILED, OK, console, emit


@dataclass(frozen=True)
class Args:
    """Replay fixtures that openpi, LeRobot and Orbax wrote, and compare every stage.

    Example: vivace golden path/to/golden
    """

    folder: tyro.conf.Positional[Path]
    """A fixture folder (with case.json), or a folder of them."""
    verbose: bool = False
    """Show every row, not only the worst of each stage."""


def run(args: Args) -> int:
    """Replay, print, judge."""
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for folder in track(folders(args.folder), "replaying", console=console, transient=True):
        found, seconds[folder.name] = replay(folder)
        rows += found
    failed = [row for row in rows if not row.passed]
    console.print(_table(rows if args.verbose else _worst(rows)))
    for row in failed:
        console.print(
            f"FAILED {row.case} / {row.stage}: {row.error:.3g} > {row.tolerance:.3g} ({row.note})", markup=False
        )
    console.print(f"{len(rows) - len(failed)} of {len(rows)} comparisons passed in {len(seconds)} cases")
    body = {"passed": not failed, "rows": [asdict(row) for row in rows], "seconds": seconds}
    emit(results.result("golden", body, environment=environment.collect()))
    return FAILED if failed else OK


def _worst(rows: Iterable[Row]) -> list[Row]:
    """Of each case and stage family the row nearest to (or furthest beyond) its bound."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.case, row.stage.partition(".")[0].partition(" ")[0])
        if key not in worst or _closeness(row) > _closeness(worst[key]):
            worst[key] = row
    return list(worst.values())


def _closeness(row: Row) -> float:
    if not row.passed:
        return float("inf")
    return row.error / row.tolerance if row.tolerance else row.error


def _table(rows: Iterable[Row]) -> Table:
    table = Table(title="golden fixtures")
    for column in ("case", "stage", "error", "bound", "", "compared"):
        table.add_column(column, justify="right" if column in ("error", "bound") else "left")
    for row in rows:
        mark = "[green]pass[/green]" if row.passed else "[red]FAIL[/red]"
        table.add_row(row.case, row.stage, f"{row.error:.2g}", f"{row.tolerance:.2g}", mark, row.note)
    return table
