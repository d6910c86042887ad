"""`vivace inspect PATH`: what a checkpoint is, and what is still needed to run it.

What is said about the robot is what a policy would do that is loaded with the same options: an openpi folder holds only
statistics, so its cameras and delta actions are those of the embodiment, told or inferred, or not known at all.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..checkpoints.open import open_checkpoint
from ..checkpoints.source import Checkpoint, check_finite
from ..errors import ConfigError
from ..robots.io import resolve
from ..types import Embodiment, NormStats
from .output import FAILED, OK, console, emit

KIND = {"pi0": "pi0", "pi05": "pi0.5"}
NEEDS = {  # fields of NormStats that a mode reads
    "identity": (),
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
}

DEPENDS = "depends on --embodiment"


@dataclass(frozen=True)
class Robot:
    """The robot that a policy would be loaded for.

    found       None where neither the folder nor the options say it
    basis       where `found` comes from, or why there is none
    """

    found: Embodiment | None
    basis: str


@dataclass(frozen=True)
class Args:
    """Say what a checkpoint is. Exit code 0: ready to run; 1: something is missing; 2: not a (whole) checkpoint."""

    path: tyro.conf.Positional[Path]
    """Folder of openpi (PyTorch or JAX), LeRobot or transformers."""
    embodiment: str | None = None
    """A known robot (libero, droid, aloha, ...) or a TOML file; default: what the checkpoint says."""
    asset_id: str | None = None
    """openpi: which normalisation statistics to use."""
    horizon: int | None = None
    """Actions per chunk, where the folder does not say."""
    vision_heads: int | None = None
    """Heads of the vision tower, where neither the tensors nor config.json say."""
    num_heads: int | None = None
    """Heads of the Gemma stacks, for more than one key/value head."""
    head_dim: int | None = None
    """Values per head of the Gemma stacks, for more than one key/value head."""
    lerobot_version: Literal["auto", "0.4", "0.5", "0.6"] = "auto"
    """Which LeRobot wrote the folder, where the guess is wrong."""
    check_values: bool = False
    """Read every tensor and look for NaN and infinity."""


def run(args: Args) -> int:
    """Print the table and the JSON document."""
    checkpoint = open_checkpoint(
        args.path,
        horizon=args.horizon,
        vision_heads=args.vision_heads,
        num_heads=args.num_heads,
        head_dim=args.head_dim,
        lerobot_version=args.lerobot_version,
    )
    if args.check_values:
        for ref in track(checkpoint.tensors.values(), "reading", console=console, transient=True):
            check_finite(ref, ref.read(torch.device("cpu")))
    robot = find_robot(checkpoint, embodiment=args.embodiment, asset_id=args.asset_id)
    facts = describe(checkpoint, robot)
    facts["values_checked"] = args.check_values
    _print(checkpoint, robot, facts)
    emit(facts)
    return FAILED if facts["missing"] else OK


def find_robot(checkpoint: Checkpoint, *, embodiment: str | None = None, asset_id: str | None = None) -> Robot:
    """Resolve the robot as `load_policy` does. Raises ConfigError only for options that a whole folder cannot follow."""
    facts, model = checkpoint.robot, checkpoint.model
    try:
        io = resolve(
            facts,
            model.kind,
            embodiment=embodiment,
            asset_id=asset_id,
            image_size=model.vision.image_size,
            action_width=model.action_width,
            vocab_size=model.vocab_size,
        )
    except ConfigError as error:
        if (embodiment is not None or asset_id is not None) and not _gaps(checkpoint):
            raise
        return Robot(None, str(error))
    name = io.embodiment.name
    if embodiment is not None:
        basis = f"{name}, as told"
    elif facts.source == "lerobot":
        basis = "as config.json describes it"
    else:
        basis = f"inferred: {name} from the norm stats of asset {asset_id or next(iter(facts.stats))!r}"
    return Robot(io.embodiment, basis)


def describe(checkpoint: Checkpoint, who: Robot) -> dict[str, Any]:
    """Everything that inspect knows, as JSON types; null where it depends on an embodiment that nobody named."""
    model, robot = checkpoint.model, checkpoint.robot
    dtypes: dict[str, int] = {}
    for ref in checkpoint.tensors.values():
        name = str(ref.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + torch.Size(ref.shape).numel()
    return {
        "path": str(checkpoint.path),
        "kind": model.kind,
        "origin": checkpoint.origin,
        "parameters": checkpoint.parameters(),
        "stored_dtypes": dtypes,
        "declared_dtype": model.declared_dtype,
        "model": asdict(model),
        "horizon": model.horizon,
        "num_denoise_steps": checkpoint.num_denoise_steps,
        **_robot_facts(checkpoint, who),
        "normalization": {
            "flavour": robot.source,
            "state": robot.state_mode,
            "action": robot.action_mode,
            "eps": robot.eps,
            "assets": {asset: [_size(state), _size(action)] for asset, (state, action) in robot.stats.items()},
        },
        "rename": dict(robot.rename),
        "prompt": robot.prompt,
        "max_prompt_tokens": robot.max_prompt_tokens,
        "tokenizer": str(robot.tokenizer_dir) if robot.tokenizer_dir else None,
        "rtc": asdict(checkpoint.rtc) if checkpoint.rtc else None,
        "dead": list(checkpoint.dead),
        "missing": missing(checkpoint, who),
        "guesses": dict(checkpoint.guesses),
        "notes": list(checkpoint.notes),
    }


def _robot_facts(checkpoint: Checkpoint, who: Robot) -> dict[str, Any]:
    robot, found = checkpoint.robot, who.found
    return {
        "embodiment": found.name if found else None,
        "embodiment_basis": who.basis,
        "cameras": [camera.key for camera in found.cameras] if found else list(robot.cameras) or None,
        "optional_cameras": [camera.key for camera in found.cameras if not camera.required] if found else None,
        "state_parts": [asdict(part) for part in found.state] if found else None,
        "state_dim": sum(part.size for part in found.state) if found else robot.state_dim,
        "action_dim": found.action_dim if found else robot.action_dim,
        "state_use": state_use(checkpoint, found),
        "relative_actions": _relative(checkpoint, found),
    }


def missing(checkpoint: Checkpoint, who: Robot) -> list[str]:
    """What must come from elsewhere before this checkpoint can drive a robot, each with the way to give it."""
    out = _gaps(checkpoint)
    if who.found is None and not out:
        out.append(f"embodiment: {who.basis}")
    if checkpoint.robot.tokenizer_dir is None:
        out.append("tokenizer: none in the folder; pass --tokenizer paligemma_tokenizer.model, or send token ids")
    return out


def _gaps(checkpoint: Checkpoint) -> list[str]:
    """What the folder itself should hold about its robot, and does not."""
    robot = checkpoint.robot
    out = []
    if not robot.stats:
        out.append("normalisation statistics: " + _STATS_HINT[robot.source])
    for asset, (state, action) in robot.stats.items():
        where = f" of asset {asset!r}" if asset else ""
        for name, stats, mode in (("state", state, robot.state_mode), ("action", action, robot.action_mode)):
            if lacking := [key for key in NEEDS[mode] if getattr(stats, key) is None]:
                out.append(f"{name} statistics{where}: {', '.join(lacking)}, which {mode} needs")
    if robot.source == "lerobot" and (not robot.cameras or robot.action_dim is None):
        out.append("cameras or action size: config.json has no input_features / output_features")
    return out


def state_use(checkpoint: Checkpoint, found: Embodiment | None) -> str:
    """How the robot's state reaches the network."""
    if checkpoint.model.kind == "pi0":
        return "one continuous token"
    if checkpoint.robot.source == "openpi" and found is None:
        return f"digits in the prompt or unused, {DEPENDS}"
    if found is not None and not found.state_in_prompt:
        return "not read by the network"
    padded = checkpoint.robot.pad_state_to
    return "digits in the prompt" + (f", padded to {padded}" if padded else "")


