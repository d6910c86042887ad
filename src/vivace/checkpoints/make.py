"""Writes a random checkpoint of any size in the format of openpi (PyTorch or JAX) or LeRobot, block by block.

For self-tests without a download: the folder is complete (weights, configs, statistics, a toy tokenizer) and its weights
are a function of (size, kind, seed, outliers), whichever format they are written in. Memory stays at a few blocks of 16 MB
for safetensors and a few layers for JAX folders.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import ConfigError
from ..types import PolicyKind
from .make_settings import Dtype, Robot, openpi_config, write_json, write_lerobot_settings, write_norm_stats
from .names import expected_shapes
from .random_values import random_blocks
from .sizes import Size, network
from .toy_tokenizer import train_toy_tokenizer
from .written import write_weights

Format = Literal["lerobot", "openpi", "jax"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """What to write; the text under each field is also the help of `vivace make-checkpoint`."""

    size: Size = "tiny"
    """tiny: unit tests; small: CPU demos; base: 0.3 B; full: the real pi0 / pi0.5 dimensions (bfloat16: 8.3 GB)."""
    kind: PolicyKind = "pi05"
    """Which policy."""
    format: Format = "lerobot"
    """Whose folder layout; jax needs vivace[jax-checkpoints]."""
    seed: int = 0
    """The same seed gives the same weights in every format."""
    dtype: Dtype = "float32"
    """Storage and declared compute dtype."""
    outliers: int = 0
    """Channels per stack that are 20 times louder than the rest, as trained networks have; hard for low precision."""
    horizon: int = 50
    """Actions per chunk (a jax folder cannot store it)."""
    cameras: tuple[str, ...] = ("front", "wrist")
    """LeRobot: camera names."""
    state_dim: int = 8
    """LeRobot: numbers of the robot's state."""
    action_dim: int = 7
    """LeRobot: numbers of one action."""
    robot: Robot = "libero"
    """openpi and jax: whose statistics to write."""
    tokenizer: bool = True
    """Ship a toy tokenizer (its ids are not PaliGemma's)."""

    def model(self) -> ModelConfig:
        """The network that is written."""
        return network(self.size, self.kind, horizon=self.horizon)

    def parameters(self) -> int:
        """Number of parameters, without dead tensors."""
        return sum(torch.Size(shape).numel() for shape in expected_shapes(self.model()).values())


def make_checkpoint(
    out: Path, recipe: Recipe, *, overwrite: bool = False, progress: Callable[[int], None] = lambda count: None
) -> ModelConfig:
    """Write `recipe` into the folder `out` and return the network.

    Args:
        out: created; must not exist, or be empty, unless `overwrite`.
        recipe: what to write.
        overwrite: delete what is in `out` first; refused if it is no checkpoint folder.
        progress: called with the number of parameters just written.
    """
    _check(recipe)
    _prepare(out, overwrite=overwrite)
    model, shapes = recipe.model(), expected_shapes(recipe.model())

    def values(name: str) -> Iterator[Tensor]:
        return random_blocks(name, shapes[name], seed=recipe.seed, outliers=recipe.outliers)

    if recipe.format == "jax":
        from .write_jax import write_params

        write_params(out / "params", model, dtype=TORCH_DTYPES[recipe.dtype], values=values, progress=progress)
    else:
        write_weights(
            out / "model.safetensors", model, format=recipe.format, dtype=TORCH_DTYPES[recipe.dtype], values=values,
            progress=progress,
        )  # fmt: skip
    _write_settings(out, recipe)
    return model


def _write_settings(out: Path, recipe: Recipe) -> None:
    """Everything but the weights."""
    model = recipe.model()
    if recipe.format == "lerobot":
        write_lerobot_settings(
            out,
            model,
            dtype=recipe.dtype,
            cameras=recipe.cameras,
            state_dim=recipe.state_dim,
            action_dim=recipe.action_dim,
            seed=recipe.seed,
            tokenizer=recipe.tokenizer,
        )
    else:
        write_norm_stats(out, recipe.robot, seed=recipe.seed)
    if recipe.format == "openpi":
        write_json(out / "config.json", openpi_config(model, recipe.dtype))
    if recipe.tokenizer:
        (out / "tokenizer").mkdir()
        (out / "tokenizer" / "tokenizer.model").write_bytes(train_toy_tokenizer(model.vocab_size))


def _check(recipe: Recipe) -> None:
    wanted = {
        "horizon": recipe.horizon > 0,
        "seed": recipe.seed >= 0,
        "outliers": recipe.outliers >= 0,
        "state_dim": 0 < recipe.state_dim <= recipe.model().action_width,
        "action_dim": 0 < recipe.action_dim <= recipe.model().action_width,
        "cameras": len(recipe.cameras) > 0 and len(set(recipe.cameras)) == len(recipe.cameras),
    }
    for name, good in wanted.items():
        if not good:
            raise ConfigError(f"{name} cannot be used", got=repr(getattr(recipe, name)), do="see --help for its range")


def _prepare(out: Path, *, overwrite: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        ours = out.is_dir() and ((out / "model.safetensors").is_file() or (out / "params").is_dir())
        if not overwrite or not ours:
            raise ConfigError(
                f"{out} exists already",
                wanted="a new or empty folder" if ours or not overwrite else "a checkpoint folder to overwrite",
                do="choose another name, or pass overwrite (--overwrite)",
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
