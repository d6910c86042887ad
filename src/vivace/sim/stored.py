"""What a trained policy says about itself in the simulator: the file simulation.json beside its weights.

    {"schema": 1, "image_px": 64, "execute_ticks": 8, "committed_max_ticks": 10,
     "rates": [{"task": "conveyor", "belt": null, "mode": "aligned", "committed": false, "execute_ticks": 8,
                "delay_ticks": 0, "successes": 182, "n": 200, "first_seed": 50000, "scene_sha256": "...", "mujoco": "...",
                "steps": 5, "engine": "eager", "precision": "bfloat16"}]}

`vivace simulate --store` writes the rates; a campaign compares its own with them. Every key may be missing. A rate is never
replaced by one of fewer episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoints import bundled
from ..errors import ConfigError
from . import scene
from .arms import EXPERT, Arm
from .tasks import TASKS, belt_speed

FILE = "simulation.json"
EXPERTS_SCENE = "7468277f8e3c783ab2f0d1109beedd054409887eb94faeb2d5e17d1188e679c3"
"""Of conveyor-tasks-expert-2026-11-25.json in benchmarks/results, which has the expert's rates."""
LEAST = 50
"""Episodes below which a rate is not stored."""


@dataclass(frozen=True)
class Rate:
    """A success rate at one fixed delay, and which simulator, seeds and engine gave it. steps None, "" = not said."""

    task: str
    successes: int
    n: int
    belt: str | None = None
    mode: str = "aligned"
    committed: bool = False
    execute_ticks: int = 8
    delay_ticks: int = 0
    first_seed: int = 0
    scene_sha256: str = ""
    mujoco: str = ""
    steps: int | None = None
    engine: str = ""
    precision: str = ""

    def fits(self, arm: Arm, *, steps: int | None = None) -> bool:
        """Whether it was measured under this arm's conditions; engine and precision are what is being tested.

        steps: denoise steps that the arm really ran with, None = not known.
        """
        if None not in (steps, self.steps) and steps != self.steps:
            return False
        mine = (self.task, self.mode, self.committed, self.execute_ticks, (self.delay_ticks,))
        same = mine == (arm.task, arm.mode, arm.committed, arm.execute_ticks, arm.delay.ticks)
        if not same or arm.delay.measured or arm.fault is not None:
            return False
        return belt_speed(self.task, self.belt) == belt_speed(arm.task, arm.belt)  # "slow" is `conveyor`'s own


@dataclass(frozen=True)
class Stored:
    """What simulation.json says.

    image_px             size of the views in training, None = the network's own
    execute_ticks        intended execution horizon, None = not said
    committed_max_ticks  most committed actions that it was told in training, 0 = none
    """

    image_px: int | None = None
    execute_ticks: int | None = None
    committed_max_ticks: int = 0
    rates: tuple[Rate, ...] = field(default_factory=tuple)


def expert() -> Stored:
    """The scripted expert's own: every task, zero delay, 200 of 200 each (docs/guides/simulation.md)."""
    rates = (Rate(name, 200, 200, first_seed=60000, scene_sha256=EXPERTS_SCENE, mujoco="4.0.0") for name in TASKS)
    return Stored(committed_max_ticks=48, rates=tuple(rates))


def read(policy: str) -> Stored:
    """The file of a policy; empty where there is none. Raises ConfigError for one that is damaged."""
    if policy == EXPERT:
        return expert()
    file = bundled.find(Path(policy)) / FILE
    if not file.exists():
        return Stored()
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.pop("schema", 1) != 1:
            raise ConfigError(f"{file}", got="another schema", wanted="a JSON object with schema 1")
        rates = tuple(Rate(**row) for row in document.pop("rates", []))
        known = {key: document[key] for key in ("image_px", "execute_ticks", "committed_max_ticks") if key in document}
        if not all(isinstance(value, int) and value >= 0 for value in known.values()):
            raise ConfigError(f"{file}", got=known, wanted="whole numbers, at least 0")
        return Stored(rates=rates, **known)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"cannot read {file}", got=error, do="see docs/guides/simulation.md for its keys") from error


