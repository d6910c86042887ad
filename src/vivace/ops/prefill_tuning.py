"""Which kernel and which tile a product of the prefill runs on: rows chosen by measurement, and a rule for the rest.

A row holds for one epilogue, weight shape and format, up to a number of rows M. Every row names the run that chose it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .prefill_attention import AttentionTile
from .prefill_gemm import Tile

MIDDLING = AttentionTile(64, 64, warps=4, stages=2)
PATCH_TILE = Tile(64, 128, 64, warps=4, stages=5)


@dataclass(frozen=True)
class Choice:
    """How to run one product: a Triton tile, or None = cuBLASLt and a row-wise kernel."""

    tile: Tile | None


@dataclass(frozen=True)
class Key:
    """epilogue, weight rows and columns, whether E4M3."""

    epilogue: str
    rows: int
    columns: int
    fp8: bool


@dataclass(frozen=True)
class Tuning:
    """products  {key: ((largest M, choice), ...) in ascending M}; beyond the last row the last choice holds."""

    products: Mapping[Key, tuple[tuple[int, Choice], ...]] = field(default_factory=dict)
    attention: tuple[tuple[int, AttentionTile], ...] = ((1 << 30, MIDDLING),)
    vision_tile: AttentionTile = MIDDLING
    patch_tile: Tile = PATCH_TILE
    early: tuple[str, ...] = ("vision",)

    def choose(self, epilogue: str, *, rows: int, shape: tuple[int, ...], fp8: bool) -> Choice:
        """The choice for x [rows, K] and a weight of `shape` [N, K]."""
        known = self.products.get(Key(epilogue, shape[0], shape[1], fp8))
        if known is None:
            return untuned(epilogue, shape=shape, fp8=fp8)
        return next((choice for limit, choice in known if rows <= limit), known[-1][1])

    def attention_tile(self, *, rows: int) -> AttentionTile:
        """Tile of the prefix attention for `rows` = tokens * heads."""
        return next((tile for limit, tile in self.attention if rows <= limit), self.attention[-1][1])


def untuned(epilogue: str, *, shape: tuple[int, ...], fp8: bool) -> Choice:
    """For shapes that nobody measured: cuBLAS where it needs no epilogue of ours, else a middling tile that always fits."""
    if epilogue in ("plain", "parts"):
        return Choice(None)
    return Choice(Tile(64, 32 if epilogue == "qkv_rope" else 64, 128 if fp8 else 64, warps=4, stages=3))


TUNED = Tuning()
