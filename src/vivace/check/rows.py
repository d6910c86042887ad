"""One line of evidence: a stage of a case, how far it is from what was expected, and whether that is near enough."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """The result of comparing one stage.

    case       name of the fixture folder
    stage      what was compared, e.g. "observation_odd.msgpack decode"
    error      distance from the expected value; its meaning is the stage's (relative, or 0 / 1 for exact comparisons)
    tolerance  the largest error that passes; 0 = must be exact
    note       one line for people: what differed, or how it was compared
    """

    case: str
    stage: str
    error: float
    tolerance: float
    passed: bool
    note: str = ""
