"""One section of the report per kind of result; a kind that is not known here is shown as what it is: JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import report_plots as plots
from .report_full_size import hopper
from .report_html import esc, figures, fold, num, pairs, pill, raw, table, tiles, verdict
from .report_served import closed_loop, drive, start
from .report_simulation import section as simulate
from .report_training import section as training
from .results import number

Document = Mapping[str, Any]


def render(document: Document) -> str:
    """The inside of one section. Raises KeyError or TypeError only for a document that lacks its kind's keys."""
    return SECTIONS.get(kind_of(document), unknown)(document)


def kind_of(document: Document) -> str:
    """Who wrote a result. `vivace inspect` prints bare facts, in which "kind" is the kind of policy."""
    if "schema" not in document and "stored_dtypes" in document:
        return "inspect"
    return str(document.get("kind", "result"))


def outcome(document: Document) -> str:
    """Pass, fail or what else there is to say, as a pill."""
    if isinstance(passed := document.get("passed", document.get("healthy")), bool):
        return verdict(passed)
    if document.get("kind") == "budget":
        said = str(document["budget"]["verdict"])
        return pill(said, {"met": "good", "below the floor": "bad"}.get(said, "warn"))
    return pill("recorded", "plain")


def machine(environment: Mapping[str, Any]) -> str:
    """One line about the machine that made a result."""
    if not environment:
        return "no environment recorded"
    cpu, gpus = environment.get("cpu") or {}, environment.get("gpus") or []
    parts = [str(gpu.get("name")) for gpu in gpus] or [f"{cpu.get('model')} ({cpu.get('cores_usable')} cores)"]
    parts.append(f"torch {(environment.get('packages') or {}).get('torch')}")
    parts.append(f"Python {environment.get('python')}")
    if commit := environment.get("commit"):
        parts.append(f"commit {str(commit.get('hash'))[:10]}{' + local changes' if commit.get('dirty') else ''}")
    return ", ".join(parts)


def setting(document: Document) -> str:
    """(views, prompt tokens, chunk), steps and device: without these a number is not a result."""
    s = document.get("setting") or {}
    if not s:
        return ""
    size = f"{s.get('views')} views, {s.get('prompt_tokens')} prompt tokens, chunk {s.get('horizon')}"
    return f"{s.get('kind')}, {size}, {s.get('steps')} denoise steps, batch {s.get('batch')}, {s.get('device')}"


def bench(document: Document) -> str:
    """Latency of engines: percentiles, stages, distributions."""
    if "error" in document:
        return f"<p>{esc(document['error'])}</p>"
    engines: Mapping[str, Any] = document["engines"]
    fastest = min(engines, key=lambda name: number(engines[name]["total"]["p50_ms"]))
    row = engines[fastest]
    budgets = document.get("budgets") or {}
    target = next((number(answer["budget_ms"]) for answer in budgets.values()), None)
    top = [
        (f"{num(row['total']['p50_ms'])} ms", f"p50 of {fastest}"),
        (f"{num(row['total']['p99_ms'])} ms", f"p99 of {fastest}"),
        (f"{num(row['rate_hz'])} Hz", "inferences per second"),
        *((f"{num(s['ratio'])}x", f"{s['engine']} over {s['baseline']}") for s in document.get("speedups", [])),
    ]
    samples = {name: engine["samples"]["total_ms"] for name, engine in engines.items()}
    parts = {name: engine["split"]["mean_ms"] for name, engine in engines.items()}
    boundary = document.get("boundary") or {}
    return "".join(
        [
            f'<p class="soft">{esc(setting(document))}. ',
            f"Boundary {esc(boundary.get('name'))}: {esc(boundary.get('what'))}.</p>",
            tiles([(esc(value), what) for value, what in top]),
            _latency_table(engines),
            _speedups(document.get("speedups", [])),
            figures(
                [
                    (
                        plots.stage_stack(parts, target),
                        "other = total - the three",
                    ),
                    (plots.latency_cdf(samples, target), "cut a little beyond p99; the maximum is in the table"),
                    (plots.run_chart(samples), "engines are interleaved, in random order within each round"),
                ]
            ),
            *(_budget_line(name, answer) for name, answer in budgets.items()),
            fold("stages per engine", _stage_table(engines)),
            *(fold(f"coverage of {name}", _coverage(row)) for name, row in engines.items() if row.get("coverage")),
        ]
    )


