"""The section of a training: loss and success against the step, and the success rates as a table.

Reads the reports of `vivace train`: the lines of the log.jsonl in its run's folder, or the `log` of a stored result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .report_html import esc, figures, num, table, tiles
from .report_plots import INK, SERIES, SOFT, Canvas, legend_below
from .results import SCHEMA, number

Document = Mapping[str, Any]
Row = Mapping[str, Any]
MARKERS = ("o", "^", "D", "v", "P", "X")


def is_log(path: Path) -> bool:
    """Whether the ending is that of a training's log."""
    return path.suffix.lower() == ".jsonl"


def read_log(path: Path) -> dict[str, Any]:
    """A log of `vivace train` as a result of kind train, without a machine: the log does not say it.

    Raises: ConfigError where the file is missing, is no text, or has a line that is no report.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}", got=error) from error
    rows = []
    for at, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path.name}, line {at}, is no JSON", got=error, wanted="a log of vivace train"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("event"), str):
            raise ConfigError(f"{path.name}, line {at}, is no report of a training", got=line[:80], wanted="an event")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path.name} is empty", wanted="a log of vivace train")
    return {"schema": SCHEMA, "kind": "train", "log": rows}


def section(document: Document) -> str:
    """The inside of one report section. Raises KeyError or TypeError for a document that lacks its kind's keys."""
    log: Sequence[Row] = document["log"]
    steps, rates = losses(log), successes(log)
    data = [row for row in log if row["event"] == "data"][-1:]
    added = sum(int(row["examples"]) for row in _last_of(log, "corrected"))
    top = [
        *([(f"{steps[-1]['step']:,}", "steps"), (num(steps[-1]["loss"]), "last loss")] if steps else []),
        *((f"{row['examples']:,}", "examples recorded") for row in data),
        *([(f"{added:,}", "examples of corrections")] if added else []),
    ]
    drawn = []
    if steps:
        at = sorted({int(row["step"]) for row in _last_of(log, "corrected")})
        drawn.append((loss_curve(steps, at), "flow-matching loss of the last batch before each report"))
    if rates:
        drawn.append(
            (
                success_points(rates, last=int(steps[-1]["step"]) if steps else 0),
                "bars: Wilson, 95 %; corrections run on other seeds than held out",
            )
        )
    note = document.get("note")
    return "".join(
        [
            f'<p class="soft">{esc(note)}</p>' if note else "",
            tiles([(esc(value), name) for value, name in top]),
            figures(drawn),
            _rate_table(rates) if rates else "",
        ]
    )


def losses(log: Sequence[Row]) -> list[Row]:
    """The reports of steps that led to the policy: a run that went on from an earlier step replaces what came after it."""
    kept: list[Row] = []
    for run in _runs(log):
        mine = [row for row in run if row["event"] == "step"]
        if mine:
            kept = [row for row in kept if row["step"] < mine[0]["step"]] + mine
    return kept


def successes(log: Sequence[Row]) -> list[Row]:
    """A row for each success rate: those of `rates` with its step and what it was measured for, as `name`.

    name: "held out" or "corrections", of late plans with their delay.
    """
    found: list[Row] = []
    for event in ("corrected", "success"):
        for report in _last_of(log, event):
            late = report.get("delay_ticks")  # logs of before there were late corrections do not say
            name = "held out" if event == "success" else f"corrections, {late} ticks late" if late else "corrections"
            found += [{**rate, "step": report["step"], "name": name} for rate in report["rates"]]
    return found


def loss_curve(steps: Sequence[Row], corrections: Sequence[int]) -> str:
    """Loss against the step, logarithmic where it spans a factor of ten; dotted lines where corrections were added."""
    canvas = Canvas("Training loss", height=3.3)
    values = [number(row["loss"]) for row in steps]
    canvas.axes.plot(
        [row["step"] for row in steps], values, ".-", color=SERIES[0], markersize=4, linewidth=1.3, label="loss"
    )
    for i, step in enumerate(corrections):
        name = None if i else "corrections added"
        canvas.axes.axvline(step, color=SOFT, linestyle=":", linewidth=1.3, label=name)
    positive = [value for value in values if math.isfinite(value) and value > 0]
    wide = len(positive) == len(values) and max(positive) >= 10 * min(positive)
    canvas.axes.set(xlabel="step", ylabel="loss (logarithmic)" if wide else "loss")
    if wide:
        canvas.axes.set_yscale("log")
    legend_below(canvas)
    return canvas.svg()


def success_points(rates: Sequence[Row], *, last: int) -> str:
    """% success with its interval against the step: a colour for each task and belt, a mark for what was measured.

    last: step that the training got to.
    """
    places = list(dict.fromkeys(map(_place, rates)))
    names = list(dict.fromkeys(row["name"] for row in rates))
    canvas = Canvas("Success on the way", height=2.8 + 0.2 * math.ceil((len(places) + len(names)) / 2))
    for i, place in enumerate(places):
        moved, colour = canvas.moved(6 * (i - (len(places) - 1) / 2)), SERIES[i % 5]
        for row in (row for row in rates if _place(row) == place):
            low, high = (100 * number(side) for side in row["interval"])
            canvas.axes.vlines(row["step"], low, high, color=colour, linewidth=1.2, transform=moved)
            canvas.axes.plot(
                row["step"], 100 * number(row["rate"]), MARKERS[names.index(row["name"]) % 6], color=colour, markersize=5,
                transform=moved,
            )  # fmt: skip
        canvas.axes.plot([], [], color=colour, linewidth=4, label=place)
    for i, name in enumerate(names):
        canvas.axes.plot([], [], MARKERS[i % 6], color=INK, markersize=5, label=name)
    canvas.axes.set(
        xlabel="step", ylabel="% success", ylim=(-2, 102), xlim=(0, 1.05 * max(last, *(row["step"] for row in rates)))
    )
    legend_below(canvas)
    return canvas.svg()


def _runs(log: Sequence[Row]) -> list[list[Row]]:
    """The log of one folder, cut where a run began: each reports its data once, before its first step."""
    runs: list[list[Row]] = [[]]
    for row in log:
        if row["event"] == "data":
            runs.append([])
        runs[-1].append(row)
    return runs


def _last_of(log: Sequence[Row], event: str) -> list[Row]:
    """An event's reports by the last run that has any: a resumed run makes the earlier corrections again."""
    found = ([row for row in run if row["event"] == event] for run in reversed(_runs(log)))
    return next(filter(None, found), [])


def _place(row: Row) -> str:
    return str(row["task"]) if row["belt"] == "task's own" else f"{row['task']}, {row['belt']} belt"


def _rate_table(rates: Sequence[Row]) -> str:
    heads = ("task", "measured", "step", "success", "95 %", "wrong")
    rows = []
    for row in rates:
        low, high = (f"{100 * number(side):.1f}" for side in row["interval"])
        size = [f"{row['step']:,}", f"{row['successes']} / {row['n']}", f"{low} to {high}", str(row["wrong_object"])]
        rows.append([esc(_place(row)), esc(row["name"]), *size])
    return table(heads, rows, text_columns=(0, 1))
