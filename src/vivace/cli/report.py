"""`vivace report RESULT...`: one self-contained HTML page from result files and clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..check.report import build
from ..check.report_clip import Clip, is_clip, read_clip
from ..check.report_training import is_log, read_log
from ..check.results import read_result, write_text
from ..errors import ConfigError
from .output import OK, console, emit, refuse_output


@dataclass(frozen=True)
class Args:
    """Make one page of tables and plots from result files, in the order given.

    Example: vivace report doctor.json check.json bench.json clip.webp -o report.html
    """

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files written with -o, or the JSON that a command printed; the log.jsonl of vivace train; clips of vivace simulate
    --video: .webp, .gif, .mp4."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page."""
    title: str = "vivace report"
    """Heading of the page."""


def run(args: Args) -> int:
    """Write the page and say where."""
    refuse_output(args.output)
    documents = [(path.name, _read(path)) for path in args.results]
    page = build(documents, title=args.title)
    write_text(args.output, page)
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


def _read(path: Path) -> dict[str, Any] | Clip:
    """A result, a clip or a training's log, by the ending. Raises ConfigError."""
    if is_clip(path):
        return read_clip(path)
    if is_log(path):
        return read_log(path)
    try:
        found = read_result(path)
        if not isinstance(found.get("kind"), str):
            got = f"keys {', '.join(list(found)[:4])}" if found else "an empty object"
            raise ConfigError(
                f"{path.name} is no result: it does not say its kind", got=got, wanted="the JSON of a command"
            )
        return found
    except ConfigError as error:
        if path.suffix.lower() in ("", ".json") or not path.exists():
            raise
        raise ConfigError(
            f"{path.name} is neither a result nor a clip", got=f"a file {path.suffix}",
            wanted="the JSON of a command, a training's log.jsonl, or a clip: .webp, .gif, .mp4",
        ) from error  # fmt: skip
