"""Small readers for what lies in a checkpoint folder beside the weights: JSON files, safetensors in one or many parts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .safetensors_io import Header, StoredTensor, read_header
from .source import listing

MAX_JSON_BYTES = 64 << 20
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN_SETTINGS = "vivace.json"
"""What vivace must know and LeRobot's config.json has no field for: LeRobot refuses a file with fields it does not know."""
OWN_KEYS = ("vision_num_attention_heads", "rtc_training_max_delay")


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises CheckpointError if the file is missing, too big, no JSON, or no object."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file} is too big for a settings file", got=f"{file.stat().st_size} bytes")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}", got=str(error)[:200], wanted="a JSON file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"cannot use {file}", got=f"a JSON {type(value).__name__}", wanted="a JSON object")
    return value


def settings_with(folder: Path, key: str) -> tuple[dict[str, Any], Path]:
    """The settings that say `key`, and their file: config.json where it does (older folders), else vivace.json if there.

    Raises CheckpointError for a key of vivace.json that is not one of OWN_KEYS: a mistyped one would be no setting at all.
    """
    file, own = folder / "config.json", folder / OWN_SETTINGS
    config = read_json(file)
    if not own.is_file():
        return config, file
    settings = read_json(own)
    if unknown := sorted(settings.keys() - set(OWN_KEYS)):
        near = difflib.get_close_matches(unknown[0], OWN_KEYS, 1)
        raise CheckpointError(
            f"{own} has an unknown key", got=repr(unknown[0])[:60], wanted=f"one of {sorted(OWN_KEYS)}",
            do=f"did you mean {near[0]!r}?" if near else "",
        )  # fmt: skip
    return (config, file) if key in config else (settings, own)


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors weights under a name that openpi and LeRobot use."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def read_weights(folder: Path) -> Header:
    """The header of model.safetensors, or the union of the parts that model.safetensors.index.json names."""
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX} has no weight_map", do="the index is damaged; download it again")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for part in sorted({str(name) for name in index.values()}):
        if Path(part).name != part:
            raise CheckpointError(f"{folder / INDEX} points outside its folder", got=part)
        header = read_header(folder / part)
        if twice := sorted(tensors.keys() & header.tensors.keys()):
            raise CheckpointError(f"{folder}: tensors occur in two parts", got=listing(twice))
        tensors.update(header.tensors)
        metadata.update(header.metadata)
    if missing := sorted(set(index) - set(tensors)):
        raise CheckpointError(f"{folder}: parts lack tensors that the index promises", got=listing(missing))
    return Header(tensors, metadata)


def tokenizer_dir(folder: Path) -> Path | None:
    """The folder of the checkpoint's own tokenizer, if it ships one: `tokenizer/`, or the folder itself."""
    for place in (folder / "tokenizer", folder):
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return place
    return None


def as_table(value: Any, what: str) -> dict[str, Any]:
    """A settings value that must be a table; None counts as empty. Raises CheckpointError."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} cannot be used", got=repr(value)[:60], wanted="a table")
    return value


def as_strings(value: Any, what: str) -> list[str]:
    """A settings value that must be a list of texts; None counts as empty. Raises CheckpointError."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{what} cannot be used", got=repr(value)[:60], wanted="a list of texts")
    return value


def as_flag(value: Any, what: str) -> bool:
    """A settings value that must be true or false; None counts as false. Raises CheckpointError."""
    if value is None or isinstance(value, bool):
        return bool(value)
    raise CheckpointError(f"{what} cannot be used", got=repr(value)[:60], wanted="true or false")


def whole(table: Mapping[str, Any], key: str, *, where: Path) -> int | None:
    """An optional positive whole number of a settings file. Raises CheckpointError for anything else."""
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{where}: {key} cannot be used", got=repr(value)[:60], wanted="a positive whole number")
    return value
