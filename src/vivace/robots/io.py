"""Joins what a checkpoint says about its robot with what the user says, once, into a `RobotIO`.

openpi folders know only statistics per asset id: cameras, state and delta actions come from an embodiment, named by the
user or by a well-known asset id. LeRobot folders name their features: the robot is built from them, and a user's
embodiment may only replace where things are found in a request; what the training fixed (relative actions, prompt form)
stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from ..types import (
    Camera,
    Embodiment,
    Normalization,
    NormStats,
    PolicyKind,
    RobotFacts,
    RobotIO,
    StatePart,
)
from .embodiment import EMBODIMENTS, check, embodiment, from_toml
from .normalize import pair

PROMPT_TOKENS: dict[PolicyKind, int] = {"pi0": 48, "pi05": 200}
"""Longest prompt of the training configurations, used when the checkpoint does not say."""
OBSERVATION, IMAGES, STATE = "observation.", "observation.images.", "observation.state"


def resolve(
    facts: RobotFacts,
    kind: PolicyKind,
    *,
    embodiment: Embodiment | str | Path | None = None,
    asset_id: str | None = None,
    max_prompt_tokens: int | None = None,
    image_size: int = 224,
    action_width: int = 32,
    vocab_size: int = 0,
) -> RobotIO:
    """Decide everything between a request and the model, and check that it fits together.

    embodiment  a known name, a TOML file, or the record itself; None = inferred
    asset_id    which statistics of an openpi folder; None = the only ones, or those of the embodiment
    vocab_size  rows of the model's embedding: token ids beyond it are refused; 0 = not known, not checked
    Raises: ConfigError that lists the choices.
    """
    if facts.source == "lerobot":
        asset, robot = "", _lerobot_robot(facts, kind, embodiment)
    else:
        asset = _choose_asset(facts, kind, embodiment, asset_id)
        robot = _open(asset if embodiment is None else embodiment, kind, infer=embodiment is None)
    state, action = facts.stats.get(asset, (NormStats(), NormStats()))
    io = RobotIO(
        embodiment=robot,
        normalization=Normalization(facts.source, facts.state_mode, facts.action_mode, state, action, facts.eps),
        prompt=facts.prompt,
        image="pil" if facts.source == "openpi" else "torch",
        image_pad=facts.image_pad,
        pad_state_to=facts.pad_state_to,
        max_prompt_tokens=max_prompt_tokens or facts.max_prompt_tokens or PROMPT_TOKENS[kind],
        action_width=action_width,
        image_size=image_size,
        vocab_size=vocab_size,
    )
    check_io(io)
    return io


def check_io(io: RobotIO) -> None:
    """Raise ConfigError if the robot, the statistics and the model do not fit together."""
    robot, norm = io.embodiment, io.normalization
    check(robot, where=f"embodiment {robot.name!r}")
    sizes = {"state": sum(part.size for part in robot.state), "action": robot.action_dim}
    for what, stats, mode in (("state", norm.state, norm.state_mode), ("action", norm.action, norm.action_mode)):
        found = pair(stats, mode, what=what)
        if found is not None and not _fits(len(found[0]), sizes[what], exact=norm.flavour == "lerobot"):
            raise ConfigError(
                f"embodiment {robot.name!r} does not fit the checkpoint's {what} statistics",
                got=f"{what} of {sizes[what]}",
                wanted=len(found[0]),
                do="choose another embodiment or asset id",
            )
        if sizes[what] > io.action_width:
            raise ConfigError(f"{what} of {robot.name!r} is too wide", got=sizes[what], wanted=f"<= {io.action_width}")


def _fits(stats: int, size: int, *, exact: bool) -> bool:
    """openpi cuts statistics to the vector, so they may be wider (padded to 32); LeRobot's have exactly its width."""
    return stats == size if exact else stats >= size


# --- openpi -------------------------------------------------------------------------------------------------------


def infer_embodiment(asset_id: str) -> str | None:
    """The embodiment behind a well-known asset id; None = not known. Source: openpi training/config.py."""
    if asset_id == "droid":
        return "droid"
    if asset_id == "trossen":
        return "aloha"
    last = asset_id.rsplit("/", 1)[-1]
    if last == "libero":
        return "libero"
    return "aloha_sim" if last.startswith("aloha_sim_") else None


def _choose_asset(
    facts: RobotFacts, kind: PolicyKind, wanted: Embodiment | str | Path | None, asset_id: str | None
) -> str:
    known = sorted(facts.stats)
    if not known:
        raise ConfigError(
            "the checkpoint has no normalisation statistics",
            wanted="assets/<asset id>/norm_stats.json",
            do="copy the assets folder of the training run beside the weights",
        )
    if asset_id is not None:
        if asset_id not in facts.stats:
            raise ConfigError(
                "the checkpoint has no such asset id",
                got=repr(asset_id),
                wanted=f"one of {known}",
                do="pass another --asset-id, or copy its folder into assets/",
            )
        return asset_id
    matching = known
    if len(known) > 1 and wanted is not None:
        name = _open(wanted, kind, infer=False).name
        matching = [asset for asset in known if infer_embodiment(asset) == name]
    if len(matching) != 1:
        raise ConfigError(
            "the checkpoint has statistics of several robots",
            got="no asset id",
            wanted=f"one of {known}",
            do="pass it as --asset-id",
        )
    return matching[0]


