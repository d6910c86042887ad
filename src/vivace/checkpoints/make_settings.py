"""The small files of a generated checkpoint: configs, processors, statistics, as LeRobot 0.6 and openpi write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from .folder import OWN_SETTINGS
from .safetensors_io import write_safetensors

Robot = Literal["libero", "droid", "aloha"]
ASSETS: dict[Robot, tuple[str, int, int]] = {  # asset id, state dim, action dim
    "libero": ("physical-intelligence/libero", 8, 7),
    "droid": ("droid", 8, 8),
    "aloha": ("trossen", 14, 14),
}
PROMPT_TOKENS = {"pi0": 48, "pi05": 200}
Dtype = Literal["float32", "bfloat16"]


def openpi_config(model: ModelConfig, dtype: Dtype) -> dict[str, Any]:
    """openpi's config.json; `vision_num_attention_heads` is our addition, which openpi ignores."""
    return {
        "action_dim": model.action_width,
        "action_horizon": model.horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": dtype,
        "vision_num_attention_heads": model.vision.num_heads,
    }


def write_norm_stats(folder: Path, robot: Robot, *, seed: int) -> None:
    """`assets/<asset id>/norm_stats.json` with mean, std and both quantiles."""
    asset, state_dim, action_dim = ASSETS[robot]
    vectors = {"state": _statistics(state_dim, seed), "actions": _statistics(action_dim, seed + 1)}
    table = {
        name: {key: vector[key].astype(float).tolist() for key in ("mean", "std", "q01", "q99")}
        for name, vector in vectors.items()
    }
    place = folder / "assets" / asset
    place.mkdir(parents=True)
    write_json(place / "norm_stats.json", {"norm_stats": table})


def write_lerobot_settings(
    folder: Path,
    model: ModelConfig,
    *,
    dtype: Dtype,
    cameras: tuple[str, ...],
    state_dim: int,
    action_dim: int,
    seed: int,
    tokenizer: bool,
) -> None:
    """config.json, both processor files and their statistics, and vivace.json for what LeRobot has no field for."""
    size = [model.vision.image_size] * 2
    visual = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, *size]} for name in cameras}
    inputs = {**visual, "observation.state": {"type": "STATE", "shape": [state_dim]}}
    outputs = {"action": {"type": "ACTION", "shape": [action_dim]}}
    mode = "QUANTILES" if model.kind == "pi05" else "MEAN_STD"
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    features = {"input_features": inputs, "output_features": outputs, "normalization_mapping": modes}
    write_json(folder / "config.json", {**_lerobot_config(model, dtype), **features})
    write_json(folder / OWN_SETTINGS, {"vision_num_attention_heads": model.vision.num_heads})
    _write_processors(folder, model.kind, features=features, tokenizer=tokenizer)
    _write_state_files(folder, model.kind, state_dim=state_dim, action_dim=action_dim, seed=seed)


def _lerobot_config(model: ModelConfig, dtype: Dtype) -> dict[str, Any]:
    """What is the same for every robot. Only fields of LeRobot's own: it refuses a config.json with any other."""
    return {
        "type": model.kind,
        "n_obs_steps": 1,
        "device": "cpu",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": dtype,
        "chunk_size": model.horizon,
        "n_action_steps": model.horizon,
        "max_state_dim": model.action_width,
        "max_action_dim": model.action_width,
        "num_inference_steps": 10,
        "min_period": model.min_period,
        "max_period": model.max_period,
        "use_relative_actions": False,
        "rtc_config": None,
        "image_resolution": [model.vision.image_size] * 2,
        "empty_cameras": 0,
        "tokenizer_max_length": PROMPT_TOKENS[model.kind],
    }


def write_json(file: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _normalizer_step(kind: str) -> int:
    return 3 if kind == "pi05" else 6


def _write_processors(folder: Path, kind: str, *, features: dict[str, Any], tokenizer: bool) -> None:
    """The steps in the order of LeRobot 0.6, which differs between pi0 and pi0.5."""
    k, modes, outputs = _normalizer_step(kind), features["normalization_mapping"], features["output_features"]
    normalizer = {
        "registry_name": "normalizer_processor",
        "config": {"eps": 1e-8, "features": {**features["input_features"], **outputs}, "norm_map": modes},
        "state_file": f"policy_preprocessor_step_{k}_normalizer_processor.safetensors",
    }
    relative = _step("relative_actions_processor", enabled=False, exclude_joints=["gripper"], action_names=None)
    tokens = _step(
        "tokenizer_processor",
        max_length=PROMPT_TOKENS[kind],
        task_key="task",
        padding_side="right",
        padding="max_length",
        truncation=True,
        tokenizer_name="tokenizer" if tokenizer else "google/paligemma-3b-pt-224",
    )
    device = _step("device_processor", device="cpu", float_dtype=None)
    first = [_step("rename_observations_processor", rename_map={}), _step("to_batch_processor")]
    if kind == "pi05":
        rest = [relative, normalizer, _step("pi05_prepare_state_tokenizer_processor_step"), tokens, device]
    else:
        rest = [_step("pi0_new_line_processor"), tokens, device, relative, normalizer]
    unnormalizer = {
        "registry_name": "unnormalizer_processor",
        "config": {"eps": 1e-8, "features": outputs, "norm_map": modes},
        "state_file": "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    }
    post = [unnormalizer, _step("absolute_actions_processor", enabled=False), device]
    write_json(folder / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": [*first, *rest]})
    write_json(folder / "policy_postprocessor.json", {"name": "policy_postprocessor", "steps": post})


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _write_state_files(folder: Path, kind: str, *, state_dim: int, action_dim: int, seed: int) -> None:
    vectors = {"observation.state": _statistics(state_dim, seed), "action": _statistics(action_dim, seed + 1)}
    tensors = {
        f"{name}.{key}": torch.from_numpy(value.astype(np.float32))
        for name, table in vectors.items()
        for key, value in table.items()
    }
    for name in (
        f"policy_preprocessor_step_{_normalizer_step(kind)}_normalizer_processor.safetensors",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    ):
        entries = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in sorted(tensors.items())]
        write_safetensors(folder / name, entries, blocks=_in_order(tensors))


def _in_order(tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    return (tensors[key] for key in sorted(tensors))


def _statistics(size: int, seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """What a dataset of normally distributed joints would have."""
    generator = np.random.default_rng([seed, size])
    mean, std = generator.uniform(-0.5, 0.5, size), generator.uniform(0.2, 1.0, size)
    table = {"mean": mean, "std": std, "min": mean - 3.5 * std, "max": mean + 3.5 * std}
    for key, sigma in (("q01", -2.326), ("q10", -1.282), ("q90", 1.282), ("q99", 2.326)):
        table[key] = mean + sigma * std
    return table
