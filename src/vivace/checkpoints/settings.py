"""What a person asked for when opening a checkpoint, and how it combines with what the folder says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, ConfigError

LeRobotVersion = Literal["auto", "0.4", "0.5", "0.6"]
Dtype = Literal["float32", "bfloat16"]
DEFAULT_HORIZON = 50


@dataclass(frozen=True)
class Asked:
    """Arguments of `open_checkpoint`; None = leave it to the folder."""

    horizon: int | None = None
    vision_heads: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    lerobot_version: LeRobotVersion = "auto"

    def __post_init__(self) -> None:
        for name in ("horizon", "vision_heads", "num_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} cannot be used", got=value, wanted="a positive number")
        if self.lerobot_version not in ("auto", "0.4", "0.5", "0.6"):
            raise ConfigError("lerobot_version", got=repr(self.lerobot_version), wanted="auto, 0.4, 0.5 or 0.6")


def choose_horizon(asked: int | None, told: int | None, file: str) -> tuple[int, list[str], dict[str, str]]:
    """Horizon, notes and guesses: what was asked, else what the folder says, else the family's default and a note.

    Raises ConfigError where the two differ: a network makes chunks of the length that it was trained on.
    """
    if asked is not None:
        if told is not None and told != asked:
            raise ConfigError(
                "the checkpoint says how many actions a chunk has", got=f"horizon {asked}", wanted=f"{told}, see {file}",
                do="leave the horizon (--horizon) out",
            )  # fmt: skip
        return asked, [], {}
    if told is not None:
        return told, [], {}
    guess = f"{DEFAULT_HORIZON}, the family's default; the folder does not say. Set it with horizon (--horizon)"
    return DEFAULT_HORIZON, [f"horizon: {guess}"], {"horizon": guess}


def positive(config: Mapping[str, Any], key: str, default: float, *, where: Path) -> float:
    """A positive number of a settings file, or the default."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{where}: {key} cannot be used", got=repr(value)[:60], wanted="a positive number")
    return float(value)


def declared_dtype(config: Mapping[str, Any], keys: tuple[str, ...], default: Dtype, *, where: Path) -> Dtype:
    """What the checkpoint says it computes in: the first of `keys` that is set, else the default of its family."""
    told = next((config[key] for key in keys if config.get(key)), default)
    if told == "float32":
        return "float32"
    if told == "bfloat16":
        return "bfloat16"
    raise CheckpointError(f"{where}: {keys[0]} cannot be used", got=repr(told)[:60], wanted="float32 or bfloat16")