def _open(wanted: Embodiment | str | Path, kind: PolicyKind, *, infer: bool) -> Embodiment:
    """An embodiment from a record, a name, a TOML path or (`infer`) an asset id."""
    if isinstance(wanted, Embodiment):
        return wanted
    if infer:
        name = infer_embodiment(str(wanted))
        if name is None:
            raise ConfigError(
                "cannot tell which robot this checkpoint is for",
                got=f"asset id {str(wanted)!r}",
                wanted=f"an embodiment: one of {sorted(EMBODIMENTS)}, or a TOML file",
                do="pass it as --embodiment",
            )
        return embodiment(name, kind)
    if isinstance(wanted, Path) or str(wanted).endswith(".toml"):
        return from_toml(Path(wanted))
    return embodiment(wanted, kind)


# --- LeRobot ------------------------------------------------------------------------------------------------------


def _lerobot_robot(facts: RobotFacts, kind: PolicyKind, wanted: Embodiment | str | Path | None) -> Embodiment:
    if wanted is None:
        return from_features(facts)
    robot = _open(wanted, kind, infer=False)
    if isinstance(wanted, str) and wanted in EMBODIMENTS:
        # A known name carries openpi's training conventions; a LeRobot policy was not trained with them.
        robot = replace(
            robot, delta_mask=(), joint_signs=(), gripper_dims=(), gripper_adapter="none", state_in_prompt=True
        )
    if robot.joint_signs or robot.gripper_adapter != "none" or not robot.state_in_prompt:
        raise ConfigError(
            f"embodiment {robot.name!r} asks for what LeRobot policies do not have",
            got="joint_signs, gripper_adapter or state_in_prompt = false",
            wanted="none of them",
        )
    if robot.delta_mask and robot.delta_mask != facts.relative_mask:
        raise ConfigError(
            f"embodiment {robot.name!r} contradicts the checkpoint's relative actions",
            got=f"delta_mask {list(robot.delta_mask)}",
            wanted=list(facts.relative_mask),
            do="leave delta_mask out; the checkpoint says it",
        )
    return replace(robot, delta_mask=facts.relative_mask)


def from_features(facts: RobotFacts) -> Embodiment:
    """The robot that a LeRobot checkpoint describes; cameras in its order, none of them required (missing = masked)."""
    if not facts.cameras or not facts.state_dim or not facts.action_dim:
        raise ConfigError(
            "the checkpoint does not describe its robot",
            got=f"cameras {list(facts.cameras)}, state {facts.state_dim}, action {facts.action_dim}",
            wanted="VISUAL, STATE and ACTION features in config.json",
            do="describe the robot in a TOML file (docs/guides/adding-a-robot.md)",
        )
    shorts = [_short(feature) for feature in facts.cameras]
    cameras = []
    for feature, short in zip(facts.cameras, shorts, strict=True):
        view = short if shorts.count(short) == 1 else feature
        names = _request_names(feature, facts.rename)
        aliases = dict.fromkeys(alias for name in names for alias in _spellings(name))
        cameras.append(Camera(view, names[0], required=False, aliases=tuple(a for a in aliases if a != names[0])))
    state_names = _request_names(STATE, facts.rename)
    state_aliases = dict.fromkeys(alias for name in state_names for alias in _spellings(name))
    state = StatePart(state_names[0], facts.state_dim, aliases=tuple(a for a in state_aliases if a != state_names[0]))
    return Embodiment(
        name="lerobot",
        cameras=tuple(cameras),
        state=(state,),
        action_dim=facts.action_dim,
        delta_mask=facts.relative_mask,
        prompt_key="task",
    )


def _request_names(feature: str, rename: Mapping[str, str]) -> list[str]:
    """The names under which a request carries a feature: those renamed to it, and its own unless that means another."""
    names = [source for source, target in rename.items() if target == feature]
    return names if names and feature in rename else [*names, feature]


def _short(feature: str) -> str:
    return feature.removeprefix(IMAGES).removeprefix(OBSERVATION)


def _spellings(name: str) -> tuple[str, ...]:
    """ "observation.images.front" also as "images.front", "front" and nested, "observation/images/front"."""
    tail = name.removeprefix(OBSERVATION)
    head = "images/" if name.startswith(IMAGES) else ""
    nested = head + _short(name)
    return (name, tail, _short(name), nested, f"observation/{nested}")
