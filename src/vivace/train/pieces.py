"""Labelled episodes between simulator and training. Without torch: simulators are many processes that start often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..sim.record import Demo


@dataclass(frozen=True)
class Piece:
    """One episode: T ticks of labels, R of them with images.

    ticks     int64 [R]                  views  uint8 [R, V, px, px, 3]
    state     float32 [R, n]             prompts  R strings
    executed  float32 [T, A]             chunk  float32 [T, H, A]
    other_prompts, other_chunk  R strings, float32 [R, H, A]: the same looks, another instruction; () and None: unknown
    """

    ticks: NDArray[np.int64]
    views: NDArray[np.uint8]
    state: NDArray[np.float32]
    prompts: tuple[str, ...]
    executed: NDArray[np.float32]
    chunk: NDArray[np.float32]
    other_prompts: tuple[str, ...] = ()
    other_chunk: NDArray[np.float32] | None = None


def piece_of(demo: Demo) -> Piece:
    """A demonstration of `sim.record`."""
    prompts = tuple(demo.prompts[tick] for tick in demo.ticks)
    return Piece(
        demo.ticks,
        demo.views,
        demo.state[demo.ticks],
        prompts,
        demo.executed,
        demo.chunk,
        demo.other_prompts,
        demo.other_chunk,
    )
