"""Random weights that make every part of the network matter, the same in every file format.

The values of a tensor depend on (seed, canonical name) alone. Standard deviations keep activations near one through the
depth: 0.6 / sqrt(fan in) for matrices, 0.1 for vectors and tables, LayerNorm gains 1 + 0.1 n. The training initialisation
would not do: it zeroes the adaptive norms, which turns pi0.5's expert into a no-op that passes any test.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

BLOCK_VALUES = 1 << 22
OUTLIER_GAIN = 20.0
"""Outlier channels get this many times the usual residual update: a few channels dominate, as in trained models."""

_TABLES = ("embedding.weight", "vision.position.weight")
_INTO_RESIDUAL = ("attn.o.weight", "mlp.down.weight", "mlp.fc2.weight")


def random_blocks(name: str, shape: tuple[int, ...], *, seed: int, outliers: int) -> Iterator[Tensor]:
    """The tensor `name` in blocks of whole leading rows, float32, in order; a block holds about 4 million values."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    row = math.prod(shape[1:])
    rows = max(1, BLOCK_VALUES // row)
    center, scale = distribution(name, shape)
    loud = outlier_channels(name, shape[0], seed=seed, outliers=outliers)
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        block = generator.standard_normal((count, *shape[1:]), dtype=np.float32) * np.float32(scale) + np.float32(
            center
        )
        inside = loud[(loud >= start) & (loud < start + count)] - start
        block[inside] *= np.float32(OUTLIER_GAIN)
        yield torch.from_numpy(block)


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int, outliers: int) -> Tensor:
    """The whole tensor at once, float32."""
    return torch.cat(list(random_blocks(name, shape, seed=seed, outliers=outliers)))


def outlier_channels(name: str, width: int, *, seed: int, outliers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows of a matrix that are loud: the same channels in all layers of a stack, only where the residual is written."""
    if not outliers or not name.endswith(_INTO_RESIDUAL):
        return np.zeros(0, dtype=np.int64)
    stack = name.split(".", 1)[0]
    generator = np.random.default_rng([seed, zlib.crc32(f"outliers of {stack}".encode())])
    return np.sort(generator.choice(width, size=min(outliers, width), replace=False))


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation."""
    if name.startswith("vision.") and "norm" in name and name.endswith("weight"):
        return 1.0, 0.1
    if len(shape) == 1 or name in _TABLES:
        return 0.0, 0.1
    return 0.0, 0.6 / math.sqrt(math.prod(shape[1:]))