def check(document: Document) -> str:
    """Accuracy against the float32 reference."""
    if "error" in document:
        return f"<p>{esc(document['error'])}</p>"
    worst, marks = document["summary"]["worst"], document["marks"]
    failed = [mark for mark in marks if not mark["passed"]]
    engine, seen = document["engine"], document["observations"]
    lowest = min((number(r["cosine"]) for r in (*worst["k"], *worst["v"])), default=math.nan)
    top = [
        (f"{len(marks) - len(failed)} / {len(marks)}", "marks passed"),
        (f"{lowest:.6f}", "lowest K, V cosine"),
        (f"{number(worst['actions']['cosine']):.6f}", "actions, worst cosine"),
        (f"{num(worst['actions']['sqnr_db'])} dB", "actions, worst SQNR"),
    ]
    sides = f"{engine['backend']} in {engine['precision']} against eager float32"
    what = f"{sides}, {seen['count']} {seen['source']} observations"
    return "".join(
        [
            f'<p class="soft">{esc(what)}. {esc(setting(document))}.</p>',
            tiles([(esc(value), name) for value, name in top]),
            _marks(failed, "Marks that failed") if failed else "",
            figures(_check_plots(document)),
            _coverage(document),
            "<h3>Stage by stage, worst of all observations</h3>",
            _error_table(_named_errors(worst)),
            _robot_table(worst.get("robot")),
            fold(f"all {len(marks)} marks", _marks(marks, "")),
            "".join(f'<p class="soft">{esc(remark)}</p>' for remark in document.get("remarks", [])),
        ]
    )


def budget(document: Document) -> str:
    """What must shrink to reach a rate."""
    answer = document["budget"]
    top = [
        (f"{num(answer['target_hz'])} Hz", f"target = {num(answer['budget_ms'])} ms"),
        (f"{num(answer['total_ms'])} ms", f"now = {num(answer['rate_hz'])} Hz"),
        (f"{num(answer['must_shrink_ms'])} ms", f"must go ({num(answer['factor'])}x)"),
        (f"{num(answer['floor_ms'])} ms" if answer["floor_ms"] is not None else "-", "sum of roofline floors"),
    ]
    rows = []
    for stage in answer["stages"]:
        alone = "impossible" if stage["alone_ms"] is None else num(stage["alone_ms"])
        if number(stage["alone_ms"]) < number(stage["floor_ms"]):  # false where either is missing
            alone += " (below its floor)"
        factor = "" if stage["alone_factor"] is None else f"{num(stage['alone_factor'])}x"
        floor = "-" if stage["floor_ms"] is None else f"{num(stage['floor_ms'])} ({esc(stage['bound'])})"
        share = f"{100 * number(stage['share']):.1f} %"
        rows.append([esc(stage["stage"]), num(stage["ms"]), share, alone, factor, num(stage["evenly_ms"]), floor])
    heads = ["stage", "ms", "share", "if alone, ms", "times faster", "if evenly, ms", "floor, ms"]
    notes = "".join(f'<p class="soft">{esc(note)}</p>' for note in answer["notes"])
    plot = figures(
        [(plots.budget_bars(answer["stages"]), "floors are lower bounds from published peaks, not predictions")]
    )
    return (
        f'<p class="soft">{esc(answer["basis"])}</p>'
        + tiles([(esc(v), k) for v, k in top])
        + table(heads, rows)
        + plot
        + notes
    )


def golden(document: Document) -> str:
    """Replays of fixtures: a line per case, every stage below."""
    rows: Sequence[Document] = document.get("rows", [])
    cases: dict[str, list[Document]] = {}
    for row in rows:
        cases.setdefault(str(row["case"]), []).append(row)
    lines = [[esc(name), *_case(case)] for name, case in cases.items()]
    failed = [row for row in rows if not row["passed"]]
    top = [(f"{len(rows) - len(failed)} / {len(rows)}", "stages passed"), (str(len(cases)), "cases")]
    every = table(
        ["case", "stage", "error", "tolerance", "", "note"], [_golden_row(row) for row in rows], text_columns=(1, 5)
    )
    shown = table(
        ["case", "stage", "error", "tolerance", "", "note"], [_golden_row(r) for r in failed], text_columns=(1, 5)
    )
    return "".join(
        [
            tiles(top),
            f"<h3>Failed</h3>{shown}" if failed else "",
            table(["case", "stages", "largest error / tolerance", ""], lines),
            fold("every stage", every),
        ]
    )


