"""A training recipe: one TOML file, everything that decides the result. Unknown keys are errors.

[network]  sizes of the three stacks        [data]      which demonstrations
[optimise] steps, batch, learning rate ...  [closed_loop]  episodes in the simulator   [export] what is written
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..config import GemmaConfig, ModelConfig, VisionConfig
from ..errors import ConfigError
from ..sim.conveyor import STATE_DIM
from ..sim.record import Plan, Source

Record = TypeVar("Record")


@dataclass(frozen=True)
class Network:
    """Sizes. The vocabulary is the tokenizer's, heads of both Gemma stacks are equal (they share keys and values)."""

    vision: VisionConfig
    prefix: GemmaConfig
    expert: GemmaConfig
    action_width: int = 8
    horizon: int = 24

    def __post_init__(self) -> None:
        """Refuse sizes that no network has, or that a checkpoint folder cannot say."""
        for stack in ("vision", "prefix", "expert"):
            _at_least(f"network.{stack}", 1, vars(getattr(self, stack)))
        _at_least("network", 1, {"horizon": self.horizon})
        _at_least("network", STATE_DIM, {"action_width": self.action_width}, why=": state and actions have to fit")
        v, p, e = self.vision, self.prefix, self.expert
        if v.image_size % v.patch_size or v.width % v.num_heads:
            raise ConfigError("network.vision", got=v, wanted="whole patches, whole heads")
        if (p.num_heads, p.head_dim, p.num_kv_heads, p.layers) != (e.num_heads, e.head_dim, e.num_kv_heads, e.layers):
            raise ConfigError(
                "network: prefix and expert share keys and values", wanted="equal heads, head_dim and layers in both"
            )
        if p.num_kv_heads != 1:
            raise ConfigError("network.prefix.num_kv_heads", got=p.num_kv_heads, wanted="1: folders cannot say another")
        if p.head_dim % 2 or e.width % 2:
            raise ConfigError(
                "network", got=f"head_dim {p.head_dim}, expert.width {e.width}",
                wanted="even numbers: positions and flow times are pairs of sine and cosine",
            )  # fmt: skip

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

    def __post_init__(self) -> None:
        """Refuse no data, and data from two places."""
        _at_least("data", 1, {"processes": self.processes})
        if bool(self.sources) == bool(self.folder):
            raise ConfigError(
                "data", got="both" if self.folder else "neither", wanted="either sources or folder"
            )  # fmt: skip


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

    @property
    def told_ticks(self) -> int:
        """Most committed actions that the policy learns to continue."""
        return self.max_committed if self.committed_share else 0

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be learnt with."""
        positive = "steps", "batch", "flows", "log_every"
        _at_least("optimise", 1, {name: getattr(self, name) for name in positive})
        counts = "warmup_steps", "seed", "max_committed", "save_every"
        _at_least("optimise", 0, {name: getattr(self, name) for name in counts})
        for name in ("learning_rate", "clip_norm"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"optimise.{name}", got=getattr(self, name), wanted="a number above 0")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ConfigError("optimise.weight_decay", got=self.weight_decay, wanted="a number of at least 0")
        if not 0.0 <= self.committed_share <= 1.0:
            raise ConfigError("optimise.committed_share", got=self.committed_share, wanted="a share from 0 to 1")
        for name in ("ema", "brightness"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimise.{name}", got=getattr(self, name), wanted="a share from 0 to below 1")


@dataclass(frozen=True)
class Correction:
    """Data from where the policy itself gets to (DAgger): episodes run with it, labels by the expert.

    at           share of the steps after which it happens
    delay_ticks  inference delay in these episodes; the policy is told which actions are executed meanwhile
    """

    at: float
    sources: tuple[Source, ...]
    delay_ticks: int = 0

    def __post_init__(self) -> None:
        """Refuse a correction that would never happen, or teach nothing."""
        if not 0.0 <= self.at < 1.0:
            raise ConfigError("closed_loop.corrections.at", got=self.at, wanted="a share of the steps, below 1")
        if not self.sources:
            raise ConfigError("closed_loop.corrections.sources", got="none", wanted="at least one task with episodes")
        _at_least("closed_loop.corrections", 0, {"delay_ticks": self.delay_ticks})

    @property
    def seed_block(self) -> int:
        """Which of the 100 blocks of correction seeds is its own."""
        return round(100 * self.at)


@dataclass(frozen=True)
class ClosedLoop:
    """Episodes of the averaged weights in the simulator, on seeds that recording never uses (they begin at 0).

    processes  simulators that run at the same time
    """

    sources: tuple[Source, ...] = ()
    corrections: tuple[Correction, ...] = ()
    execute_ticks: int = 8
    processes: int = 2

    def __post_init__(self) -> None:
        """Refuse what would wait for ever, and corrections on each other's seeds."""
        _at_least("closed_loop", 1, {"execute_ticks": self.execute_ticks, "processes": self.processes})
        shares = [one.seed_block for one in self.corrections]
        if len(set(shares)) < len(shares):
            raise ConfigError(
                "closed_loop.corrections", got=f"at {[one.at for one in self.corrections]}",
                wanted="shares that differ by a hundredth or more: each correction has seeds of its own",
            )  # fmt: skip


@dataclass(frozen=True)
class Export:
    """num_denoise_steps: Euler steps that the folder asks for. dtype: of the stored weights."""

    num_denoise_steps: int = 5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        """Refuse a folder that could not be served."""
        _at_least("export", 1, {"num_denoise_steps": self.num_denoise_steps})


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
        if self.optimise.max_committed >= self.network.horizon:
            raise ConfigError(
                "optimise.max_committed", got=self.optimise.max_committed,
                wanted=f"below the horizon {self.network.horizon}",
            )  # fmt: skip
        told = self.optimise.told_ticks
        most = min(told, self.network.horizon - self.closed_loop.execute_ticks)
        for one in self.closed_loop.corrections:
            if one.delay_ticks > max(0, most):
                raise ConfigError(
                    "closed_loop.corrections.delay_ticks", got=one.delay_ticks,
                    wanted=f"at most the {told} committed actions that [optimise] trains for, "
                    f"and chunks of {self.network.horizon} that last {self.closed_loop.execute_ticks} ticks longer",
                )  # fmt: skip
        if self.data.sources:
            self.plan()

    def plan(self) -> Plan:
        """What to record. Raises ConfigError for numbers that cannot be recorded."""
        data, network = self.data, self.network
        return Plan(
            data.sources, seed=data.seed, image_px=network.vision.image_size, horizon=network.horizon, sigma=data.sigma,
            stride=data.stride,
        )  # fmt: skip


def _at_least(where: str, least: int, values: dict[str, int], *, why: str = "") -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{where}.{name}", got=value, wanted=f"at least {least}{why}")


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
