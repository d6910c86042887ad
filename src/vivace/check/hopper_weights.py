"""Full-size random weights without a file: every tensor is drawn on the device that it is for, in seconds.

The distribution is that of `make-checkpoint` (checkpoints.random_values): 0.6 / sqrt(fan in) for matrices, 0.1 for vectors
and tables, LayerNorm gains 1 + 0.1 n; and outlier channels: the same `outliers` rows of every matrix that writes the
residual stream are 20 times louder, in each stack others. Values are a function of (seed, canonical name) and of the
device's own generator: a CPU draws other numbers than a GPU. They are rounded to bfloat16, as released checkpoints are
stored, so float32 and bfloat16 engines start from the same weights.
"""

from __future__ import annotations

import copy
import zlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.names import expected_shapes
from ..checkpoints.random_values import OUTLIER_GAIN, distribution, outlier_channels
from ..checkpoints.source import Checkpoint, TensorRef
from ..config import ModelConfig
from ..model import weights
from ..model.pi import Pi
from ..precision.flavours import Dtype, parameter_dtype
from .hopper_robot import facts

STORED = torch.bfloat16
DESCRIPTION = (
    "random: N(0, 0.6/sqrt(fan in)) matrices, N(0, 0.1) vectors and tables, LayerNorm gains 1 + 0.1 n, "
    f"rounded to bfloat16; a few channels per stack x{OUTLIER_GAIN:g} in every matrix that writes the residual"
)


def device_tensor(
    name: str, shape: tuple[int, ...], *, seed: int, outliers: int, device: torch.device, dtype: torch.dtype = STORED
) -> Tensor:
    """One tensor, drawn on `device`; the same name and seed give the same values there."""
    generator = torch.Generator(device=device).manual_seed((seed << 32) + zlib.crc32(name.encode()))
    center, scale = distribution(name, shape)
    value = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).add_(center)
    loud = outlier_channels(name, shape[0], seed=seed, outliers=outliers)
    if len(loud):
        value[torch.from_numpy(loud).to(device)] *= OUTLIER_GAIN
    return value.to(dtype)


def random_checkpoint(config: ModelConfig, *, seed: int, outliers: int) -> Checkpoint:
    """A checkpoint of openpi's family whose tensors are drawn when they are read."""
    tensors = {
        name: TensorRef(name, shape, STORED, partial(_read, name, shape, seed, outliers))
        for name, shape in expected_shapes(config).items()
    }
    return Checkpoint(Path("random weights"), "openpi_torch", config, facts(), tensors, (), ())


def load(checkpoint: Checkpoint, *, device: torch.device, precision: Dtype) -> Pi:
    """The network on `device`, in the checkpoint's own flavour of `precision`."""
    flavour = checkpoint.model.flavour
    return weights.load(
        checkpoint.model, checkpoint.tensors, device=device,
        dtype_of=lambda name: parameter_dtype(name, precision=precision, flavour=flavour),
    )  # fmt: skip


def twin(model: Pi) -> Pi:
    """A second network over the same tensors: its layers and operations can be replaced without touching the first."""
    shared: dict[int, object] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    shared[id(model.ops)] = model.ops
    return copy.deepcopy(model, shared)


def weight_bytes(model: Pi) -> int:
    """Bytes of every parameter and buffer, scales of E4M3 layers included."""
    return sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))


def _read(name: str, shape: tuple[int, ...], seed: int, outliers: int, device: torch.device) -> Tensor:
    return device_tensor(name, shape, seed=seed, outliers=outliers, device=device)
