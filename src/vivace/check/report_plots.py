"""Figures of the report as inline SVG, drawn by matplotlib in placeholder colours that become the page's own variables.

Text stays text (readable by search and by screen readers), every figure has its title as the SVG's own too, and the
figures follow the reader's light or dark theme.
"""

from __future__ import annotations

import importlib
import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import Unsupported
from .results import number

INK, SOFT, LINE = "#010101", "#020202", "#030303"
SERIES = ("#0a0000", "#0b0000", "#0c0000", "#0d0000", "#0e0000")
BAD = "#0f0000"
_VARIABLES = {
    INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", BAD: "var(--bad)",
    **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES)},
}  # fmt: skip
STAGES = ("vision", "prefix", "denoise", "other")
_RC = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11.5, "text.color": INK, "axes.labelcolor": SOFT,
    "xtick.color": SOFT, "ytick.color": SOFT, "axes.edgecolor": LINE, "grid.color": LINE, "grid.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.8,
}  # fmt: skip

_LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9.5, "handlelength": 1.2}


class Interval(NamedTuple):
    """A measured value between the ends of its interval, in the unit of the axis."""

    value: float
    low: float
    high: float


class Canvas:
    """One figure being drawn; `svg()` finishes it. height: inches, of 4.7 in width."""

    def __init__(self, title: str, *, height: float = 2.9) -> None:
        self._mpl = _matplotlib()
        self._title = title
        with self._mpl.rc_context(_RC):
            self.figure = importlib.import_module("matplotlib.figure").Figure(
                figsize=(4.7, height), layout="constrained"
            )
            self.axes = self.figure.subplots()
            self.axes.set_title(title)

    def svg(self) -> str:
        """The finished figure, colours replaced, without anything that names another document."""
        buffer = io.StringIO()
        with self._mpl.rc_context({**_RC, "svg.hashsalt": "vivace"}):
            facts = {"Title": self._title, "Date": None, "Creator": None, "Format": None, "Type": None}
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=facts)
        return _embed(buffer.getvalue())

    def entitle(self, title: str) -> None:
        """A title above the whole figure: above axes that begin far right, beside long names, it would be cut."""
        self._title = title
        style = {"fontsize": _RC["axes.titlesize"], "fontweight": _RC["axes.titleweight"], "color": INK}
        self.figure.suptitle(title, x=0.02, ha="left", **style)

    def moved(self, points: float) -> Any:
        """The transform of the data, this many points further right: for marks that would cover each other."""
        transforms = importlib.import_module("matplotlib.transforms")
        return transforms.offset_copy(self.axes.transData, fig=self.figure, x=points, units="points")


def stage_stack(engines: Mapping[str, Mapping[str, Any]], target_ms: float | None) -> str:
    """Mean milliseconds of the four stages, one bar per engine, and the budget as a line."""
    canvas = Canvas("Where the time goes", height=max(2.4, 1.5 + 0.5 * len(engines)))
    names = list(engines)
    left = np.zeros(len(names))
    for i, stage in enumerate(STAGES):
        width = np.array([max(0.0, number(engines[name].get(stage))) for name in names])
        colour = SERIES[i] if stage != "other" else SERIES[4]
        canvas.axes.barh(names, width, left=left, color=colour, height=0.62, label=stage)
        left = left + np.nan_to_num(width)
    if target_ms is not None:
        canvas.axes.axvline(target_ms, color=BAD, linestyle="--", linewidth=1.4, label="budget")
    canvas.axes.invert_yaxis()
    canvas.axes.grid(visible=False, axis="y")
    canvas.axes.set_xlabel("milliseconds, mean")
    legend_below(canvas, 5)
    return canvas.svg()


def latency_cdf(samples: Mapping[str, Sequence[float]], target_ms: float | None) -> str:
    """Share of inferences that were finished by a time, up to a little beyond the slowest p99."""
    canvas = Canvas("Latency distribution")
    right = 0.0
    for i, (name, values) in enumerate(samples.items()):
        ordered = np.sort(np.asarray(values, dtype=np.float64))
        share = np.arange(1, ordered.size + 1) / ordered.size
        canvas.axes.step(ordered, 100 * share, where="post", color=SERIES[i % 5], label=name)
        right = max(right, float(np.percentile(ordered, 99)) * 1.15)
    if target_ms is not None and target_ms < right:
        canvas.axes.axvline(target_ms, color=BAD, linestyle="--", linewidth=1.4)
    canvas.axes.set(xlabel="milliseconds", ylabel="% finished", xlim=(0, right or 1), ylim=(0, 101))
    canvas.axes.legend(loc="upper left", **_LEGEND)
    return canvas.svg()


