"""Where the noise of a chunk comes from.

Under a seed it is a function of the seed and of the request, and of nothing else: not of what was asked before, by whom, or
on which device. So the same request gets the same answer from every client, backend and batch, and a served answer can be
compared with one computed alone. Without a seed every request draws fresh noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from ..types import PreparedObservation
from .collate import as_stored

LANES = 64
"""Pixels are summed as so many 64-bit numbers side by side: a checksum of them all costs more than the rest of a draw."""


def fingerprint(prepared: PreparedObservation) -> int:
    """32-bit checksum of everything of the request that reaches the model."""
    digest = 0
    for array in (prepared.images, prepared.tokens, prepared.state):
        digest = zlib.crc32(_folded(np.ascontiguousarray(as_stored(array)[0])), digest)
    return digest


def _folded(array: NDArray[np.generic]) -> bytes:
    """The bytes of an array; of a large one sums of its words modulo 2^64, LANES words apart, and what is left over.

    Any one byte that changes, changes the sums.
    """
    data = array.reshape(-1).view(np.uint8)
    whole = data.size // (8 * LANES) * (8 * LANES)
    words = data[:whole].view(np.uint64).reshape(-1, LANES)
    return (np.add.reduce(words, axis=0).tobytes() if whole else b"") + data[whole:].tobytes()


def draw(seed: int | None, prepared: PreparedObservation, *, horizon: int, width: int) -> NDArray[np.float32]:
    """Standard normal noise [horizon, width] for one request. Counter-based (Philox), so it costs no state."""
    if seed is None:
        generator = np.random.default_rng()
    else:
        key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, fingerprint(prepared)], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
    return generator.standard_normal((horizon, width), dtype=np.float32)


def checked(noise: NDArray[np.float32], *, shape: Sequence[int]) -> NDArray[np.float32]:
    """The caller's noise as float32, or ShapeError if it has another shape or is not finite."""
    try:
        array = np.asarray(noise, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ShapeError("noise is not an array of numbers", got=str(error), wanted=f"float32 {list(shape)}") from error
    if array.shape != tuple(shape):
        raise ShapeError("noise has another shape than the chunk", got=list(array.shape), wanted=list(shape))
    if not np.isfinite(array).all():
        raise ShapeError("noise is not finite", do="pass standard normal values")
    return array
