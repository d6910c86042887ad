"""`vivace doctor`: what this machine is, what can run on it, and what to do about the rest. Works when torch is broken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from ..check import health
from .output import FAILED, OK, console, deliver, refuse_output


@dataclass(frozen=True)
class Args:
    """Say what this machine is and what can run on it. Exit code 0 healthy, 1 something needed is broken.

    Example: vivace doctor --tokenizer paligemma_tokenizer.model
    """

    tokenizer: Path | None = None
    """A tokenizer file or folder to look for; pi0 and pi0.5 need one unless the checkpoint folder ships it."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also write the JSON here."""


def run(args: Args) -> int:
    """Print a table on stderr and the findings as JSON on stdout."""
    refuse_output(args.output)
    with console.status("asking every library in a process of its own"):
        checks, facts = health.examine(args.tokenizer)
    _show(checks)
    document = health.document(checks, facts)
    deliver(document, args.output)
    return OK if document["healthy"] else FAILED


def _show(checks: list[health.Check]) -> None:
    table = Table(title="vivace doctor")
    table.add_column("what")
    table.add_column("state")
    table.add_column("found", overflow="fold")
    table.add_column("do", overflow="fold")
    colour = {"fine": "green", "problem": "bold red", "absent": "yellow"}
    for check in checks:
        do = "" if check.state == "fine" else _plain(check.do)
        table.add_row(check.name, f"[{colour[check.state]}]{check.state}[/]", _plain(check.found), do)
    console.print(table)
    broken = "[bold red]something that vivace needs is broken, see above[/]"
    console.print("[green]healthy[/]" if health.healthy(checks) else broken)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
