"""Where the verbs write: people read tables on stderr, machines read JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .codes import BAD_USE, FAILED, OK

__all__ = ["BAD_USE", "FAILED", "OK", "console", "emit", "show_coverage"]

# a log file has no width: keep tables whole there instead of folding them at 80 columns
console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


def emit(result: Any) -> None:
    """Write one JSON document to stdout."""
    json.dump(result, sys.stdout, indent=1, default=str, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def show_coverage(rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Print a coverage table (rows of `precision.coverage.as_json`), layers that ran alike as one row; fallbacks in red."""
    from ..precision.coverage import Row, grouped  # torch, which `vivace doctor` must not need

    table = Table(title=escape(title), caption="shares of the operations and bytes of one inference")
    for head in ("part", "operation", "layers", "kernel", "precision", "FLOPs", "bytes"):
        table.add_column(head, justify="right" if head in ("layers", "FLOPs", "bytes") else "left", no_wrap=True)
    for group in grouped([Row(**row) for row in rows]):
        cells = [str(group[key]) for key in ("part", "operation", "layers", "kernel", "precision")]
        cells += [f"{group['flops_share']:.1%}", f"{group['bytes_share']:.1%}"]
        table.add_row(*cells, style="red" if group["fallback"] else None)
    console.print(table)
    for row in rows:
        if row["fallback"]:
            console.print(f"fell back: {row['layer']} {row['operation']}: {row['fallback']}", style="red", markup=False)
