"""From the rows of an arm's episodes to what a result says about it, and about it against its reference.

A crash is no failure: the policy raised, or gave an action that is no number, so the episode says nothing about how well it
acts. Rates are over the episodes that ran to their end; crashes are counted beside them, and pairs leave them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arms import Arm
from .scene import CONTROL_HZ
from .statistics import Paired, distance_of_cdfs, holm, paired, wilson
from .world import COMMAND_M

Row = Mapping[str, Any]
TICK_MS = 1000.0 / CONTROL_HZ
SPEED_M_S = COMMAND_M * CONTROL_HZ
"""Action 1.0 as a velocity."""


@dataclass(frozen=True)
class Units:
    """What the numbers of an episode are worth. speed_m_s, step_m: of action 1; None where an action is no velocity."""

    tick_ms: float
    speed_m_s: float | None
    step_m: float | None


CONVEYOR = Units(TICK_MS, SPEED_M_S, COMMAND_M)
KS_1_PERCENT = 1.63
"""Kolmogorov-Smirnov: D * sqrt(n) above this has p < 1 %; for discrete distributions less."""
LEAST_EVENTS = 20
"""Fewer reactions agree with nearly every theory."""
PER_TICK = "ages", "delays", "inference_ms"
"""Of a row: counted over the whole arm, and not kept with its episode."""


@dataclass(frozen=True)
class Outcome:
    """What came of an arm.

    n            episodes asked for; `finished` of them did not crash, and `rate` and its Wilson interval are of these
    outcomes     a letter for each seed in order: S success, W another cube instead, F failure, C crash
    age_ms       observation age at actuation over all executed actions: mean, p99, max
    seams        at chunk switches: jumps of commanded and measured velocity, against those inside chunks; of the plans
    reaction     see `reaction`; None without an event
    delay_ticks  the delays that happened, in control ticks: {ticks: inferences that took so many}
    starved_ticks  at which the chunk in use had run out, over all episodes
    inference_ms wall time on this machine: p50, p95, p99, max; None for the expert
    """

    arm: Arm
    n: int
    finished: int
    crashes: int
    successes: int
    rate: float | None
    interval: tuple[float, float]
    wrong_object: int
    outcomes: str
    time_to_success_s: dict[str, float | None]
    age_ms: dict[str, float | None]
    delay_ticks: dict[str, int]
    held_share: float | None
    starved_ticks: int
    seams: dict[str, float | None]
    rms_jerk_m_s3: float | None
    reaction: dict[str, Any] | None
    inference_ms: dict[str, float | None] | None
    engine: dict[str, Any] | None
    crash_messages: tuple[str, ...]
    episodes: tuple[Row, ...]


def outcome(
    arm: Arm,
    rows: Sequence[Row],
    *,
    engine: dict[str, Any] | None = None,
    keep: bool = False,
    units: Units = CONVEYOR,
) -> Outcome:
    """Count and average the rows of `campaign.run_job`. keep: store the rows too."""
    good = [row for row in rows if row["crash"] is None]
    letters = "".join(letter(row) for row in rows)
    successes = letters.count("S")
    times = [row["time_to_success_s"] for row in good if row["success"]]
    milliseconds = [value for row in rows for value in row["inference_ms"]]
    return Outcome(
        arm=arm,
        n=len(rows),
        finished=len(good),
        crashes=len(rows) - len(good),
        successes=successes,
        rate=successes / len(good) if good else None,
        interval=wilson(successes, len(good)) if good else (0.0, 1.0),
        wrong_object=sum(row["wrong_object"] for row in good),
        outcomes=letters,
        time_to_success_s={"median": _percentile(times, 50), "p90": _percentile(times, 90)},
        age_ms=ages(good, units.tick_ms),
        delay_ticks=delays(good),
        held_share=_mean([row["held_ticks"] / row["ticks"] for row in good]),
        starved_ticks=sum(row["starved_ticks"] for row in good),
        seams=seams(good, units),
        rms_jerk_m_s3=_mean([row["rms_jerk_m_s3"] for row in good]),
        reaction=reaction(arm, good),
        inference_ms=None if engine is None else milliseconds_of(milliseconds),
        engine=engine,
        crash_messages=tuple(dict.fromkeys(row["crash"] for row in rows if row["crash"] is not None))[:3],
        episodes=tuple({k: v for k, v in row.items() if k not in PER_TICK} for row in rows if keep),
    )


def letter(row: Row) -> str:
    """One episode as a letter, see `Outcome.outcomes`."""
    if row["crash"] is not None:
        return "C"
    return "S" if row["success"] else "W" if row["wrong_object"] else "F"


def ages(rows: Sequence[Row], tick_ms: float = TICK_MS) -> dict[str, float | None]:
    """Observation age at actuation, every executed action counts once."""
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(row["ages"])
    every = np.repeat(list(counts), list(counts.values())) * tick_ms
    return {
        "mean": float(every.mean()) if every.size else None,
        "p99": _percentile(every, 99),
        "max": float(every.max()) if every.size else None,
    }


def delays(rows: Sequence[Row]) -> dict[str, int]:
    """{control ticks: inferences that took so many}, as in a result file."""
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(row["delays"])
    return {str(ticks): count for ticks, count in sorted(counts.items())}


def milliseconds_of(inferences: Sequence[float]) -> dict[str, float | None]:
    """The middle and the tail of wall times in ms; None of nothing."""
    tail = {f"p{q}": _percentile(inferences, q) for q in (50, 95, 99)}
    return {**tail, "max": max(inferences, default=None)}


def seams(rows: Sequence[Row], units: Units = CONVEYOR) -> dict[str, float | None]:
    """Jumps at chunk switches in m/s and m; means over episodes."""

    def average(key: str, unit: float | None) -> float | None:
        value = _mean([row[key] for row in rows])
        return None if value is None or unit is None else value * unit

    return {
        "switches": float(sum(row["seams"] for row in rows)),
        "command_jump_m_s": average("seam_step", units.speed_m_s),
        "command_jump_inside_m_s": average("step_inside_chunks", units.speed_m_s),
        "plans_apart_m_s": average("seam_apart", units.speed_m_s),
        "plans_apart_m": average("seam_ahead", units.step_m),
        "hand_jump_m_s": average("hand_jump_at_seams_m_s", 1.0),
        "hand_jump_inside_m_s": average("hand_jump_inside_m_s", 1.0),
    }


def reaction(arm: Arm, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Reaction to the event in ticks, from twins: counts, how many are what the looks of their episode imply, and theory.

    A reaction may be later than implied, where the new plan begins as the old one went on; sooner is a leak.

    Theory for a fixed delay d: the event falls at any phase of the period P between looks alike, so reaction is uniform on
    d .. d + P - 1. `distance` is that of the two distribution functions, `limit` the 1 % value of Kolmogorov and Smirnov;
    `agrees` is None below 20 reactions.
    """
    seen = [row["reaction"] for row in rows if row.get("reaction") is not None]
    if not seen:
        return None
    reacted = [one for one in seen if one["ticks"] is not None]
    measured = [one["ticks"] for one in reacted]
    body: dict[str, Any] = {
        "episodes": len(seen),
        "reacted": len(measured),
        "ticks": {str(value): count for value, count in sorted(Counter(measured).items())},
        "mean_ms": None if not measured else float(np.mean(measured)) * TICK_MS,
        "p99_ms": None if not measured else float(np.percentile(measured, 99)) * TICK_MS,
        "as_the_looks_imply": sum(one["ticks"] == one["expected"] for one in reacted),
        "sooner_than_possible": sum(one["expected"] is None or one["ticks"] < one["expected"] for one in reacted),
    }
    if measured and len(set(arm.delay.ticks)) == 1 and not arm.delay.measured:
        delay, execute = arm.delay.ticks[0], arm.execute_ticks
        period = delay + execute if arm.mode == "pause" else max(delay, execute)
        distance = distance_of_cdfs(measured, range(delay, delay + period))
        limit = KS_1_PERCENT / len(measured) ** 0.5
        theory = [delay, delay + period - 1]
        agrees = distance <= limit if len(measured) >= LEAST_EVENTS else None
        body |= {"theory_ticks": theory, "distance": distance, "limit": limit, "agrees": agrees}
    return body


