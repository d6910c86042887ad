"""Pieces of HTML. Every text that comes from a result goes through `esc`; nothing else builds tags from data."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .results import number


def esc(value: object) -> str:
    """Text that is safe in content and in quoted attributes."""
    return html.escape(str(value), quote=True)


def num(value: Any, digits: int = 3) -> str:
    """A number for people: significant digits, no exponent in the everyday range; words stay words."""
    x = number(value)
    if math.isnan(x):
        return "NaN" if str(value).lower() == "nan" else ("-" if value is None else esc(value))
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    if x == 0 or 1e-3 <= abs(x) < 1e5:
        text = f"{x:.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}" if x else "0"
        return text
    return f"{x:.{digits - 1}e}"


def pill(text: str, kind: str) -> str:
    """A coloured word: good, bad, warn or plain."""
    return f'<span class="pill {esc(kind)}">{esc(text)}</span>'


def verdict(passed: bool) -> str:
    """Pass or fail as a pill."""
    return pill("pass", "good") if passed else pill("fail", "bad")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[int] = ()) -> str:
    """A table that scrolls sideways on a phone. Cells are HTML: escape them before."""

    def kind(column: int) -> str:
        return ' class="text"' if column in text_columns else ""

    top = "".join(f"<th{kind(i)}>{esc(head)}</th>" for i, head in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """The few numbers to read first: (value, what it is); values are HTML."""
    return (
        '<div class="tiles">'
        + "".join(f"<div class=tile><b>{v}</b><span>{esc(k)}</span></div>" for v, k in items)
        + "</div>"
    )


def figures(items: Sequence[tuple[str, str]]) -> str:
    """Plots side by side where there is room: (svg, caption)."""
    cells = "".join(f"<figure>{svg}<figcaption>{esc(caption)}</figcaption></figure>" for svg, caption in items if svg)
    return f'<div class="figures">{cells}</div>' if cells else ""


def fold(title: str, inner: str, *, is_open: bool = False) -> str:
    """Something that is there but not in the way."""
    return f"<details{' open' if is_open else ''}><summary>{esc(title)}</summary>{inner}</details>"


def raw(document: Mapping[str, Any], title: str = "everything that was recorded, as JSON") -> str:
    """The document without its long sample lists."""
    return fold(title, f"<pre>{esc(json.dumps(_short(document), indent=1))}</pre>")


def pairs(facts: Mapping[str, Any]) -> str:
    """Names and values, one level deep; deeper values are written as short JSON."""
    rows = [[esc(name), _value(value)] for name, value in facts.items()]
    return table(["what", "value"], rows, text_columns=(1,))


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return esc({True: "yes", False: "no", None: "-"}[value])
    if isinstance(value, float):
        return num(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (Mapping, list)):
        text = json.dumps(_short(value))
        return f"<code>{esc(text[:400])}{'…' if len(text) > 400 else ''}</code>"
    return esc(value)


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        if len(value) > 64 and all(isinstance(item, (int, float)) for item in value):
            return [f"{len(value)} numbers, left out here"]
        return [_short(item) for item in value]
    return value