def write_trained(folder: Path, trained: Stored) -> None:
    """The file of a policy that was just trained: everything but rates, which a campaign measures."""
    document = {"schema": 1, **asdict(trained), "rates": []}
    (folder / FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def has_rate(arm: Arm) -> bool:
    """Whether there is a place for the arm's rate: a checkpoint's, at one delay that every machine has."""
    return arm.policy != EXPERT and len(set(arm.delay.ticks)) == 1 and not arm.delay.measured


def rate_of(
    arm: Arm, *, successes: int, n: int, first_seed: int = 0, engine: Mapping[str, Any] | None = None
) -> Rate:  # fmt: skip
    """The arm's rate in this simulator. engine: what really ran (`ResolvedEngine`)."""
    ran = engine or {}
    return Rate(
        task=arm.task, successes=successes, n=n, belt=arm.belt, mode=arm.mode, committed=arm.committed,
        execute_ticks=arm.execute_ticks, delay_ticks=arm.delay.ticks[0], first_seed=first_seed, **scene.versions(),
        steps=ran.get("num_denoise_steps", arm.steps), engine=ran.get("backend", ""), precision=ran.get("precision", ""),
    )  # fmt: skip


def check_rates(policy: str, rates: Sequence[Rate]) -> None:
    """Raise ConfigError for rates that may not be stored: of few episodes, fewer than those there, or of equal conditions.

    Before a campaign with the episodes that are asked for, as well as after it with those that ended.
    """
    if policy == EXPERT or not bundled.find(Path(policy)).is_dir():
        raise ConfigError("rates are stored beside a policy", got=repr(policy), wanted="a checkpoint folder")
    conditions = [_conditions(rate) for rate in rates]
    if twice := next((one for one in conditions if conditions.count(one) > 1), None):
        raise ConfigError(
            f"two rates of {policy} for the same conditions", got=twice,
            wanted="one engine, precision and number of steps with --store",
        )  # fmt: skip
    old = {_conditions(rate): rate.n for rate in read(policy).rates}
    for rate in rates:
        least = max(LEAST, old.get(_conditions(rate), 0))
        if rate.n < least:
            there = f"; {old[_conditions(rate)]} are behind the stored one" if _conditions(rate) in old else ""
            raise ConfigError(
                f"too few episodes to store a rate of {policy}, task {rate.task}", got=rate.n,
                wanted=f"at least {least}{there}", do=f"--episodes {least}, or leave --store out",
            )  # fmt: skip


def write_rates(policy: str, rates: tuple[Rate, ...]) -> Path:
    """Put rates into the file of a policy, in the place of those of the same conditions; the other keys stay.

    Raises: ConfigError, see `check_rates`.
    """
    check_rates(policy, rates)
    file = bundled.find(Path(policy)) / FILE
    old = read(policy).rates
    kept = [rate for rate in old if not any(_conditions(rate) == _conditions(one) for one in rates)]
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"schema": 1}
    document["rates"] = [asdict(rate) for rate in (*kept, *rates)]
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return file


def with_committed(arms: Sequence[Arm], wishes: Sequence[str]) -> list[Arm]:
    """Decide which arms tell their policy the committed actions; with several wishes an arm may become two.

    wishes: never; always (mode aligned); auto = aligned, and trained for delays as long as the arm's.
    """
    limits = {policy: read(policy).committed_max_ticks for policy in {arm.policy for arm in arms}}

    def told(arm: Arm, wish: str) -> bool:
        limit, longest = limits[arm.policy], max(arm.delay.ticks)
        if wish == "never" or arm.mode != "aligned" or not (longest or arm.delay.measured):
            return False
        trained = arm.policy != EXPERT and (0 < longest <= limit or (arm.delay.measured and limit > 0))
        return wish == "always" or trained

    return list(dict.fromkeys(replace(arm, committed=told(arm, wish)) for arm in arms for wish in wishes))


def _conditions(rate: Rate) -> tuple[Any, ...]:
    speed = belt_speed(rate.task, rate.belt)
    return rate.task, speed, rate.mode, rate.committed, rate.execute_ticks, rate.delay_ticks
