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


def fingerprint(prepared: PreparedObservation) -> int:
    """32-bit checksum of everything of the request that reaches the model."""
    digest = 0
    for array in (prepared.images, prepared.tokens, prepared.state):
        digest = zlib.crc32(np.ascontiguousarray(array).data, digest)
    return digest


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
