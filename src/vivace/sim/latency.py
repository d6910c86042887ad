"""Measured latencies as a delay to simulate: a JSON file of milliseconds, or a result of `vivace bench`.

    [71.2, 70.9, 95.0, ...]                 a bare list
    {"samples_ms": [71.2, 70.9, ...]}       the same with a name
    a result of `vivace bench -o`           the samples of its engine; FILE#ENGINE where it has several

Each inference of an episode draws one of them, seeded. Drawing keeps the distribution and loses the order: bursts are
spread out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

FORMATS = 'a list of milliseconds, {"samples_ms": [...]}, or a result of vivace bench'


@dataclass(frozen=True)
class Latencies:
    """name: as given on the command line; milliseconds: every sample."""

    name: str
    milliseconds: tuple[float, ...]


def read_latencies(given: str) -> Latencies:
    """Read FILE or FILE#ENGINE. Raises ConfigError for a file that is missing, empty or of another kind."""
    file, _, engine = given.partition("#")
    try:
        document = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read latencies from {file}", got=error, wanted=FORMATS) from error
    samples = _samples(document, file, engine)
    if not isinstance(samples, list) or not samples:
        raise ConfigError(f"no latencies in {file}", got=type(document).__name__, wanted=FORMATS)
    for value in samples:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 60_000.0:
            wanted = "milliseconds, at least 0 and below a minute"
            raise ConfigError(f"a latency in {file}", got=repr(value), wanted=wanted)
    return Latencies(given, tuple(float(value) for value in samples))


def _samples(document: Any, file: str, engine: str) -> Any:
    if not isinstance(document, Mapping):
        if engine:
            raise ConfigError(f"{file} has no engines", got=f"#{engine}", wanted=f"{file} without #")
        return document
    engines = document.get("engines")
    if not isinstance(engines, Mapping):
        return document.get("samples_ms")
    if not engine and len(engines) == 1:
        engine = next(iter(engines))
    if engine not in engines:
        raise ConfigError(
            f"which engine of {file}", got=engine or "none named", wanted=f"{file}#one of {list(engines)}"
        )
    row = engines[engine]
    return row.get("samples", {}).get("total_ms") if isinstance(row, Mapping) else None
