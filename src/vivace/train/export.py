"""A trained network as checkpoint folders: LeRobot's, openpi's (PyTorch) and openpi's JAX layout, statistics included.

Names, packing and settings are those of `checkpoints` (the same tables that read them). Of the last prefix layer only keys
and values exist in the network; the formats want the rest of it too, so it is stored as zeros, which nothing reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import make_settings
from ..checkpoints.folder import OWN_SETTINGS, read_json
from ..checkpoints.make import TORCH_DTYPES, Format
from ..checkpoints.names import expected_shapes
from ..checkpoints.safetensors_io import write_safetensors
from ..checkpoints.written import write_weights
from ..errors import ConfigError
from ..model.pi import Pi
from ..model.weights import slots
from ..types import NormStats

ASSET = "conveyor"


@dataclass(frozen=True)
class Trained:
    """What a folder is made of. `tokenizer` is the content of a SentencePiece `.model`; cameras in the order of views."""

    model: Pi
    state: NormStats
    action: NormStats
    cameras: tuple[str, ...]
    tokenizer: bytes
    max_tokens: int
    num_denoise_steps: int = 10
    max_committed: int = 0
    dtype: make_settings.Dtype = "bfloat16"


def export(out: Path, trained: Trained, *, format: Format = "lerobot") -> None:
    """Write a new folder. Raises ConfigError if there is something in it already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already", wanted="a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    if format == "jax":
        from ..checkpoints.write_jax import write_params

        write_params(
            out / "params", trained.model.config, dtype=TORCH_DTYPES[trained.dtype],
            values=lambda name: iter([tensor(trained.model, name)]), progress=lambda count: None,
        )  # fmt: skip
    else:
        write_weights(
            out / "model.safetensors", trained.model.config, format=format, dtype=TORCH_DTYPES[trained.dtype],
            values=lambda name: iter([tensor(trained.model, name)]),
        )  # fmt: skip
    if format == "lerobot":
        _lerobot_settings(out, trained)
    else:
        _norm_stats(out, trained)
    if format == "openpi":
        make_settings.write_json(out / "config.json", make_settings.openpi_config(trained.model.config, "float32"))
    (out / "tokenizer").mkdir()
    (out / "tokenizer" / "tokenizer.model").write_bytes(trained.tokenizer)


def tensor(model: Pi, name: str) -> Tensor:
    """One tensor under its canonical name, float32 on the CPU; zeros for what the network does not have."""
    shape, slot = expected_shapes(model.config)[name], slots(model.config).get(name)
    if slot is None:
        return torch.zeros(shape)
    rows = model.get_parameter(slot.parameter)[slot.start : slot.start + slot.count]
    return rows.detach().float().cpu().reshape(shape)


def _lerobot_settings(out: Path, trained: Trained) -> None:
    state, action = _arrays(trained.state), _arrays(trained.action)
    make_settings.write_lerobot_settings(
        out, trained.model.config, dtype="float32", cameras=trained.cameras, state_dim=len(state["mean"]),
        action_dim=len(action["mean"]), seed=0, tokenizer=True,
    )  # fmt: skip
    config = read_json(out / "config.json")
    config["num_inference_steps"] = trained.num_denoise_steps
    config["tokenizer_max_length"] = trained.max_tokens
    make_settings.write_json(out / "config.json", config)
    if trained.max_committed:
        own = read_json(out / OWN_SETTINGS)
        make_settings.write_json(out / OWN_SETTINGS, {**own, "rtc_training_max_delay": trained.max_committed})
    processor = read_json(out / "policy_preprocessor.json")
    for step in processor["steps"]:
        if step["registry_name"] == "tokenizer_processor":
            step["config"]["max_length"] = trained.max_tokens
    make_settings.write_json(out / "policy_preprocessor.json", processor)
    table = {
        f"{name}.{key}": torch.from_numpy(value.astype(np.float32))
        for name, vector in (("observation.state", state), ("action", action))
        for key, value in sorted(vector.items())
    }
    for file in out.glob("policy_*processor_step_*.safetensors"):
        entries = [(key, value.dtype, tuple(value.shape)) for key, value in sorted(table.items())]
        write_safetensors(file, entries, blocks=(table[key] for key in sorted(table)))


def _norm_stats(out: Path, trained: Trained) -> None:
    folder = out / "assets" / ASSET
    folder.mkdir(parents=True)
    table = {
        name: {key: vector[key].tolist() for key in ("mean", "std", "q01", "q99")}
        for name, vector in (("state", _arrays(trained.state)), ("actions", _arrays(trained.action)))
    }
    make_settings.write_json(folder / "norm_stats.json", {"norm_stats": table})


def _arrays(stats: NormStats) -> dict[str, Any]:
    return {key: value for key, value in vars(stats).items() if value is not None}