def run_chart(samples: Mapping[str, Sequence[float]]) -> str:
    """Every sample in the order in which it was taken: drift and outliers are visible here and nowhere else."""
    canvas = Canvas("Every sample, in order")
    top = 0.0
    for i, (name, values) in enumerate(samples.items()):
        canvas.axes.plot(values, ".", color=SERIES[i % 5], markersize=3, label=name)
        top = max(top, float(np.percentile(values, 99.5)) * 1.15)
    canvas.axes.set(xlabel="round", ylabel="milliseconds", ylim=(0, top or 1))
    canvas.axes.legend(loc="lower left", ncols=2, **_LEGEND)
    return canvas.svg()


def kv_sqnr(k: Sequence[Mapping[str, Any]], v: Sequence[Mapping[str, Any]], bounds: Sequence[float]) -> str:
    """Signal-to-noise ratio of keys and values per layer, and the pass mark per layer in the same unit."""
    canvas = Canvas("Keys and values, per layer")
    for i, (name, rows) in enumerate((("K", k), ("V", v))):
        values = [number(row.get("sqnr_db")) for row in rows]
        finite = [value if math.isfinite(value) else math.nan for value in values]
        canvas.axes.plot(finite, "o-", color=SERIES[i], markersize=4, label=name + _equal(values))
    if bounds:
        limit = [-20 * math.log10(bound) if bound > 0 else math.nan for bound in bounds]
        canvas.axes.plot(limit, "--", color=BAD, linewidth=1.3, label="pass mark")
    canvas.axes.set(xlabel="layer", ylabel="SQNR, dB (higher is better)")
    canvas.axes.xaxis.get_major_locator().set_params(integer=True)
    canvas.axes.legend(ncols=3, **_LEGEND)
    return canvas.svg()


def step_errors(velocity: Sequence[Mapping[str, Any]], x: Sequence[Mapping[str, Any]], bounds: Sequence[float]) -> str:
    """Relative error of the velocity and of the state x over denoise steps, logarithmic."""
    canvas = Canvas("Denoise steps")
    for i, (name, rows) in enumerate((("velocity", velocity), ("x", x[1:]))):
        values = [number(row.get("rel_l2")) for row in rows]
        canvas.axes.plot([value or math.nan for value in values], "o-", color=SERIES[i + 2], markersize=4, label=name)
    if any(bounds):
        canvas.axes.plot([bound or math.nan for bound in bounds], "--", color=BAD, linewidth=1.3, label="pass mark")
    canvas.axes.set(xlabel="step (0 = noise)", ylabel="relative L2 error", yscale="log")
    canvas.axes.xaxis.get_major_locator().set_params(integer=True)
    canvas.axes.legend(ncols=3, **_LEGEND)
    return canvas.svg()


def robot_dims(robot: Mapping[str, Any]) -> str:
    """Largest action difference per dimension as a share of the range that the reference used."""
    canvas = Canvas("Actions, in robot units")
    spans = [number(value) for value in robot["reference_range"]]
    largest = [number(value) for value in robot["max_abs"]]
    share = [100 * a / b if b > 0 else math.nan for a, b in zip(largest, spans, strict=True)]
    canvas.axes.bar(range(len(share)), share, color=SERIES[0], width=0.7)
    canvas.axes.grid(visible=False, axis="x")
    canvas.axes.set(xlabel="action dimension", ylabel="largest difference, % of range")
    canvas.axes.xaxis.get_major_locator().set_params(integer=True)
    return canvas.svg()


def budget_bars(stages: Sequence[Mapping[str, Any]]) -> str:
    """Per stage: now, what an even shrink needs, and the roofline floor."""
    canvas = Canvas("Now, needed, possible")
    names = [str(stage["stage"]) for stage in stages]
    position = np.arange(len(names))
    for i, (key, label) in enumerate((("ms", "now"), ("evenly_ms", "needed, evenly"), ("floor_ms", "roofline floor"))):
        values = [number(stage.get(key)) for stage in stages]
        canvas.axes.bar(position + (i - 1) * 0.27, np.nan_to_num(values), width=0.25, color=SERIES[i], label=label)
    canvas.axes.set_xticks(position, names)
    canvas.axes.grid(visible=False, axis="x")
    canvas.axes.set_ylabel("milliseconds")
    legend_below(canvas, 3)
    return canvas.svg()


def step_bars(names: Sequence[str], values_ms: Sequence[float], errors: Sequence[float]) -> str:
    """Latency of successive techniques, each with its relative error written behind its bar; slowest on top."""
    canvas = Canvas("Each technique on top of the one above", height=max(2.4, 1.1 + 0.36 * len(names)))
    canvas.axes.barh(list(names), list(values_ms), color=SERIES[0], height=0.62)
    for i, (ms, error) in enumerate(zip(values_ms, errors, strict=True)):
        said = f" {ms:.1f} ms" + ("" if math.isnan(error) else f", error {error:.2g}")
        canvas.axes.text(ms, i, said, va="center", fontsize=9, color=INK)
    canvas.axes.invert_yaxis()
    canvas.axes.grid(visible=False, axis="y")
    canvas.axes.set(xlabel="milliseconds, p50 (logarithmic)", xscale="log")
    canvas.axes.set_xlim(min(values_ms) / 2, max(values_ms) * 6)
    return canvas.svg()


