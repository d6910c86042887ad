"""`vivace inspect PATH`: what a checkpoint is, and what is still needed to run it."""

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
from ..types import NormStats
from .output import FAILED, OK, console, emit

KIND = {"pi0": "pi0", "pi05": "pi0.5"}
NEEDS = {  # fields of NormStats that a mode reads
    "identity": (),
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
}


@dataclass(frozen=True)
class Args:
    """Say what a checkpoint is. Exit code 0: ready to run; 1: something is missing; 2: not a (whole) checkpoint."""

    path: tyro.conf.Positional[Path]
    """Folder of openpi (PyTorch or JAX), LeRobot or transformers."""
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
    facts = describe(checkpoint)
    facts["values_checked"] = args.check_values
    _print(checkpoint, facts)
    emit(facts)
    return FAILED if facts["missing"] else OK


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that inspect knows, as JSON types."""
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
        "cameras": list(robot.cameras),
        "state_dim": robot.state_dim,
        "action_dim": robot.action_dim,
        "state_use": state_use(checkpoint),
        "normalization": {
            "flavour": robot.source,
            "state": robot.state_mode,
            "action": robot.action_mode,
            "eps": robot.eps,
            "assets": {asset: [_size(state), _size(action)] for asset, (state, action) in robot.stats.items()},
        },
        "relative_actions": list(robot.relative_mask),
        "rename": dict(robot.rename),
        "prompt": robot.prompt,
        "max_prompt_tokens": robot.max_prompt_tokens,
        "tokenizer": str(robot.tokenizer_dir) if robot.tokenizer_dir else None,
        "rtc": asdict(checkpoint.rtc) if checkpoint.rtc else None,
        "dead": list(checkpoint.dead),
        "missing": missing(checkpoint),
        "guesses": dict(checkpoint.guesses),
        "notes": list(checkpoint.notes),
    }


def missing(checkpoint: Checkpoint) -> list[str]:
    """What must come from elsewhere before this checkpoint can drive a robot, each with the way to give it."""
    robot = checkpoint.robot
    out = []
    if not robot.stats:
        out.append("normalisation statistics: " + _STATS_HINT[robot.source])
    for asset, (state, action) in robot.stats.items():
        where = f" of asset {asset!r}" if asset else ""
        for name, stats, mode in (("state", state, robot.state_mode), ("action", action, robot.action_mode)):
            if lacking := [key for key in NEEDS[mode] if getattr(stats, key) is None]:
                out.append(f"{name} statistics{where}: {', '.join(lacking)}, which {mode} needs")
    if robot.tokenizer_dir is None:
        out.append("tokenizer: none in the folder; pass --tokenizer paligemma_tokenizer.model, or send token ids")
    if robot.source == "lerobot" and (not robot.cameras or robot.action_dim is None):
        out.append("cameras or action size: config.json has no input_features / output_features")
    return out


def state_use(checkpoint: Checkpoint) -> str:
    """How the robot's state reaches the network."""
    if checkpoint.model.kind == "pi0":
        return "one continuous token"
    if checkpoint.robot.source == "openpi":
        return "digits in the prompt, unless the embodiment leaves it out (libero does)"
    padded = checkpoint.robot.pad_state_to
    return "digits in the prompt" + (f", padded to {padded}" if padded else "")


_STATS_HINT = {
    "openpi": "no assets/<asset id>/norm_stats.json; copy the assets folder of the training run",
    "lerobot": "no policy_preprocessor.json with its safetensors file; copy the whole folder",
}


def _size(stats: NormStats) -> int:
    return next((value.shape[0] for value in vars(stats).values() if value is not None), 0)


def _print(checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
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
        "actions": f"{model.horizon} x {robot.action_dim or '?'} (padded to {model.action_width})"
        + (", guessed horizon" if "horizon" in checkpoint.guesses else ""),
        "cameras": ", ".join(robot.cameras) or "the embodiment says",
        "state": f"{robot.state_dim or '?'} values, {facts['state_use']}",
        "normalisation": f"state {robot.state_mode}, action {robot.action_mode}, {robot.source} arithmetic; "
        f"{assets or 'no statistics'}",
        "prompt": f"{robot.prompt}, up to {robot.max_prompt_tokens} tokens; "
        f"tokenizer {facts['tokenizer'] or 'not included'}",
        "relative actions": str(sum(robot.relative_mask)) + " dims" if robot.relative_mask else "no",
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


def _rtc(checkpoint: Checkpoint) -> str:
    rtc = checkpoint.rtc
    if rtc is None or not rtc.enabled:
        trained = rtc.training_max_delay if rtc else 0
        return f"off; trained for delays up to {trained}" if trained else "off"
    return f"{rtc.mode}, horizon {rtc.execution_horizon}, trained for delays up to {rtc.training_max_delay}"
