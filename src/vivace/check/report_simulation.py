"""The section of a simulation result: success against delay and steps and for each plan, reaction, pairs and controls.

Reads the JSON of `vivace simulate` alone, so a report needs no simulator.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .report_html import esc, figures, fold, num, pill, raw, table, tiles
from .report_plots import SERIES, Canvas, Interval, interval_lines, interval_rows, legend_below
from .results import number

Document = Mapping[str, Any]
Row = Mapping[str, Any]
CONTROL_HZ = 50.0
"""Of results that do not say: the conveyor's."""
MODES = ("aligned, told", "aligned", "naive", "pause")
"""One colour each, whatever modes a result has. Told: the policy knows the actions that are executed meanwhile."""
STATUS = {"passed": "good", "failed": "bad", "void": "warn"}


def section(document: Document, beside: Sequence[tuple[str, Document]] = ()) -> str:
    """The inside of one report section. Raises KeyError or TypeError for a document that lacks its kind's keys.

    beside: (name, document) of results on the same scene and seeds, whose plans are drawn with this one's.
    """
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
            figures(
                [
                    *delay_figures(document),
                    *step_figures(document),
                    *plan_figures(document, beside),
                    *reaction_figures(document),
                ]
            ),
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
    legend_below(canvas)
    return canvas.svg()


def step_figures(document: Document) -> list[tuple[str, str]]:
    """Success against denoise steps, (svg, caption) for each policy, plan and delay with a line of several step counts.

    A line is a task, belt, mode and number of ticks executed of each chunk. Arms with the policy's own number of steps
    do not say how many that is and are left out.
    """
    groups: dict[tuple[str, ...], dict[str, list[tuple[float, Interval]]]] = {}
    for arm in document["arms"]:
        facts = arm["arm"]
        if facts["steps"] is not None and arm["rate"] is not None:
            line = ", ".join([_where(facts), mode_of(arm), f"{facts['execute_ticks']} ticks a chunk"])
            lines = groups.setdefault((*_named(facts, "policy", "engine", "precision", "fault"), _delay(facts)), {})
            lines.setdefault(line, []).append((number(facts["steps"]), percent(arm)))
    found = []
    for key, lines in groups.items():
        drawn = {name: sorted(line) for name, line in lines.items() if len({steps for steps, _ in line}) > 1}
        if drawn:
            svg = interval_lines(
                drawn, title="Success against denoise steps", xlabel="denoise steps of a chunk (logarithmic)"
            )
            found.append((svg, f"{', '.join(key)}; bars: Wilson, 95 %"))
    return found


def comparable(document: Document) -> str:
    """What results must share for their arms to stand in one figure: the simulator, whoever drew, and the seeds."""
    simulator = {key: value for key, value in (document.get("simulator") or {}).items() if key != "renderer"}
    return json.dumps([simulator, document.get("seeds")], sort_keys=True)


def plan_figures(document: Document, beside: Sequence[tuple[str, Document]] = ()) -> list[tuple[str, str]]:
    """Success for each engine and precision, (svg, caption) for each setting whose arms differ in one of them.

    Where the result compares them in pairs, a second figure has the differences from the reference and the margin.
    Arms of the same weights and setting in the results beside it are drawn too, those of the result itself first.
    """
    arms = [*document["arms"], *(arm for _, other in beside for arm in other["arms"])]
    sources = ["" for _ in document["arms"]] + [name for name, other in beside for _ in other["arms"]]
    groups: dict[tuple[str, ...], dict[tuple[str, str], int]] = {}
    for i, arm in enumerate(arms):
        if arm["rate"] is not None:
            groups.setdefault(_setting(arm), {}).setdefault(_plan(arm), i)
    found = []
    for (where, *said), plans in groups.items():
        if len(plans) < 2 or min(plans.values()) >= len(document["arms"]):
            continue
        differs = [len(set(side)) > 1 for side in zip(*plans, strict=True)]
        names = {i: ", ".join(itertools.compress(plan, differs)) for plan, i in plans.items()}
        common = [part for part, other in zip(next(iter(plans)), differs, strict=True) if not other and part != "auto"]
        also = dict.fromkeys(sources[i] for i in names if sources[i])
        rows = [(names[i], percent(arms[i])) for i in names]
        svgs = _plans(document, names, rows, where=where)
        shared = ", ".join([*said, *common])
        beside_it = f", with arms of {', '.join(also)}" if also else ""
        captions = f"{beside_it}; lines: Wilson, 95 %, of each arm alone", "; lines: Tango, 95 %, of pairs of episodes"
        found += [(svg, shared + caption) for svg, caption in zip(svgs, captions, strict=False)]
    return found


