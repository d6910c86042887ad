"""A robot is data: which cameras and state arrays a request carries, and what the action numbers mean.

Three sources, one record (`types.Embodiment`): the names below, a user's TOML file (docs/guides/adding-a-robot.md), or the
features of a LeRobot checkpoint (`robots.io`). Nothing here runs per observation.
"""

from __future__ import annotations

import difflib
import importlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..types import Camera, Embodiment, PolicyKind, StatePart

EMBODIMENTS: dict[str, tuple[str, str]] = {
    "libero": ("libero", "embodiment"),
    "droid": ("droid", "embodiment"),
    "droid_jointpos": ("droid", "joint_position"),
    "aloha": ("aloha", "embodiment"),
    "aloha_sim": ("aloha", "simulated"),
    "conveyor": ("conveyor", "embodiment"),
}
"""Name -> (module beside this one, function that builds it); imported only when asked for."""


def embodiment(name: str, kind: PolicyKind) -> Embodiment:
    """A robot that vivace knows by name. Raises ConfigError with "did you mean" for any other name.

    kind  openpi's delta masks and the use of the state depend on it (pi0_libero against pi05_libero)
    """
    if name not in EMBODIMENTS:
        raise ConfigError(
            f"unknown embodiment {name!r}{did_you_mean(name, EMBODIMENTS)}",
            wanted=f"one of {sorted(EMBODIMENTS)}, or the path of a TOML file",
        )
    module, function = EMBODIMENTS[name]
    build: Callable[[PolicyKind], Embodiment] = getattr(importlib.import_module(f"vivace.robots.{module}"), function)
    return build(kind)


def from_toml(path: Path) -> Embodiment:
    """Read a robot from a TOML file whose keys are the fields of `Embodiment`, `Camera` and `StatePart`.

    Raises: ConfigError for a file that cannot be read, an unknown or missing key, a wrong type, or fields that contradict
            each other; each names the file and the key.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the robot file {path}", got=str(error)) from error
    robot: Embodiment = _record(Embodiment, table, where=str(path))
    check(robot, where=str(path))
    return robot


def check(robot: Embodiment, *, where: str) -> None:
    """Raise ConfigError if the fields of a robot contradict each other. `where` begins the message."""
    size = sum(part.size for part in robot.state)
    problems = {
        "cameras: at least one is needed": not robot.cameras,
        "cameras: two have the same view or key": _repeated([c.view for c in robot.cameras])
        or _repeated([c.key for c in robot.cameras]),
        "state: two parts have the same key": _repeated([part.key for part in robot.state]),
        "state: every size must be at least 1": any(part.size < 1 for part in robot.state),
        "action_dim must be at least 1": robot.action_dim < 1,
        f"delta_mask is longer than the state ({size}) or action_dim ({robot.action_dim})": len(robot.delta_mask)
        > min(size, robot.action_dim),
        f"joint_signs must have one number per state ({size}) and action ({robot.action_dim})": bool(robot.joint_signs)
        and not len(robot.joint_signs) == size == robot.action_dim,
        "gripper_dims lie outside the state or the actions": any(
            not 0 <= dim < min(size, robot.action_dim) for dim in robot.gripper_dims
        ),
        "gripper_adapter needs gripper_dims": robot.gripper_adapter != "none" and not robot.gripper_dims,
        "gripper_adapter must be 'none' or 'aloha'": robot.gripper_adapter not in ("none", "aloha"),
        f"action_units must have {robot.action_dim} entries": len(robot.action_units) not in (0, robot.action_dim),
        "control_hz must not be negative": robot.control_hz < 0,
    }
    for problem, present in problems.items():
        if present:
            raise ConfigError(f"{where}: {problem}")


def _repeated(values: list[str]) -> bool:
    return len(set(values)) != len(values)


# --- TOML to frozen records ---------------------------------------------------------------------------------------

NESTED: dict[str, type[Any]] = {"cameras": Camera, "state": StatePart}
ELEMENT: dict[str, tuple[type[Any], ...]] = {
    "delta_mask": (bool,),
    "joint_signs": (int, float),
    "gripper_dims": (int,),
    "ignored_keys": (str,),
    "action_units": (str,),
    "aliases": (str,),
}
SCALAR: dict[str, tuple[type[Any], ...]] = {
    "name": (str,),
    "action_dim": (int,),
    "gripper_adapter": (str,),
    "state_in_prompt": (bool,),
    "prompt_key": (str,),
    "control_hz": (int, float),
    "default_prompt": (str,),
    "metadata": (dict,),
    "view": (str,),
    "key": (str,),
    "required": (bool,),
    "chw": (bool,),
    "size": (int,),
    "units": (str,),
}


def _record(record: type[Any], table: Any, *, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: wrong type", got=type(table).__name__, wanted="a table")
    known = {field.name: field for field in fields(record)}
    for key in table:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}{did_you_mean(key, known)}", wanted=f"some of {sorted(known)}"
            )
    for name, field in known.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing", wanted=field.type)
    return record(**{key: _value(key, value, where=f"{where}: {key}") for key, value in table.items()})


def _value(key: str, value: Any, *, where: str) -> Any:
    if key in NESTED:
        items = _list(value, where=where)
        return tuple(_record(NESTED[key], item, where=f"{where}[{i}]") for i, item in enumerate(items))
    if key in ELEMENT:
        return tuple(_typed(item, ELEMENT[key], where=where) for item in _list(value, where=where))
    return _typed(value, SCALAR[key], where=where)


def _list(value: Any, *, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: wrong type", got=type(value).__name__, wanted="a list")
    return value


def _typed(value: Any, types: tuple[type[Any], ...], *, where: str) -> Any:
    """The value if its type is one of `types`; a TOML boolean is not a number, an integer may stand for a float."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join(one.__name__ for one in types)
        raise ConfigError(f"{where}: wrong type", got=f"{value!r} ({type(value).__name__})", wanted=names)
    return float(value) if float in types else value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'wrist'?)" for the closest of `known`, "" if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
