"""Where the verbs write: people read tables on stderr, machines read JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..check.environment import writable
from ..check.results import write_result
from ..errors import ConfigError
from .codes import BAD_USE, FAILED, OK

__all__ = [
    "BAD_USE",
    "FAILED",
    "OK",
    "console",
    "deliver",
    "emit",
    "refuse_output",
    "refuse_output_folder",
    "show_coverage",
]

# a log file has no width: keep tables whole there instead of folding them at 80 columns
console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


def emit(result: Any) -> None:
    """Write one JSON document to stdout."""
    json.dump(result, sys.stdout, indent=1, default=str, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def deliver(document: Mapping[str, Any], output: Path | None) -> None:
    """Write one result to stdout, and to the file that -o names. Raises ConfigError if that cannot be written."""
    emit(document)  # first: what was measured for minutes is not lost with the file
    if output is not None:
        write_result(output, document)


def refuse_output(path: Path | None) -> None:
    """Raise ConfigError if no file can be written at `path`: asked before the work that it is for. None is fine."""
    if path is None:
        return
    if os.path.exists(path) and not os.path.isfile(path):
        got = "a folder" if os.path.isdir(path) else "something that is no file"
        raise ConfigError(f"cannot write {path}", got=got, wanted="the name of a file")
    _refuse_parent(path, path.parent)


def refuse_output_folder(path: Path) -> None:
    """The same for a folder in which files are to be written; it need not exist."""
    _refuse_parent(path, path)


def _refuse_parent(path: Path, folder: Path) -> None:
    """Nothing is created: the nearest folder that exists decides."""
    if reason := writable(folder):
        raise ConfigError(f"cannot write {path}", got=reason, wanted="a place that you can write to")


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
