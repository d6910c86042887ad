"""One self-contained page from result files: no script, no font, no image and no style is fetched from anywhere.

Every number on the page comes from a result, and every result brings the machine that made it. Results are shown in the
order given; what a section looks like is decided by the result's `kind` (report_sections).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .report_clip import Clip, figure
from .report_full_size import hopper
from .report_html import esc, fold, pairs, pill, raw
from .report_sections import kind_of, machine, outcome, render
from .report_simulation import comparable
from .report_simulation import section as simulated
from .report_style import CSS
from .waterfall import alike

TITLES = {
    "bench": "Speed",
    "check": "Accuracy",
    "budget": "Target rate",
    "calibrate": "Precision plan",
    "golden": "Replays of the originals",
    "inspect": "Checkpoint",
    "doctor": "Machine",
    "serve-drive": "Served over the network",
    "serve-closed-loop": "Closed loop over the network",
    "hopper": "Full size on one GPU",
    "start": "Start from files",
    "simulate": "Closed loop",
    "train": "Training",
}


Entry = Mapping[str, Any] | Clip


def build(results: Sequence[tuple[str, Entry]], *, title: str = "vivace report") -> str:
    """The page as one HTML document.

    Args:
        results: (name to show, document or clip) in reading order.
        title: heading of the page.

    Raises:
        ConfigError: a document claims a kind and lacks what that kind consists of.
        Unsupported: matplotlib is not installed.
    """
    links = "".join(
        f'<a href="#r{i}">{esc(_title(entry))} {outcome_of(name, entry)}</a>' for i, (name, entry) in enumerate(results)
    )
    sections = "".join(_section(i, name, entry, results) for i, (name, entry) in enumerate(results))
    documents = [entry for _, entry in results if not isinstance(entry, Clip)]
    latest = max((str(document.get("created_utc", "")) for document in documents), default="")
    machines = list(dict.fromkeys(machine(doc.get("environment") or {}) for doc in documents if doc.get("environment")))
    where = "".join(f'<p class="soft">{esc(line)}</p>' for line in machines)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{CSS}</style></head>\n<body><main>"
        f'<header><h1>{esc(title)}</h1><p class="soft">{esc(latest)}</p>{where}<nav>{links}</nav></header>\n'
        f"{sections}<footer><p>Every number here was computed by the command shown in its section.</p></footer>"
        "</main></body></html>\n"
    )


def outcome_of(name: str, document: Entry) -> str:
    """The pill of a result. Raises ConfigError for a document that lacks its kind's keys."""
    if isinstance(document, Clip):
        return pill("recorded", "plain")
    try:
        return outcome(document)
    except (KeyError, TypeError) as error:
        raise _incomplete(name, document, error) from error


def _section(index: int, name: str, document: Entry, results: Sequence[tuple[str, Entry]]) -> str:
    if isinstance(document, Clip):
        return (
            f'<section id="r{index}"><div class="head"><h2>{_title(document)}</h2></div>{figure(document)}</section>\n'
        )
    try:
        inner = WITH_OTHERS.get(kind_of(document), _alone)(index, document, results)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _incomplete(name, document, error) from error
    made_by = (
        f"vivace {document.get('vivace')}, {document.get('created_utc')}"
        if "vivace" in document
        else "no version recorded"
    )
    command = document.get("command")
    repeat = fold("how to repeat it", f"<p><code>{esc(command)}</code></p>") if command else ""
    environment = document.get("environment") or {}
    where = (
        fold("machine", f'<p class="soft">{esc(machine(environment))}</p>' + pairs(environment)) if environment else ""
    )
    return (
        f'<section id="r{index}"><div class="head"><h2>{esc(_title(document))}</h2>{outcome(document)}</div>'
        f'<p class="soft">{esc(name)}, {esc(made_by)}</p>{inner}{where}{repeat}'
        f"{raw(document)}</section>\n"
    )


def _full_size(index: int, document: Mapping[str, Any], results: Sequence[tuple[str, Entry]]) -> str:
    """One of several results of one GPU: the first one's waterfalls have the rows of all."""
    same = [
        (at, name, other)
        for at, (name, other) in enumerate(results)
        if not isinstance(other, Clip) and kind_of(other) == "hopper" and alike(other) == alike(document)
    ]
    first, its_name, _ = same[0]
    if index != first:
        return hopper(document, above=its_name)
    return hopper(document, beside=[(name, other) for _, name, other in same[1:] if other["rows"]])


def _simulated(index: int, document: Mapping[str, Any], results: Sequence[tuple[str, Entry]]) -> str:
    """With the plans of later results on the same scene and seeds."""
    later = [(name, other) for name, other in results[index + 1 :] if not isinstance(other, Clip)]
    alike = [(name, other) for name, other in later if kind_of(other) == "simulate"]
    return simulated(document, [(name, other) for name, other in alike if comparable(other) == comparable(document)])


def _alone(index: int, document: Mapping[str, Any], results: Sequence[tuple[str, Entry]]) -> str:
    return render(document)


WITH_OTHERS = {"hopper": _full_size, "simulate": _simulated}
"""Kinds whose section depends on the other results of the page."""


def _title(document: Entry) -> str:
    if isinstance(document, Clip):
        return "One episode to look at"
    kind = kind_of(document)
    return TITLES.get(kind, kind)


def _incomplete(name: str, document: Mapping[str, Any], error: Exception) -> ConfigError:
    kind = document.get("kind")
    what = f"{name} says it is a {kind!r} result but is incomplete"
    return ConfigError(what, got=f"{type(error).__name__}: {error}", do=f"run vivace {kind} again")
