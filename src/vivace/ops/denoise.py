"""The operations of the denoise loop as Triton kernels, behind the same table as everything else.

Eight launches a layer: norm | qkv + rotary | attention parts | combine | o parts | sum + norm | gate_up, GeGLU | down parts
(the sum of the down parts is in the norm of the next layer). `denoise_ops(base)` is `base` with these taking every call of
at most MAX_ROWS token rows, which is the action expert; everything larger goes to `base`.

`TILES` says how each product is cut on which chip and at how many rows; every row names the measurement that chose it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import denoise_attention, denoise_gemm, denoise_norm
from .denoise_attention import AttentionTile
from .denoise_gemm import Tile
from .layers import Fp8Linear, LayerNorm, RmsNorm
from .table import AnyLinear, AnyNorm, OpTable, Table

MAX_ROWS = 128
MIN_MID_KEYS, MAX_MID_KEYS = 400, 640
Recorder = Callable[[str, str, str], None]  # layer name, operation, kernel


@dataclass(frozen=True)
class Tiles:
    """One cut per operation of the loop."""

    qkv: Tile
    o: Tile
    gate_up: Tile
    down: Tile
    attention: AttentionTile
    attention_mid: AttentionTile | None = None  # for MIN_MID_KEYS to MAX_MID_KEYS cached keys, where it differs
    norm_warps: int = 8
    norm_early: bool = True


# (rows at most, E4M3?) -> tiles, chosen on an H100 at 10 rows over 560 keys and 50 rows over 968 (docs/log.md 2026-11-24);
# early where it won inside the whole loop: successors that hold no shared memory, and at 50 rows attention behind qkv
TILES: dict[tuple[int, bool], Tiles] = {
    (16, False): Tiles(
        qkv=Tile(32, 128, stages=5),
        o=Tile(32, 64, split_k=4, stages=6, early=True),
        gate_up=Tile(32, 128, stages=5),
        down=Tile(64, 128, split_k=8, early=True),
        attention=AttentionTile(16, 32, 4, 2, 4, torch.bfloat16, early=True, combine_early=True),
    ),
    (16, True): Tiles(
        qkv=Tile(32, 512, stages=3),
        o=Tile(64, 256, split_k=8, stages=2, early=True),
        gate_up=Tile(32, 512, stages=3),
        down=Tile(32, 128, split_k=8, early=True),
        attention=AttentionTile(16, 32, 4, 1, 4, torch.bfloat16, early=True, combine_early=True),
    ),
    (MAX_ROWS, False): Tiles(
        attention_mid=AttentionTile(64, 64, 8, 4, 8, torch.bfloat16, early=True, combine_early=True),
        qkv=Tile(16, 128, stages=5, early=True),
        o=Tile(32, 256, split_k=4, stages=3, bulk=True, early=True),
        gate_up=Tile(32, 128, bulk=True),
        down=Tile(32, 256, split_k=4, bulk=True, early=True),
        attention=AttentionTile(64, 64, 4, 4, 8, torch.bfloat16, early=True, combine_early=True),
    ),
    (MAX_ROWS, True): Tiles(
        attention_mid=AttentionTile(64, 64, 8, 4, 8, torch.bfloat16, early=True, combine_early=True),
        qkv=Tile(16, 256, stages=5, early=True),
        o=Tile(32, 256, split_k=4, stages=3, bulk=True, early=True),
        gate_up=Tile(16, 256),
        down=Tile(32, 256, split_k=8, stages=3, bulk=True, early=True),
        attention=AttentionTile(64, 64, 4, 4, 8, torch.bfloat16, early=True, combine_early=True),
    ),
}


def tiles_for(rows: int, layer: AnyLinear) -> Tiles:
    """The row of `TILES` that fits."""
    quantised = isinstance(layer, Fp8Linear)
    return next(tiles for (most, fp8), tiles in TILES.items() if rows <= most and fp8 == quantised)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]


def _small(x: Tensor) -> bool:
    return _rows(x) <= MAX_ROWS


def denoise_ops(base: OpTable, tiles: Tiles | None = None, *, record: Recorder | None = None) -> OpTable:
    """`base`, with calls of at most MAX_ROWS rows taken by the kernels of this file. `tiles` replaces the tuned table.

    record  called with (layer, operation, kernel) whenever one of these kernels is launched
    """

    def note(name: str, operation: str) -> None:
        if record is not None:
            record(name, operation, "triton")

    def cut(x: Tensor, layer: AnyLinear) -> Tiles:
        return tiles if tiles is not None else tiles_for(_rows(x), layer)

    def rms_norm(x: Tensor, norm: RmsNorm, modulation: Tensor | None, into: AnyLinear) -> Tensor:
        if not _small(x):
            return base.rms_norm(x, norm, modulation, into)
        chosen = cut(x, into)
        note(norm.name, "rms_norm")
        return denoise_norm.sum_norm(
            None, _flat(x), None, norm, modulation, into, warps=chosen.norm_warps, early=chosen.norm_early
        )[1].view(x.shape)

    def linear(x: Tensor, layer: AnyLinear) -> Tensor:
        out, inside = layer.weight.shape
        if not _small(x) or isinstance(layer, Fp8Linear) or min(out, inside) > 64:
            return base.linear(x, layer)
        note(layer.name, "linear")
        return denoise_gemm.narrow(x.reshape(-1, inside), layer).view(*x.shape[:-1], out)

    def linear_residual_norm(
        x: Tensor,
        layer: AnyLinear,
        residual: Tensor,
        gate: Tensor | None,
        norm: AnyNorm,
        modulation: Tensor | None,
        into: AnyLinear,
    ) -> tuple[Tensor, Tensor]:
        if not _small(x) or isinstance(norm, LayerNorm):
            return base.linear_residual_norm(x, layer, residual, gate, norm, modulation, into)
        chosen = cut(x, layer)
        note(layer.name, "linear_residual_norm")
        parts = denoise_gemm.parts(_flat(x), layer, chosen.down if layer.name.endswith("down") else chosen.o)
        total, normed = denoise_norm.sum_norm(
            parts, _flat(residual), gate, norm, modulation, into, warps=chosen.norm_warps, early=chosen.norm_early
        )
        return total.view(residual.shape), normed.view(residual.shape)

    def geglu(x: Tensor, layer: AnyLinear, into: AnyLinear) -> Tensor:
        if not _small(x):
            return base.geglu(x, layer, into)
        note(layer.name, "geglu")
        return denoise_gemm.geglu(_flat(x), layer, into, cut(x, layer).gate_up).view(*x.shape[:-1], -1)

    def qkv_rope(
        x: Tensor, layer: AnyLinear, rope: Table, heads: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not _small(x):
            return base.qkv_rope(x, layer, rope, heads)
        note(layer.name, "qkv_rope")
        N, K, head_dim = heads
        cos, sin = (table.reshape(-1, head_dim // 2) for table in rope)
        packed = denoise_gemm.qkv(_flat(x), layer, (cos, sin), heads, cut(x, layer).qkv)
        q, k, v = packed.view(*x.shape[:-1], N + 2 * K, head_dim).split([N, K, K], dim=-2)
        return q, k, v

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: Table | None, into: AnyLinear) -> Tensor:
        if past is None or q.shape[0] * q.shape[1] > MAX_ROWS:
            return base.attention(q, k, v, mask, past, into)
        note(into.name, "attention")
        chosen = tiles if tiles is not None else tiles_for(q.shape[0] * q.shape[1], into)
        mid = chosen.attention_mid if MIN_MID_KEYS < past[0].shape[1] <= MAX_MID_KEYS else None
        return denoise_attention.attention(q, k, v, mask, past, into, mid or chosen.attention)

    return replace(
        base,
        rms_norm=rms_norm,
        linear=linear,
        linear_residual_norm=linear_residual_norm,
        geglu=geglu,
        qkv_rope=qkv_rope,
        attention=attention,
    )


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def why_not(*, head_dim: int, device: torch.device) -> str | None:
    """None if the kernels can run a stack with this head size on this device."""
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"head size {head_dim} is not a power of two of at least 16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    return None