@dataclass(frozen=True)
class Comparison:
    """Two arms, by their places in the result; holm_p adjusts McNemar's p for all pairs of the same list.

    Two arms that are compared for several reasons, or both ways round, are one pair: one test.
    """

    arm: int
    reference: int
    what: str
    result: Paired
    holm_p: float


def compare(outcomes: Sequence[Outcome], pairs: Sequence[tuple[int, int, str]], *, margin: float) -> list[Comparison]:
    """Compare arms on their common seeds; pairs of (arm, reference, why). Pairs without a finished episode are left out."""
    found = []
    for arm, reference, what in pairs:
        result = paired_letters(outcomes[arm].outcomes, outcomes[reference].outcomes, margin=margin)
        if result is not None:
            found.append((arm, reference, what, result))
    tests = {frozenset(one[:2]): one[3].mcnemar_p for one in found}
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    return [Comparison(*one, holm_p=adjusted[frozenset(one[:2])]) for one in found]


def paired_letters(arm: str, reference: str, *, margin: float) -> Paired | None:
    """Two arms by their letters (`Outcome.outcomes`) on equal seeds, seed by seed; None where no pair ended whole."""
    whole = [(a == "S", r == "S") for a, r in zip(arm, reference, strict=True) if "C" not in (a, r)]
    if not whole:
        return None
    gained, lost = sum(a and not r for a, r in whole), sum(r and not a for a, r in whole)
    return paired(gained, lost, len(whole), margin=margin, reference=sum(r for _, r in whole))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _percentile(values: Any, q: float) -> float | None:
    return float(np.percentile(values, q)) if len(values) else None
