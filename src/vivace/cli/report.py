"""`vivace report RESULT...`: one self-contained HTML page from result files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..check.report import build
from ..check.results import read_result
from .output import OK, console, emit


@dataclass(frozen=True)
class Args:
    """Make one page of tables and plots from result files, in the order given.

    Example: vivace report doctor.json check.json bench.json -o report.html
    """

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files written with -o, or the JSON that a command printed."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page."""
    title: str = "vivace report"
    """Heading of the page."""


def run(args: Args) -> int:
    """Write the page and say where."""
    documents = [(path.name, read_result(path)) for path in args.results]
    page = build(documents, title=args.title)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page, encoding="utf-8")
    console.print(f"report: {args.output}", highlight=False, markup=False)
    emit(
        {
            "schema": 1,
            "kind": "report",
            "path": str(args.output),
            "bytes": len(page.encode()),
            "results": len(documents),
        }
    )
    return OK
