"""openpi's PyTorch folders: `model.safetensors`, an optional `config.json`, `assets/<asset id>/norm_stats.json`.

transformers' own PI0 checkpoints come here too: same network, other key names, the time embedding in float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import names
from .dialects import translate
from .folder import read_json, read_weights, whole
from .norm_stats import openpi_facts
from .settings import Asked, choose_horizon, declared_dtype, positive
from .source import Checkpoint


def open_openpi_torch(folder: Path, asked: Asked) -> Checkpoint:
    """Open a folder that openpi's converter or training script wrote (or transformers, see above)."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    header = read_weights(folder)
    found = translate(header, where=str(folder))
    transformers = any("embed_action_time." in key for key in header.tensors)
    hints = names.Hints(
        vision_heads=asked.vision_heads or _vision_heads(config, file),
        num_heads=asked.num_heads,
        head_dim=asked.head_dim,
    )
    model = names.infer_model(found.tensors, hints=hints, where=str(folder))
    told = whole(config, "chunk_size" if transformers else "action_horizon", where=file)
    horizon, notes, guesses = choose_horizon(asked.horizon, told, file.name)
    _check_width(config, model.action_width, file)
    model = replace(
        model,
        horizon=horizon,
        time_grid="accumulated",
        time_embedding="float32" if transformers else "float64",
        declared_dtype=declared_dtype(
            config, ("precision", "dtype"), "float32" if transformers else "bfloat16", where=file
        ),
        flavour="openpi_torch",
        min_period=positive(config, "min_period", model.min_period, where=file),
        max_period=positive(config, "max_period", model.max_period, where=file),
    )
    robot = openpi_facts(folder, model.kind)
    return Checkpoint(
        path=folder,
        origin="transformers" if transformers else "openpi_torch",
        model=model,
        robot=robot,
        tensors=names.in_order(found.tensors, model),
        dead=found.dead,
        notes=(*found.notes, *notes, *robot.notes),
        guesses=guesses,
    )


def _vision_heads(config: dict[str, Any], file: Path) -> int | None:
    """Our own field, or transformers' nested one."""
    if told := whole(config, "vision_num_attention_heads", where=file):
        return told
    vlm = config.get("vlm_config")
    vision = vlm.get("vision_config") if isinstance(vlm, dict) else None
    return whole(vision, "num_attention_heads", where=file) if isinstance(vision, dict) else None


def _check_width(config: dict[str, Any], width: int, file: Path) -> None:
    told = whole(config, "action_dim", where=file)
    if told is not None and told != width:
        raise CheckpointError(
            f"{file} contradicts the weights", got=f"action_dim {told}, but action_in_proj takes {width}"
        )
