"""The one door: look at a folder, see whose software wrote it, open it with the matching reader.

Opening reads headers and small settings files only. A checkpoint is either complete and understood or a CheckpointError
says what is wrong with which tensors; nothing is ever half open.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from . import bundled
from .folder import INDEX, WEIGHTS, has_weights, read_json
from .lerobot import open_lerobot
from .openpi_torch import open_openpi_torch
from .settings import Asked, LeRobotVersion
from .source import Checkpoint

MANIFEST = "manifest.ocdbt"


def open_checkpoint(
    path: str | Path,
    *,
    horizon: int | None = None,
    vision_heads: int | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    lerobot_version: LeRobotVersion = "auto",
) -> Checkpoint:
    """Open a pi0 or pi0.5 checkpoint of openpi (PyTorch or JAX), LeRobot 0.4 to 0.6, or transformers.

    Args:
        path: the checkpoint folder; its `model.safetensors` or `params/`; a training folder of numbered steps; or the
            name of a policy that comes with vivace.
        horizon: actions per chunk; None = what the folder says, else 50 with a note.
        vision_heads: heads of the vision tower; needed only where its width is no multiple of 72.
        num_heads, head_dim: heads of both Gemma stacks; needed only if there is more than one key/value head.
        lerobot_version: which LeRobot wrote the folder; "auto" guesses and leaves a note.

    Raises CheckpointError naming the file and the tensors; Unsupported for a policy that vivace cannot run.
    """
    asked = Asked(horizon, vision_heads, num_heads, head_dim, lerobot_version)
    folder, notes = find_folder(Path(path))
    checkpoint = _open(folder, asked)
    if not notes:
        return checkpoint
    return replace(checkpoint, notes=(*notes, *checkpoint.notes))


def find_folder(path: Path) -> tuple[Path, list[str]]:
    """The folder to open for what a person named, and a note where a choice was made. Raises CheckpointError."""
    path = bundled.find(path)
    if path.is_file() and path.name in (WEIGHTS, INDEX):
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(
            f"there is no checkpoint folder {path}",
            wanted=f"a local folder with model.safetensors or params/, or one of {bundled.names()}",
            do="download it first; vivace never fetches anything",
        )
    if (path / MANIFEST).is_file() and path.name == "params":
        path = path.parent
    if _is_checkpoint(path):
        return path, []
    if _is_checkpoint(path / "pretrained_model"):
        return path / "pretrained_model", []
    steps = [child for child in path.iterdir() if child.name.isdigit() and child.is_dir()]
    for step in sorted(steps, key=lambda child: int(child.name), reverse=True):
        for candidate in (step, step / "pretrained_model"):
            if _is_checkpoint(candidate):
                return candidate, [f"step {step.name} was taken, the last of {len(steps)} in {path}"]
    raise CheckpointError(
        f"{path} is not a checkpoint",
        got=f"{sorted(child.name for child in path.iterdir())[:20]}",
        wanted="model.safetensors, or params/ with manifest.ocdbt",
    )


def _is_checkpoint(folder: Path) -> bool:
    adapter = (folder / "adapter_config.json").is_file()
    return has_weights(folder) or adapter or (folder / MANIFEST).is_file() or (folder / "params").is_dir()


def _open(folder: Path, asked: Asked) -> Checkpoint:
    config = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not has_weights(folder):
        raise CheckpointError(
            f"{folder} holds a PEFT adapter, not a policy",
            got="adapter_config.json",
            wanted="a merged checkpoint",
            do="load the policy with its adapter in LeRobot, merge_and_unload() it, save_pretrained() the result",
        )
    if has_weights(folder):
        lerobot = config.is_file() and "type" in read_json(config)
        return open_lerobot(folder, asked) if lerobot else open_openpi_torch(folder, asked)
    from .openpi_jax import open_openpi_jax  # tensorstore only when it is needed

    return open_openpi_jax(folder, asked)
