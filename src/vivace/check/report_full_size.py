"""The report's section of a full-size benchmark: what was missed, the waterfall, every row with its marks, the proofs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import report_plots as plots
from .report_html import esc, figures, fold, num, pairs, pill, table, tiles, verdict
from .results import number
from .targets import TABLES
from .waterfall import Step, merged, settings, waterfall

Document = Mapping[str, Any]
LONG_NUMBER = re.compile(r"\d+\.\d{6,}")
BOUNDARIES = {
    "B0": "replay on device buffers", "B0 reuse": "of the denoise stage alone", "B1": "with copies in and out",
    "B2": "policy.infer, host arrays to host actions", "B3": "websocket round trip on one machine, vivace's client",
    "B3 openpi": "the same through openpi's client, not judged",
}  # fmt: skip


def hopper(document: Document, beside: Sequence[tuple[str, Document]] = (), above: str = "") -> str:
    """A result of `vivace bench --preset hopper`.

    beside  further results, by file name, whose rows stand in the same waterfalls
    above   the file whose section has the waterfalls with this one's rows; "" = this one's
    """
    named = settings(document)
    whole = merged([document, *(other for _, other in beside)])
    steps = {} if above else {name: waterfall(whole, name) for name in settings(whole)}
    replays = [row for row in document["rows"] if row["boundary"] == "B0"]
    fastest = [min((r for r in replays if r["setting"] == name), key=_p50) for name in named]
    top = [(f"{num(_p50(row))} ms", f"{row['engine']}, ({row['setting']})") for row in fastest]
    judged = any(row.get("targets") for name in TABLES for row in document.get(name, []))
    top.append((str(len(document["missed"])), "marks missed") if judged else ("none", "marks: nothing here is judged"))
    missed = "".join(
        f"<li>{esc(LONG_NUMBER.sub(lambda found: num(found[0], 4), line))}</li>" for line in document["missed"]
    )
    skipped = "".join(
        f"<li>{esc(row['phase'])}, {esc(row['what'])}: {esc(row['why'])}</li>" for row in document["not_run"]
    )
    return "".join(
        [
            f'<p class="soft">{esc(document["setup"]["weights"])}. Batch 1, 10 steps; (views, prompt tokens, chunk).</p>',
            tiles([(esc(value), what) for value, what in top]),
            f"<h3>Missed</h3><ul>{missed}</ul>" if missed else "",
            f"<h3>Not run</h3><ul>{skipped}</ul>" if skipped else "",
            _whence([name for name, _ in beside], above),
            *(_waterfall(name, found) for name, found in steps.items() if len(found) > 1),
            "<h3>Latency, milliseconds</h3>" + _boundaries(document["rows"]) + _latency(document["rows"]),
            _rivals(document["rows"]),
            fold("stages, rates and floors", _ceilings(document) + _rates(document["rows"], document.get("ceilings"))),
            "<h3>Actions against float32</h3>" + _accuracy(document["accuracy"]),
            _rest(document),
        ]
    )


def _boundaries(rows: Sequence[Document]) -> str:
    """What the second column means, as far as it comes up."""
    seen = {row["boundary"] for row in rows}
    said = "; ".join(f"{name}: {what}" for name, what in BOUNDARIES.items() if name in seen)
    return f'<p class="soft">{esc(said)}.</p>' if said else ""


def _whence(beside: Sequence[str], above: str) -> str:
    """Which files the rows of the waterfalls come from, where it is not this one alone."""
    if above:
        return f'<p class="soft">The rows of this result stand in the waterfalls of {esc(above)}.</p>'
    if not beside:
        return ""
    files = esc(", ".join(beside))
    return f'<p class="soft">The waterfalls also have rows of {files}: other runs, on a GPU of the same name.</p>'


def _p50(row: Document) -> float:
    return number(row["latency"]["p50_ms"])


def _waterfall(name: str, steps: Sequence[Step]) -> str:
    rows = [
        [
            f"{esc(step.engine)}", esc(step.adds), num(step.p50_ms, 4), f"{num(step.of_above)}x", f"{num(step.of_first)}x",
            num(step.rel_l2), f"{step.cosine_mean:.6f}", f"{step.cosine_worst:.6f}",
        ]
        for step in steps
    ]  # fmt: skip
    heads = [
        "engine",
        "adds",
        "p50 at B0, ms",
        "of the row above",
        "of the first",
        "relative L2",
        "mean cosine",
        "worst cosine",
    ]
    plot = plots.step_bars(
        [step.engine.removeprefix("cuda_graph ") for step in steps],
        [step.p50_ms for step in steps], [step.rel_l2 for step in steps],
    )  # fmt: skip
    return (
        f"<h3>Waterfall, ({esc(name)})</h3>"
        + figures([(plot, "error = relative L2 of the final actions against float32")])
        + table(heads, rows, text_columns=(0, 1))
    )


def _latency(rows: Sequence[Document]) -> str:
    cells = []
    for row in rows:
        times = [num(row["latency"][key], 4) for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        same = row.get("bit_identical")
        cells.append([
            f"({esc(row['setting'])}) {esc(row['engine'])}", esc(row["boundary"]), *times, str(row["calls"]),
            f"{same['same']} / {same['of']}" if same else "-", marks(row),
        ])  # fmt: skip
    return table(
        ["setting, engine", "", "p50", "p95", "p99", "max", "calls", "same bits", "marks"], cells, text_columns=(8,)
    )


def marks(row: Document) -> str:
    """The marks of one row, each with what was got."""
    return "".join(
        pill(
            f"{one['what']} {num(one['got'])} / {num(one['must'])}" + (" stretch" if one["stretch_met"] else ""),
            "good" if one["must_met"] else "bad",
        )
        for one in row.get("targets", [])
    )


def _rivals(rows: Sequence[Document]) -> str:
    """How much faster vivace's engines were, called in turn with engines of others: by setting, then by boundary."""
    timed = [row for row in rows if row.get("ours_in_the_same_rounds")]
    named = list(dict.fromkeys(row["setting"] for row in rows))
    cells = [
        [
            f"({esc(row['setting'])}) {esc(row['engine'])}", esc(row["boundary"]),
            *(num(row["latency"][key], 4) for key in ("p50_ms", "p95_ms", "p99_ms")), str(row["calls"]),
            esc(name), num(one["p50_ms"], 4), f"{num(one['ratio'])}x",
        ]
        for row in sorted(timed, key=lambda row: (named.index(row["setting"]), row["boundary"]))
        for name, one in row["ours_in_the_same_rounds"].items()
    ]  # fmt: skip
    heads = ["setting, engine", "", "p50", "p95", "p99", "calls", "vivace, in the same rounds", "p50", "faster"]
    return "<h3>Beside engines of others</h3>" + table(heads, cells, text_columns=(6,)) if cells else ""