def _plans(
    document: Document, names: Mapping[int, str], rows: Sequence[tuple[str, Interval]], *, where: str
) -> list[str]:
    """The figures of one setting: rates, and differences if there are pairs. names: of its arms, by index."""
    pairs = [one for one in document.get("comparisons", []) if one["arm"] in names and one["reference"] in names]
    if not pairs:
        return [interval_rows(rows, title=f"{where}: success", xlabel="% success")]
    reference = pairs[0]["reference"]
    row, name = list(names).index(reference), f"{names[reference]} (reference)"
    margin = 100 * number(document["method"]["margin"])
    differences = [
        (names[one["arm"]], _percent(one["result"], "difference")) for one in pairs if one["reference"] == reference
    ]
    alone = interval_rows(
        rows, title=f"{where}: success", xlabel="% success", reference=(rows[row][1].value, name, row)
    )
    paired = interval_rows(
        differences, title=f"{where}: against the reference", xlabel="difference in % success, on equal seeds",
        reference=(0.0, name, None), limit=(-margin, f"margin: {margin:.0f} % worse"), form="+.1f",
    )  # fmt: skip
    return [alone, paired]


def _setting(arm: Row) -> tuple[str, ...]:
    """All of an arm but its plan, in words: where, policy, weights, ..."""
    facts, weights = arm["arm"], (arm.get("engine") or {}).get("checkpoint_hash")
    return (
        _where(facts),
        *_named(facts, "policy", "fault"),
        *([f"weights {weights[:12]}"] if weights else []),
        *([f"{facts['steps']} steps"] if facts["steps"] else []),
        mode_of(arm),
        _delay(facts),
        f"{facts['execute_ticks']} ticks a chunk",
    )


def _plan(arm: Row) -> tuple[str, str]:
    """Engine and precision: those asked for, or those that ran where nothing else was asked for than "auto"."""
    facts, ran = arm["arm"], arm.get("engine") or {}
    engine, precision = (
        str(ran.get(key, "auto") if facts[name] == "auto" else facts[name])
        for name, key in (("engine", "backend"), ("precision", "precision"))
    )
    return engine, precision


def percent(arm: Row) -> Interval:
    """The success rate of an arm with its interval, in %."""
    return _percent(arm, "rate")


def _percent(found: Row, key: str) -> Interval:
    low, high = (100 * number(side) for side in found["interval"])
    return Interval(100 * number(found[key]), low, high)


def _where(facts: Row) -> str:
    return f"{facts['task']}, {facts['belt']} belt" if facts["belt"] else str(facts["task"])


def _named(facts: Row, *names: str) -> list[str]:
    return [str(facts[name]) for name in names if facts[name] not in (None, "", "auto")]


def _delay(facts: Row) -> str:
    return f"delay {facts['delay']['name']}"


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
    legend_below(canvas)
    return canvas.svg()


def mode_of(arm: Row) -> str:
    """The execution mode, and whether the policy is told the committed actions."""
    facts = arm["arm"]
    return f"{facts['mode']}, told" if facts["committed"] else str(facts["mode"])


def delay_ticks(arm: Row) -> float:
    """Mean delay of an arm, in control ticks as it was simulated."""
    ticks = {int(value): int(count) for value, count in arm["arm"]["delay"]["ticks"].items()}
    return sum(value * count for value, count in ticks.items()) / sum(ticks.values())


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
