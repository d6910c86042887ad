"""A training recipe: one TOML file, everything that decides the result. Unknown keys are errors.

[network]  sizes of the three stacks        [data]      which demonstrations
[optimise] steps, batch, learning rate ...  [closed_loop]  episodes in the simulator   [export] what is written
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..config import GemmaConfig, ModelConfig, VisionConfig
from ..errors import ConfigError
from ..sim.record import Source

Record = TypeVar("Record")


@dataclass(frozen=True)
class Network:
    """Sizes. The vocabulary is the tokenizer's, heads of both Gemma stacks are equal (they share keys and values)."""

    vision: VisionConfig
    prefix: GemmaConfig
    expert: GemmaConfig
    action_width: int = 8
    horizon: int = 24

    def model(self, vocab_size: int) -> ModelConfig:
        """The network as its LeRobot folder will describe it."""
        return ModelConfig(
            kind="pi05", vision=self.vision, prefix=self.prefix, expert=self.expert, vocab_size=vocab_size,
            action_width=self.action_width, horizon=self.horizon, time_grid="direct", declared_dtype="float32",
            flavour="lerobot",
        )  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Demonstrations: recorded here from `sources`, or read from a LeRobot dataset folder.

    stride     see `sim.record.Plan`
    processes  that record; does not change the data
    """

    sources: tuple[Source, ...] = ()
    folder: str = ""
    seed: int = 0
    sigma: tuple[float, ...] = (0.0, 0.25, 0.5)
    stride: int = 5
    processes: int = 2


@dataclass(frozen=True)
class Optimise:
    """AdamW, linear warm-up, cosine to a hundredth; weights are averaged exponentially.

    flows        draws of (noise, time, committed actions) per observation
    max_committed, committed_share  share of the draws with 1 .. max leading clean actions
    brightness   images are multiplied by a number from [1 - b, 1 + b], each colour by another from [1 - b/4, 1 + b/4]
    """

    steps: int = 1000
    batch: int = 64
    flows: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.999
    seed: int = 0
    max_committed: int = 8
    committed_share: float = 0.3
    brightness: float = 0.2
    log_every: int = 50
    save_every: int = 0


@dataclass(frozen=True)
class Correction:
    """Data from where the policy itself gets to (DAgger): episodes run with it, labels by the expert.

    at        share of the steps after which it happens
    """

    at: float
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class ClosedLoop:
    """Episodes of the averaged weights in the simulator, on seeds that recording never uses (they begin at 0).

    processes  simulators that run at the same time
    """

    sources: tuple[Source, ...] = ()
    corrections: tuple[Correction, ...] = ()
    execute_ticks: int = 8
    processes: int = 2


@dataclass(frozen=True)
class Export:
    """num_denoise_steps: Euler steps that the folder asks for. dtype: of the stored weights."""

    num_denoise_steps: int = 5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run. start: folder of a trained policy to begin from; "" = fresh weights."""

    network: Network
    name: str = "policy"
    start: str = ""
    data: Data = field(default_factory=Data)
    optimise: Optimise = field(default_factory=Optimise)
    closed_loop: ClosedLoop = field(default_factory=ClosedLoop)
    export: Export = field(default_factory=Export)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained before anything is recorded."""
        o, n = self.optimise, self.network
        positive = {"steps": o.steps, "batch": o.batch, "flows": o.flows, "log_every": o.log_every}
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"optimise.{name}", got=value, wanted="at least 1")
        if bool(self.data.sources) == bool(self.data.folder):
            raise ConfigError("data", got="both or neither", wanted="either sources or folder")
        if not 0 <= o.max_committed < n.horizon or not 0 <= o.committed_share <= 1 or not 0 <= o.ema < 1:
            raise ConfigError(
                "optimise", got=f"max_committed {o.max_committed}, committed_share {o.committed_share}, ema {o.ema}",
                wanted=f"max_committed below the horizon {n.horizon}, shares from 0 to 1, ema below 1",
            )  # fmt: skip
        if n.vision.image_size % n.vision.patch_size or n.vision.width % n.vision.num_heads:
            raise ConfigError("network.vision", got=n.vision, wanted="whole patches, whole heads")
        if (n.prefix.num_heads, n.prefix.head_dim, n.prefix.num_kv_heads, n.prefix.layers) != (
            n.expert.num_heads, n.expert.head_dim, n.expert.num_kv_heads, n.expert.layers,
        ):  # fmt: skip
            raise ConfigError(
                "network: prefix and expert share keys and values", wanted="equal heads, head_dim and layers in both"
            )


def read_recipe(file: Path) -> Recipe:
    """Raises ConfigError naming the key that is unknown or of the wrong kind."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read recipe {file}", got=error) from error
    return build(Recipe, table, where=file.name)


def build(record: type[Record], table: Any, *, where: str) -> Record:
    """A frozen record from a table, recursively; missing keys keep their defaults."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} cannot be used", got=repr(table)[:60], wanted="a table")
    hints = typing.get_type_hints(record)
    fields = {one.name: one for one in dataclasses.fields(record)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            raise ConfigError(
                f"{where} has an unknown key", got=repr(key), wanted=f"one of {sorted(fields)}",
                do=f"did you mean {near[0]!r}?" if near else "",
            )  # fmt: skip
    missing = [
        name for name, one in fields.items()
        if name not in table and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return record(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in table.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, where=where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} cannot be used", got=repr(value)[:60], wanted="a list")
        return tuple(_value(typing.get_args(kind)[0], item, where) for item in value)
    if origin is Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(f"{where} cannot be used", got=repr(value), wanted=f"one of {typing.get_args(kind)}")
        return value
    assert not isinstance(kind, types.UnionType), f"{where}: {kind}"
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not good:
        raise ConfigError(f"{where} cannot be used", got=repr(value)[:60], wanted=kind.__name__)
    return value