def _ceilings(document: Document) -> str:
    """The rates that large work reaches on this GPU, and those of its datasheet."""
    lines = []
    for key, what in (("ceilings", "large work"), ("published", "the datasheet")):
        if found := document.get(key):
            said = "not measured, taken" if found.get("measured") is False else "measured"
            said = "published" if key == "published" else said
            lines.append(
                f"{what} ({said}): {num(found['bf16_tflops'])} TFLOP/s in bfloat16, {num(found['fp8_tflops'])} in FP8, "
                f"{num(found['copy_gb_s'])} GB/s"
            )
    return f'<p class="soft">Ceilings: {esc("; ".join(lines))}.</p>' if lines else ""


def _ceiling_of(rate: Document, ceilings: Document | None) -> tuple[str, str]:
    """(TFLOP/s, GB/s) that a stage of this share of FP8 could reach."""
    if not ceilings:
        return "-", "-"
    share = number(rate["fp8_share"])
    mixed = 1.0 / (share / number(ceilings["fp8_tflops"]) + (1.0 - share) / number(ceilings["bf16_tflops"]))
    return num(mixed), num(ceilings["copy_gb_s"])


def _rates(rows: Sequence[Document], ceilings: Document | None) -> str:
    cells = []
    for row in rows:
        for stage, ms in row.get("stages_ms", {}).items():
            first = [f"({esc(row['setting'])}) {esc(row['engine'])}", esc(stage), num(ms)]
            rate = row.get("rates", {}).get(stage)
            if rate is None:  # of rivals only the time is known
                cells.append([*first, *["-"] * 6])
                continue
            compute, memory = _ceiling_of(rate, ceilings)
            cells.append([
                *first, num(rate["tflop_s"]), compute, num(rate["gb_s"]), memory, num(rate["floor_ms"]),
                f"{100 * number(rate['of_floor']):.0f} %",
            ])  # fmt: skip
    heads = ["setting, engine", "stage", "ms", "TFLOP/s", "ceiling", "GB/s", "ceiling", "floor, ms", "floor / time"]
    return table(heads, cells, text_columns=(1,))


def _accuracy(rows: Sequence[Document]) -> str:
    cells = [
        [
            f"({esc(row['setting'])}) {esc(row['engine'])}", f"{row['observations']} x {row['noise_draws']}",
            f"{number(row['cosine_mean']):.6f}", f"{number(row['cosine_worst']):.6f}", num(row["rel_l2"]),
            num(row["plain_bfloat16"]["rel_l2"]), marks(row),
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["setting, engine", "samples", "mean cosine", "worst cosine", "relative L2", "plain bfloat16's", "marks"]
    return table(heads, cells, text_columns=(6,))


def _coverage(rows: Sequence[Document]) -> str:
    """What ran where: share of the operations per part, and what no kernel of vivace took."""
    parts = []
    for row in rows:
        named = f"({row['setting']}) {row['engine']}"
        cells = [
            [
                esc(one["part"]), esc(one["operation"]), str(one["layers"]), esc(one["kernel"]), esc(one["precision"]),
                *(f"{100 * number(one[share]):.2f} %" for share in ("flops_share", "bytes_share")), esc(one["fallback"]),
            ]
            for one in row["parts"]
        ]  # fmt: skip
        heads = ["part", "operation", "layers", "kernel", "precision", "FLOPs", "bytes", "fallback"]
        left = f"<p>By plain torch: {esc(', '.join(row['by_torch']) or 'nothing')}.</p>"
        parts.append(marks(row) + fold(f"coverage, {named}", left + table(heads, cells, text_columns=(0, 1, 3, 4, 7))))
    return "<h3>Coverage: what ran where</h3>" + "".join(parts) if parts else ""


def _rest(document: Document) -> str:
    parts = [_coverage(document.get("coverage", []))]
    if proofs := document.get("proof"):
        cells = [
            [f"({esc(row['setting'])}) {esc(row['engine'])}", verdict(bool(row["passed"])), marks(row)]
            for row in proofs
        ]
        heads = ["setting, engine", "", "marks"]
        parts.append("<h3>Fresh, and right over poisoned memory</h3>" + table(heads, cells, text_columns=(2,)))
    for title, key in (("Memory", "memory"), ("Soak", "soak"), ("Start", "start")):
        for row in document.get(key, []):
            parts.append(f"<h3>{title}</h3>{marks(row)}" + fold("figures", pairs(row)))
    return "".join(parts)
