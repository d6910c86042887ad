"""The section of a simulation result: success against delay, reaction against theory, pairs and controls.

Reads the JSON of `vivace simulate` alone, so a report needs no simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .report_html import esc, figures, fold, num, pill, raw, table, tiles
from .report_plots import SERIES, Canvas
from .results import number

Document = Mapping[str, Any]
Row = Mapping[str, Any]
CONTROL_HZ = 50.0
"""Of results that do not say: the conveyor's."""
MODES = ("aligned, told", "aligned", "naive", "pause")
"""One colour each, whatever modes a result has. Told: the policy knows the actions that are executed meanwhile."""
STATUS = {"passed": "good", "failed": "bad", "void": "warn"}


def section(document: Document) -> str:
    """The inside of one report section. Raises KeyError or TypeError for a document that lacks its kind's keys."""
    arms, simulator, seeds = document["arms"], document["simulator"], document["seeds"]
    controls = document.get("controls", [])
    passed = sum(one["status"] == "passed" for one in controls)
    crashes = sum(int(arm["crashes"]) for arm in arms)
    top = [
        (f"{sum(int(arm['n']) for arm in arms):,}", "episodes"),
        (str(len(arms)), "arms on equal seeds"),
        (f"{passed} / {len(controls)}", "controls passed"),
        (str(crashes), "crashes"),
    ]
    unfinished = document.get("unfinished")
    return "".join(
        [
            f"<p>{pill('unfinished', 'bad')} {esc(unfinished)}</p>" if unfinished else "",
            f'<p class="soft">{esc(_simulator(simulator))}, {seeds["n"]} episodes an arm from seed {seeds["first"]}.</p>',
            tiles([(esc(value), name) for value, name in top]),
            figures([*delay_figures(document), *reaction_figures(document)]),
            fold("arms", arm_table(arms), is_open=len(arms) <= 12),
            fold("pairs", _pairs(document)) if document.get("comparisons") else "",
            fold("controls", _controls(controls), is_open=True) if controls else "",
            raw({**document, "arms": f"{len(arms)} arms, in the file"}),
        ]
    )


def tick_ms(document: Document) -> float:
    """Length of a control tick."""
    return 1000.0 / number(document["simulator"].get("control_hz", CONTROL_HZ))


def _simulator(facts: Row) -> str:
    """Which one, and which version of it. Raises KeyError."""
    if facts.get("name") == "LIBERO":
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        return f"{facts['suite']}, protocol {facts['convention']}" + (f", {versions}" if versions else "")
    drawn = f", drawn by {facts['renderer']}" if facts.get("renderer") else ""
    return f"MuJoCo {facts['mujoco']}, scene {str(facts['scene_sha256'])[:12]}{drawn}"


def delay_figures(document: Document) -> list[tuple[str, str]]:
    """Success against delay, (svg, caption) for each task, belt and policy that has more than one delay."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for arm in document["arms"]:
        facts = arm["arm"]
        key = tuple(str(facts[name] or "") for name in ("task", "belt", "policy", "engine", "precision", "steps"))
        groups.setdefault(key, []).append(arm)
    found = []
    for key, arms in groups.items():
        if len({delay_ticks(arm) for arm in arms}) > 1:
            belt = f", {key[1]} belt" if key[1] else ""
            caption = f"{', '.join(name for name in key[2:] if name not in ('', 'auto'))}; band: Wilson, 95 %"
            svg = success_against_delay(arms, title=f"{key[0]}{belt}", tick_ms=tick_ms(document))
            found.append((svg, caption))
    return found


def success_against_delay(arms: Sequence[Row], *, title: str, tick_ms: float) -> str:
    """Success in % against inference delay in ms, one line for each execution mode, with its Wilson interval."""
    canvas = Canvas(title, height=3.3)
    for i, mode in enumerate(MODES):
        mine = sorted((arm for arm in arms if mode_of(arm) == mode and arm["rate"] is not None), key=delay_ticks)
        if not mine:
            continue
        x = [tick_ms * delay_ticks(arm) for arm in mine]
        low, high = ([100 * number(arm["interval"][side]) for arm in mine] for side in (0, 1))
        canvas.axes.fill_between(x, low, high, color=SERIES[i], alpha=0.15, linewidth=0)
        canvas.axes.plot(
            x, [100 * number(arm["rate"]) for arm in mine], "o-", color=SERIES[i], markersize=4, label=mode
        )
    canvas.axes.set(xlabel="inference delay, ms", ylabel="% success", ylim=(-2, 102))
    _legend_below(canvas)
    return canvas.svg()


def reaction_figures(document: Document) -> list[tuple[str, str]]:
    """Reaction to the event against theory, (svg, caption) for each task that has one; at most four arms in each."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for arm in document["arms"]:
        if arm["reaction"] is not None and arm["reaction"]["reacted"]:
            groups.setdefault((arm["arm"]["task"], arm["arm"]["belt"] or ""), []).append(arm)
    caption = "solid: measured with twins; dotted: uniform from the delay to the delay plus the time between looks"
    return [
        (reaction_cdf(arms[:4], title=f"{' '.join(key).strip()}: reaction", tick_ms=tick_ms(document)), caption)
        for key, arms in groups.items()
    ]