def calibrate(document: Document) -> str:
    """Ranges of a precision plan, and what each layer costs alone."""
    plan, layers = document["plan"], document["layers"]
    rows = [
        [
            esc(r["layer"]),
            num(r["amax"]),
            num(r["chosen"]),
            str(r["saturated"]),
            str(r["flushed"]),
            num(r["step_spread"]),
        ]
        for r in layers
    ]
    alone = [
        [esc(r["layer"]), num(r["score"]["rel_l2"]), f"{number(r['score']['cosine']):.7f}", num(r["flops"])]
        for r in document.get("sensitivity", [])
    ]
    heads = ["layer", "largest |x|", "range", "saturated", "flushed to 0", "steps max/min"]
    said = f"{plan['name']}, plan {plan['hash']}, {plan['method']}, {plan['data']}, weights {plan['checkpoint_hash']}"
    costs = table(["layer alone in E4M3", "relative L2 of actions", "cosine", "FLOPs"], alone) if alone else ""
    notes = "".join(f'<p class="soft">{esc(remark)}</p>' for remark in document["remarks"])
    return f'<p class="soft">{esc(said)}</p>{costs}{fold(f"ranges of {len(rows)} layers", table(heads, rows))}{notes}'


def doctor(document: Document) -> str:
    """What the machine is and what can run on it."""
    kinds = {"fine": "good", "problem": "bad"}
    rows = [
        [
            esc(c["name"]),
            pill(c["state"], kinds.get(c["state"], "warn")),
            esc(c["found"]),
            esc("" if c["state"] == "fine" else c["do"]),
        ]
        for c in document["checks"]
    ]
    return table(["what", "state", "found", "do"], rows, text_columns=(0, 1, 2, 3))


def facts(document: Document) -> str:
    """Names and values, for a result that is a description (inspect)."""
    hidden = {"schema", "vivace", "created_utc", "command", "environment"}
    return pairs({key: value for key, value in document.items() if key not in hidden})


def unknown(document: Document) -> str:
    """A kind that this version does not know."""
    return f'<p class="soft">no layout for kind {esc(repr(document.get("kind")))}</p>' + raw(
        document, "the result as JSON"
    )


SECTIONS: dict[str, Callable[[Document], str]] = {
    "bench": bench,
    "check": check,
    "budget": budget,
    "golden": golden,
    "calibrate": calibrate,
    "doctor": doctor,
    "inspect": facts,
    "serve-drive": drive,
    "serve-closed-loop": closed_loop,
    "hopper": hopper,
    "start": start,
    "simulate": simulate,
    "train": lambda document: training(document) if "log" in document else facts(document),
}


