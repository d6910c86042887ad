"""One result = one JSON document that carries the machine it came from. Every evidence command writes this envelope.

    {"schema": 1, "kind": "bench", "vivace": "0.1.0", "created_utc": "...", "command": "...", "environment": {...}, ...}

`kind` names who wrote it (check, bench, hopper, budget, golden, inspect, doctor, simulate, train, serve-drive,
serve-closed-loop); the remaining keys belong to that kind. JSON has no NaN and no infinity: they are written as the
strings "nan", "inf", "-inf" and read back by `number`, so a broken number stays visible instead of becoming null.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigError

SCHEMA = 1


def result(kind: str, body: Mapping[str, Any], *, environment: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Wrap the findings of one command; every value becomes a plain JSON type.

    Args:
        kind: the command.
        body: its findings; dataclasses, numpy arrays and paths are converted.
        environment: `environment.collect()`, stored so that a number is never without its machine.
    """
    envelope = {
        "schema": SCHEMA,
        "kind": kind,
        "vivace": __version__,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": dict(environment or {}),
        **body,
    }
    plain: dict[str, Any] = jsonable(envelope)
    return plain


def jsonable(value: Any) -> Any:
    """Convert to plain JSON types; non-finite floats become "nan", "inf", "-inf"."""
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    numpy = sys.modules.get(
        "numpy"
    )  # not imported: an array can only exist where it was, and doctor must run without it
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def number(value: Any) -> float:
    """Read a number that `jsonable` may have written as a string; anything else is NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def write_result(path: Path, document: Mapping[str, Any]) -> None:
    """Write one result, see `write_text`."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file; the folder is created. It appears complete or not at all. Raises ConfigError where it cannot be."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ConfigError(f"cannot write {path}", got=error, do="name another file with -o") from error


def read_result(path: Path) -> dict[str, Any]:
    """Read one result. Raises ConfigError when it is missing, not JSON, or from a newer schema."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no result file {path}", do="run e.g. vivace bench PATH -o bench.json first") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read {path} as JSON", got=error, do="pass a file written with -o FILE") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not a result", got=type(document).__name__, wanted="a JSON object")
    schema = document.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ConfigError(f"{path} has a newer schema", got=schema, wanted=f"at most {SCHEMA}", do="upgrade vivace")
    return document