def reaction_cdf(arms: Sequence[Row], *, title: str, tick_ms: float) -> str:
    """Share of episodes that had reacted by a time after the event."""
    canvas = Canvas(title, height=3.3)
    for i, arm in enumerate(arms):
        counts = {int(ticks): int(count) for ticks, count in arm["reaction"]["ticks"].items()}
        x = np.repeat(list(counts), list(counts.values())) * tick_ms
        share = 100 * np.arange(1, x.size + 1) / x.size
        name = f"{mode_of(arm)}, {arm['arm']['delay']['name']}"
        canvas.axes.step([0, *np.sort(x)], [0, *share], where="post", color=SERIES[i], label=name)
        if theory := arm["reaction"].get("theory_ticks"):
            ticks = np.arange(theory[0], theory[1] + 1)
            shares = [0, *(100 * np.arange(1, ticks.size + 1) / ticks.size)]
            canvas.axes.step([0, *(ticks * tick_ms)], shares, where="post", color=SERIES[i], linestyle=":")
    canvas.axes.set(xlabel="ms after the event", ylabel="% reacted", ylim=(0, 101))
    _legend_below(canvas)
    return canvas.svg()


def mode_of(arm: Row) -> str:
    """The execution mode, and whether the policy is told the committed actions."""
    facts = arm["arm"]
    return f"{facts['mode']}, told" if facts["committed"] else str(facts["mode"])


def delay_ticks(arm: Row) -> float:
    """Mean delay of an arm, in control ticks as it was simulated."""
    ticks = {int(value): int(count) for value, count in arm["arm"]["delay"]["ticks"].items()}
    return sum(value * count for value, count in ticks.items()) / sum(ticks.values())


def _legend_below(canvas: Canvas) -> None:
    canvas.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5, handlelength=1.2)


def _title(arm: Row) -> str:
    facts = arm["arm"]
    parts = [facts["task"], facts["belt"], facts["policy"], facts["engine"], facts["precision"]]
    steps = [f"{facts['steps']} steps"] if facts["steps"] else []
    named = [str(part) for part in parts if part not in (None, "", "auto")]
    return ", ".join([*named, *steps, mode_of(arm), str(facts["delay"]["name"])])


def arm_table(arms: Sequence[Row]) -> str:
    """One row for each arm: success, age, seams, jerk."""
    heads = ("arm", "success", "95 %", "time, s", "age, ms", "age p99", "wrong", "crashed", "seam, m/s", "jerk, m/s³")
    rows = []
    for arm in arms:
        low, high = (f"{100 * number(side):.1f}" for side in arm["interval"])
        rate = "-" if arm["rate"] is None else f"{100 * number(arm['rate']):.1f} %"
        rows.append(
            [
                esc(_title(arm)), rate, f"{low} to {high}", num(arm["time_to_success_s"]["median"]),
                num(arm["age_ms"]["mean"]), num(arm["age_ms"]["p99"]), str(arm["wrong_object"]), str(arm["crashes"]),
                num(arm["seams"]["plans_apart_m_s"]), num(arm["rms_jerk_m_s3"]),
            ]
        )  # fmt: skip
    return table(heads, rows, text_columns=(0,))


def _pairs(document: Document) -> str:
    margin = number(document["method"]["margin"])
    heads = ("arm", "against", "difference", "95 %", "gained", "lost", "p (Holm)", f"not worse by {100 * margin:.0f} %")
    rows = []
    for one in document["comparisons"]:
        r = one["result"]
        low, high = (f"{100 * number(side):+.1f}" for side in r["interval"])
        sides = [esc(_title(document["arms"][one[name]])) for name in ("arm", "reference")]
        size = [f"{100 * number(r['difference']):+.1f}", f"{low} to {high}", str(r["gained"]), str(r["lost"])]
        shown = pill("yes", "good") if r["noninferior"] else pill(r.get("void") or "not shown", "plain")
        rows.append([*sides, *size, num(one["holm_p"]), shown])
    return table(heads, rows, text_columns=(0, 1))


def _controls(controls: Sequence[Row]) -> str:
    rows = [
        [esc(one["name"]), esc(one["policy"]), pill(str(one["status"]), STATUS[one["status"]]), esc(one["found"])]
        for one in controls
    ]
    return table(("control", "policy", "", "found"), rows, text_columns=(0, 1, 2, 3))
