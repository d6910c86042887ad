"""What `vivace simulate` refuses before the first episode: what cannot be done, and what would be ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints import bundled
from ..errors import ConfigError
from .output import refuse_output

if TYPE_CHECKING:
    from ..sim.arms import Arm
    from .policy_args import CheckpointArgs
    from .simulate import Args


def check(args: Args) -> None:
    """Raise ConfigError for options that cannot be used, alone or together. Reads no checkpoint."""
    if args.episodes < 1 or args.processes < 1 or args.seed < 0 or args.control_episodes < 1:
        raise ConfigError("--episodes, --processes and --control-episodes must be at least 1, --seed at least 0")
    if args.real_clock and args.processes > 1:
        raise ConfigError(
            "--real-clock with --processes", got=args.processes, wanted="1: the others would slow it down"
        )
    if any(steps < 1 for steps in args.steps):
        raise ConfigError("--steps", got=list(args.steps), wanted="at least 1")
    if args.execute_ticks is not None and args.execute_ticks < 1:
        raise ConfigError("execute_ticks", got=args.execute_ticks, wanted="at least 1")
    if args.store and set(args.policy) == {"expert"}:
        raise ConfigError("nothing to store", got="--policy expert", wanted="--store with a checkpoint folder")
    _check_suite(args)
    _check_expert(args)
    for path in (args.output, args.video, args.rerun):
        refuse_output(path)
    for policy in args.policy:
        if policy != "expert" and not bundled.find(Path(policy)).is_dir():
            wanted = f"expert, a checkpoint folder, or one of {bundled.names()}"
            raise ConfigError("--policy", got=repr(policy), wanted=wanted)


def check_horizons(arms: Sequence[Arm], options: CheckpointArgs) -> None:
    """Raise ConfigError where more actions shall be executed than a chunk has: the robot would wait for the rest.

    Opens the arms' checkpoints, which reads headers only. Raises: what `open_checkpoint` raises.
    """
    from ..checkpoints.open import open_checkpoint
    from ..sim.actors import EXPERT_HORIZON

    horizons = {"expert": EXPERT_HORIZON}
    for arm in arms:
        if arm.policy not in horizons:
            opened = open_checkpoint(
                arm.policy,
                horizon=options.horizon,
                vision_heads=options.vision_heads,
                lerobot_version=options.lerobot_version,
            )
            horizons[arm.policy] = opened.model.horizon
        horizon = horizons[arm.policy]
        if arm.execute_ticks > horizon:
            wanted = f"at most {horizon}, the actions of a chunk of {arm.policy}"
            do = f"pass --execute-ticks {horizon} or fewer"
            raise ConfigError("--execute-ticks", got=arm.execute_ticks, wanted=wanted, do=do)


def _check_suite(args: Args) -> None:
    """No option is ignored: some are for the conveyor only, some for suites only."""
    conveyor = "task", "episodes", "store", "video", "rerun", "gl"
    suites = "convention", "suite_task", "episodes_per_task", "libero_python"
    for name in suites if args.suite is None else conveyor:
        if getattr(args, name) != getattr(type(args), name):
            where = "a suite: pass --suite" if args.suite is None else "the conveyor: leave it out, or --suite"
            raise ConfigError(_option(name), got=getattr(args, name), wanted=f"nothing; it is for {where}")


def _check_expert(args: Args) -> None:
    """Nor where the scripted expert alone acts: without --policy, several plans would be one arm and look like a run."""
    if set(args.policy) != {"expert"}:
        return
    mine = "engine", "precision", "steps", *(("execute_ticks",) if args.suite is not None else ())
    given = [(name, getattr(args, name), getattr(type(args), name)) for name in mine]
    given += [(one.name, getattr(args.options, one.name), one.default) for one in fields(args.options)]
    for name, value, default in given:
        if value != default:
            raise ConfigError(
                f"{_option(name)} with --policy expert, the default", got=value,
                wanted="nothing; the scripted expert has no network",
                do="pass --policy with a checkpoint folder, or leave it out",
            )  # fmt: skip


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"