_STATS_HINT = {
    "openpi": "no assets/<asset id>/norm_stats.json; copy the assets folder of the training run",
    "lerobot": "no policy_preprocessor.json with its safetensors file; copy the whole folder",
}


def _relative(checkpoint: Checkpoint, found: Embodiment | None) -> list[bool] | None:
    """Per action dim, true = a difference to the current state; [] = all absolute, None = not known."""
    if found is not None:
        return list(found.delta_mask)
    return list(checkpoint.robot.relative_mask) if checkpoint.robot.source == "lerobot" else None


def _size(stats: NormStats) -> int:
    return next((value.shape[0] for value in vars(stats).values() if value is not None), 0)


def _print(checkpoint: Checkpoint, who: Robot, facts: dict[str, Any]) -> None:
    model, robot = checkpoint.model, checkpoint.robot
    vision, prefix, expert = model.vision, model.prefix, model.expert
    stored = ", ".join(f"{count / 1e6:,.1f} M {name}" for name, count in facts["stored_dtypes"].items())
    assets = ", ".join(
        f"{name or 'state'} {n[0]} -> action {n[1]}" for name, n in facts["normalization"]["assets"].items()
    )
    rows = {
        "policy": f"{KIND[model.kind]}, written by {checkpoint.origin}",
        "parameters": f"{checkpoint.parameters() / 1e6:,.1f} M used; stored: {stored}; serves in {model.declared_dtype}",
        "vision": f"{vision.layers} layers x {vision.width}, mlp {vision.mlp_width}, {vision.num_heads} heads, "
        f"{vision.image_size} px in {vision.tokens} tokens",
        "prefix": f"{prefix.layers} layers x {prefix.width}, mlp {prefix.mlp_width}, {prefix.num_heads} heads x "
        f"{prefix.head_dim}, vocabulary {model.vocab_size:,}",
        "expert": f"{expert.layers} layers x {expert.width}, mlp {expert.mlp_width}",
        **_robot_rows(who, facts),
        "normalisation": f"state {robot.state_mode}, action {robot.action_mode}, {robot.source} arithmetic; "
        f"{assets or 'no statistics'}",
        "prompt": f"{robot.prompt}, up to {robot.max_prompt_tokens} tokens; "
        f"tokenizer {facts['tokenizer'] or 'not included'}",
        "real-time chunking": _rtc(checkpoint),
        "dead tensors": f"{len(checkpoint.dead)}",
    }
    table = Table(title=escape(str(checkpoint.path)), show_header=False, title_justify="left")
    for name, text in rows.items():
        table.add_row(name, escape(text))
    for title, items in (("[red]missing[/red]", facts["missing"]), ("note", facts["notes"])):
        for text in items:
            table.add_row(title, escape(text))
    console.print(table)