def _latency_table(engines: Mapping[str, Any]) -> str:
    rows = []
    for name, row in engines.items():
        total, parts = row["total"], row["split"]["mean_ms"]
        times = [total[key] for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        cells = [num(value, 4) for value in (*times, row["rate_hz"], row["cold_ms"], *parts.values())]
        remark = "" if row["stable"] else pill("not warm", "warn")
        remark += "" if row["split"]["adds_up"] else pill("spans overlap by > 2 %", "bad")
        rows.append(
            [f"{esc(name)} {pill(row['precision'], 'plain')}{remark}", *cells, f"{number(row['output']['cosine']):.7f}"]
        )
    heads = [
        "engine",
        "p50",
        "p95",
        "p99",
        "max",
        "Hz",
        "first call",
        "vision",
        "prefix",
        "denoise",
        "other",
        "cosine to float32",
    ]
    return "<h3>Latency, milliseconds</h3>" + table(heads, rows)


def _stage_table(engines: Mapping[str, Any]) -> str:
    rows = [
        [esc(name), esc(stage), *(num(s[key], 4) for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms", "mean_ms"))]
        for name, row in engines.items()
        for stage, s in row["stages"].items()
    ]
    return table(["engine", "stage", "p50", "p95", "p99", "max", "mean"], rows, text_columns=(1,))


def _speedups(rows: Sequence[Document]) -> str:
    text = "".join(
        f"<p>{esc(row['engine'])} is <b>{num(row['ratio'])}x</b> as fast as {esc(row['baseline'])} "
        f"(medians; 95 % interval {num(row['low'])} to {num(row['high'])}).</p>"
        for row in rows
    )
    return text


def _budget_line(name: str, answer: Document) -> str:
    need = f"{num(answer['target_hz'])} Hz needs {num(answer['budget_ms'])} ms, it takes {num(answer['total_ms'])} ms"
    return f"<p>{esc(name)}: {esc(need)}: {esc(answer['verdict'])}.</p>"


def _check_plots(document: Document) -> list[tuple[str, str]]:
    worst, marks = document["summary"]["worst"], {mark["what"]: number(mark["wanted"]) for mark in document["marks"]}
    bounds = [marks.get(f"K layer {i}, relative L2", 0.0) for i in range(len(worst["k"]))]
    steps = [marks.get(f"velocity step {i}, relative L2", 0.0) for i in range(len(worst["velocity"]))]
    shown = [
        (plots.kv_sqnr(worst["k"], worst["v"], bounds), "6 dB are one bit"),
        (
            plots.step_errors(worst["velocity"], worst["x"], steps),
            "each engine on its own trajectory",
        ),
    ]
    if worst.get("robot"):
        shown.append(
            (plots.robot_dims(worst["robot"]), "worst observation, as a share of the range of the reference's actions")
        )
    return shown


def _named_errors(worst: Document) -> list[tuple[str, Document]]:
    rows = [("vision tokens", worst["vision"]), ("prefix embeddings", worst["embeds"])]
    for key, name in (("k", "K layer"), ("v", "V layer"), ("velocity", "velocity step")):
        rows += [(f"{name} {i}", row) for i, row in enumerate(worst[key])]
    rows.append(("actions, normalised", worst["actions"]))
    return [(name, row) for name, row in rows if row is not None]


def _error_table(rows: Sequence[tuple[str, Document]]) -> str:
    keys = ("mae", "max_abs", "relative_error", "rel_l2", "sqnr_db")
    cells = [[esc(name), f"{number(row['cosine']):.7f}", *(num(row[key]) for key in keys)] for name, row in rows]
    return table(["stage", "cosine", "MAE", "max", "relative error", "relative L2", "SQNR, dB"], cells)


def _robot_table(robot: Document | None) -> str:
    if not robot:
        return ""
    columns = zip(robot["units"], robot["max_abs"], robot["mean_abs"], robot["reference_range"], strict=True)
    rows = [
        [str(i), esc(unit), num(largest), num(mean), num(span)] for i, (unit, largest, mean, span) in enumerate(columns)
    ]
    heads = ["dimension", "unit", "largest difference", "mean difference", "range of the reference"]
    return "<h3>Actions in robot units</h3>" + table(heads, rows, text_columns=(1,))


def _marks(marks: Sequence[Document], title: str) -> str:
    rows = [
        [esc(m["what"]), num(m["got"], 6), f"{esc(m['rule'])} {num(m['wanted'], 6)}", verdict(bool(m["passed"]))]
        for m in marks
    ]
    return (f"<h3>{esc(title)}</h3>" if title else "") + table(["mark", "got", "wanted", ""], rows)


def _coverage(document: Document) -> str:
    rows = document.get("coverage")
    if not isinstance(rows, list) or not rows:
        return ""
    heads = list(rows[0])
    return "<h3>Coverage: what ran where</h3>" + table(
        heads, [[esc(row.get(head, "")) for head in heads] for row in rows]
    )


def _case(rows: Sequence[Document]) -> list[str]:
    passed = sum(bool(row["passed"]) for row in rows)
    ratios = [number(row["error"]) / number(row["tolerance"]) for row in rows if number(row["tolerance"]) > 0]
    largest = "exact" if not ratios else (num(max(ratios), 2) if not any(map(math.isnan, ratios)) else "NaN")
    return [f"{passed} / {len(rows)}", largest, verdict(passed == len(rows))]


def _golden_row(row: Document) -> list[str]:
    tolerance = "exact" if number(row["tolerance"]) == 0 else num(row["tolerance"])
    return [
        esc(row["case"]),
        esc(row["stage"]),
        num(row["error"]),
        tolerance,
        verdict(bool(row["passed"])),
        esc(row.get("note", "")),
    ]