def interval_lines(lines: Mapping[str, Sequence[tuple[float, Interval]]], *, title: str, xlabel: str) -> str:
    """% success over x (above 0, logarithmic), one line for each name, intervals as bars.

    Lines stand 4 points apart, so that equal values do not cover each other; their data do not move.
    """
    columns = 2 if max(map(len, lines)) <= 26 else 1
    canvas = Canvas(title, height=2.9 + 0.2 * math.ceil(len(lines) / columns))
    every = sorted({at for points in lines.values() for at, _ in points})
    room = (every[-1] / every[0]) ** 0.07
    canvas.axes.set(
        xlabel=xlabel, ylabel="% success", ylim=(-2, 102), xscale="log", xlim=(every[0] / room, every[-1] * room)
    )
    ticks = _apart(every)
    canvas.axes.set_xticks(ticks, [f"{at:g}" for at in ticks])
    canvas.axes.minorticks_off()
    for i, (name, points) in enumerate(lines.items()):
        moved = canvas.moved(4 * (i - (len(lines) - 1) / 2))
        x, found = [at for at, _ in points], [one for _, one in points]
        colour, style = SERIES[i % 5], ("-", "--", ":")[i // 5 % 3]
        low, high = [one.low for one in found], [one.high for one in found]
        canvas.axes.vlines(x, low, high, color=colour, linewidth=1.2, transform=moved)
        canvas.axes.plot(
            x, [one.value for one in found], "o", color=colour, linestyle=style, markersize=4, label=name,
            transform=moved,
        )  # fmt: skip
    legend_below(canvas, columns)
    return canvas.svg()


def interval_rows(
    rows: Sequence[tuple[str, Interval]],
    *,
    title: str,
    xlabel: str,
    reference: tuple[float, str, int | None] | None = None,
    limit: tuple[float, str] | None = None,
    form: str = ".1f",
) -> str:
    """A value and its interval in each row, first row on top, the value written right of the axes.

    reference: (x, name, row) of a dotted line and the row that it belongs to, which has a hollow square. limit: (x, name)
    of the line that an interval must stay right of. form: of the written value.
    """
    canvas = Canvas("", height=1.6 + 0.42 * len(rows))
    canvas.entitle(title)
    for y, (_, one) in enumerate(rows):
        own = reference is not None and y == reference[2]
        canvas.axes.hlines(y, one.low, one.high, color=SERIES[0], linewidth=1.8)
        canvas.axes.plot(
            one.value, y, "s" if own else "o", color=SERIES[0], markersize=7, markerfacecolor="none" if own else None
        )
        canvas.axes.text(
            1.03,
            y,
            format(one.value, form),
            transform=canvas.axes.get_yaxis_transform(),
            va="center",
            fontsize=10,
            color=INK,
        )
    lines = {}
    if reference is not None:
        lines[reference[1]] = canvas.axes.axvline(reference[0], color=SOFT, linestyle=":", linewidth=1.4)
    if limit is not None:
        lines[limit[1]] = canvas.axes.axvline(limit[0], color=BAD, linestyle="--", linewidth=1.4)
    canvas.axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    canvas.axes.set_ylim(len(rows) - 0.5, -0.5)
    canvas.axes.grid(visible=False, axis="y")
    canvas.axes.set_xlabel(xlabel)
    canvas.axes.margins(x=0.08)
    if lines:
        columns = 2 if sum(map(len, lines)) <= 52 else 1
        canvas.figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns, **_LEGEND)
    return canvas.svg()


def _apart(values: Sequence[float]) -> list[float]:
    """Those of ascending values above 0 whose labels do not touch on a logarithmic axis that begins and ends with them."""
    kept = list(values[:1])
    for value in values[1:]:
        if math.log(value / kept[-1]) >= 0.06 * math.log(values[-1] / values[0]):
            kept.append(value)
    return kept


def legend_below(canvas: Canvas, columns: int = 2) -> None:
    """A legend of all that is labelled, below the axes."""
    canvas.figure.legend(loc="outside lower center", ncols=columns, columnspacing=0.9, **_LEGEND)


def _equal(values: Sequence[float]) -> str:
    same = sum(value == math.inf for value in values)
    return f" ({same} layers identical)" if same else ""


def _embed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    salt = zlib.crc32(svg.encode())  # ids must differ between the figures of one page
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="f{salt}-', svg)
    svg = re.sub(r"url\(#", f"url(#f{salt}-", svg)
    svg = re.sub(r'href="#', f'href="#f{salt}-', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise Unsupported("the report's plots need matplotlib", got=error, do="pip install 'vivace[report]'") from error