def _robot_rows(who: Robot, facts: dict[str, Any]) -> dict[str, str]:
    """The lines that are about the robot; what is not known is said to depend on the embodiment, never denied."""
    optional, relative = facts["optional_cameras"] or [], facts["relative_actions"]
    cameras = [f"{key} (optional)" if key in optional else key for key in facts["cameras"] or [DEPENDS]]
    parts = [f"{part['key']} [{part['size']}] {part['units']}".rstrip() for part in facts["state_parts"] or []]
    state = f"{facts['state_dim']} values" if facts["state_dim"] else DEPENDS
    dims = facts["action_dim"] or f"? ({DEPENDS})"
    horizon = f"{facts['horizon']}" + (" (guessed)" if "horizon" in facts["guesses"] else "")
    if relative:
        told = ", ".join(str(dim) for dim, is_relative in enumerate(relative) if is_relative)
        delta = f"{sum(relative)} of {facts['action_dim']} dims: {told}"
    else:
        delta = DEPENDS if relative is None else "no"
    return {
        "robot": who.basis if who.found else f"not known: {who.basis}",
        "actions": f"{horizon} x {dims}, padded to {facts['model']['action_width']}",
        "cameras": ", ".join(cameras),
        "state": f"{state}, {facts['state_use']}" + "".join(f"\n{part}" for part in parts),
        "relative actions": delta,
    }


def _rtc(checkpoint: Checkpoint) -> str:
    rtc = checkpoint.rtc
    if rtc is None or not rtc.enabled:
        trained = rtc.training_max_delay if rtc else 0
        return f"off; trained for delays up to {trained}" if trained else "off"
    return f"{rtc.mode}, horizon {rtc.execution_horizon}, trained for delays up to {rtc.training_max_delay}"
