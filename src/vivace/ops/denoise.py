"""The operations of the denoise loop as Triton kernels, behind the same table as everything else.

Eight launches a layer: norm | qkv + rotary | attention parts | combine | o parts | sum + norm | gate_up, GeGLU | down parts
(the sum of the down parts is in the norm of the next layer). `denoise_ops(base)` is `base` with these taking every call of
at most MAX_ROWS token rows, which is the action expert; everything larger goes to `base`, and so does INT8.

`TILES` says how each product is cut on which chip and at how many rows; every row names the measurement that chose it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import Unsupported
from . import denoise_ahead, denoise_attention, denoise_boundary, denoise_gemm, denoise_norm, launch, row_scales
from .denoise_ahead import AheadTile, AheadTiles
from .denoise_attention import AttentionTile
from .denoise_gemm import Tile
from .layers import AnyLinear, E4m3Linear, Int8Linear, LayerNorm, Linear, RmsNorm, RowFp8Linear
from .table import AnyNorm, OpTable, Table

MAX_ROWS = 128
MAX_HEAD_DIM = 256  # larger heads do not fit into shared memory with the tiles that there are
MEASURED = frozenset({(2560, 1024), (1024, 2048), (8192, 1024), (1024, 4096)})  # weights that `TILES` was chosen for
MIN_MID_KEYS, MAX_MID_KEYS = 400, 640
# shared memory of the largest attention cut, as compiled for 8.0 to 12.0; the middle one takes 98,304
LONG_CACHE_BYTES = 147_456
Recorder = Callable[[str, str, str], None]  # layer name, operation, kernel


@dataclass(frozen=True)
class Tiles:
    """One cut per operation of the loop."""

    qkv: Tile
    o: Tile
    gate_up: Tile
    down: Tile
    attention: AttentionTile
    attention_short: AttentionTile | None = None  # for at most MIN_MID_KEYS cached keys, where it differs
    attention_mid: AttentionTile | None = None  # for MIN_MID_KEYS to MAX_MID_KEYS cached keys, where it differs
    norm_warps: int = 8
    norm_early: int = launch.EARLY
    boundary_warps: int = 16
    norm_carveout: int = launch.BY_DRIVER  # of norms and boundary; products and attention have their own
    ahead: AheadTiles | None = None  # products whose weights arrive before their wait, where they can run


def shared(
    tiles: Tiles, *, products: int = launch.MOST, attention: int = launch.MOST, norms: int = launch.MOST
) -> Tiles:
    """`tiles` with these wishes for the division of a processor's memory, see `launch.share`."""
    cuts = {name: replace(getattr(tiles, name), carveout=products) for name in ("qkv", "o", "gate_up", "down")}
    for name in ("attention", "attention_short", "attention_mid"):
        cut = getattr(tiles, name)
        cuts[name] = cut and replace(cut, carveout=attention)
    return replace(tiles, **cuts, norm_carveout=norms)


# (rows at most, E4M3?) -> tiles, chosen on an H100 at 10 rows over 560 keys and at 50 rows over 968 and 304 (docs/log.md
# 2026-11-24 and -25). early where it won inside the whole loop: successors that hold no shared memory, and at 50 rows
# attention behind qkv. Loops of 10 steps in ms, before -> with this table, on one card in one call each (-25):
#   10 rows 560 keys BF16 5.36 -> 5.17, E4M3 4.57 -> 4.29   all `shared` is -0.08 and -0.15 of it, the boundary -0.04
#   50 rows 968 keys BF16 6.26 -> 6.13, E4M3 5.32 -> 5.20   all `shared` costs 0.06 in BF16
#   50 rows 304 keys BF16 5.98 -> 5.70 with all `shared` (without it as here: not timed), E4M3 5.06 -> 4.77
# ("before" has the boundary of two steps in parts in BF16 and at 10 rows, as one kernel for E4M3 at 50 rows)
TILES: dict[tuple[int, bool], Tiles] = {
    (16, False): shared(
        Tiles(
            qkv=Tile(32, 128, stages=5),
            o=Tile(32, 64, split_k=4, stages=6, early=True),
            gate_up=Tile(32, 128, stages=5),
            down=Tile(64, 128, split_k=8, early=True),
            attention=AttentionTile(16, 32, 4, 2, 4, torch.bfloat16, early=launch.EARLY, combine_early=launch.EARLY),
            norm_early=launch.FIRST,
        )
    ),
    (16, True): shared(
        Tiles(
            qkv=Tile(32, 512, stages=3),
            o=Tile(32, 256, split_k=8, stages=1, early=True, ahead=True),
            gate_up=Tile(32, 128, stages=6, ahead=True),
            down=Tile(32, 128, split_k=8, early=True),
            attention=AttentionTile(16, 32, 4, 1, 4, torch.bfloat16, early=launch.EARLY, combine_early=launch.EARLY),
        )
    ),
    (MAX_ROWS, False): Tiles(
        attention_short=AttentionTile(32, 64, 8, 4, 8, torch.bfloat16, early=launch.EARLY, combine_early=launch.EARLY),
        attention_mid=AttentionTile(64, 64, 8, 4, 8, torch.bfloat16, early=launch.EARLY, combine_early=launch.EARLY),
        qkv=Tile(16, 128, stages=5, early=True),
        o=Tile(32, 256, split_k=4, stages=3, bulk=True, early=True),
        gate_up=Tile(32, 128, bulk=True),
        down=Tile(32, 256, split_k=4, bulk=True, early=True),
        attention=AttentionTile(32, 128, 8, 4, 8, torch.bfloat16, early=launch.EARLY, combine_early=launch.FIRST),
    ),
    (MAX_ROWS, True): Tiles(
        attention_short=AttentionTile(
            32, 64, 8, 4, 8, torch.bfloat16, early=launch.EARLY, combine_early=launch.EARLY, carveout=launch.MOST
        ),
        qkv=Tile(16, 256, stages=5, early=True),
        o=Tile(32, 256, split_k=4, stages=3, bulk=True, early=True),
        gate_up=Tile(16, 256),
        down=Tile(32, 256, split_k=8, stages=3, bulk=True, early=True),
        attention=AttentionTile(64, 64, 8, 4, 8, torch.bfloat16, early=launch.EARLY, combine_early=launch.EARLY),
        norm_carveout=launch.MOST,
    ),
}


def tiles_for(rows: int, layer: AnyLinear) -> Tiles:
    """The row of `TILES` that fits."""
    quantised = isinstance(layer, E4m3Linear)
    return next(tiles for (most, fp8), tiles in TILES.items() if rows <= most and fp8 == quantised)


def with_early_weights(tiles: Tiles, rows: int, layer: AnyLinear) -> Tiles:
    """`tiles` with the products of `denoise_ahead`, and neighbours that let those start before their own wait.

    Unchanged where there are no cuts for this many rows, or the GPU is no Hopper.
    """
    cuts = denoise_ahead.tiles_for(rows, layer)
    if cuts is None:
        return tiles
    first = {
        name: replace(tile, early=launch.FIRST, combine_early=launch.FIRST)
        for name in ("attention", "attention_short", "attention_mid")
        if (tile := getattr(tiles, name)) is not None
    }
    return replace(tiles, ahead=cuts, norm_early=cuts.norm_early, **first)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]


def _ours(x: Tensor, *layers: AnyLinear) -> bool:
    """Few rows, and neither the product's weights nor what is made for the next one in INT8."""
    return _rows(x) <= MAX_ROWS and not any(isinstance(layer, Int8Linear) for layer in layers)


@dataclass(frozen=True)
class Denoise:
    """The operations as methods, contracts in `ops.reference`; what is too large for them goes to `base`.

    tiles          replaces the tuned table, early weights included
    record         called with (layer, operation, kernel) whenever one of these kernels is launched: "triton", or
                   "gluon early weights" where its product is one of `denoise_ahead`; with ", untuned" behind it at a shape
                   that nobody measured. What goes to `base` is `base`'s to report
    early_weights  Hopper: products bring their weights before they wait (`denoise_ahead`), and the whole chain looks ahead
    """

    base: OpTable
    tiles: Tiles | None = None
    record: Recorder | None = None
    early_weights: bool = True

    def rms_norm(self, x: Tensor, norm: RmsNorm, modulation: Tensor | None, into: AnyLinear) -> Tensor:
        """`reference.rms_norm`."""
        if not _ours(x, into):
            return self.base.rms_norm(x, norm, modulation, into)
        chosen = self._chosen(_rows(x), into)
        self._note(norm.name, "rms_norm")
        return denoise_norm.sum_norm(
            None,
            _flat(x),
            None,
            norm,
            modulation,
            into,
            warps=chosen.norm_warps,
            early=chosen.norm_early,
            carveout=chosen.norm_carveout,
        )[1].view(x.shape)

    def linear(self, x: Tensor, layer: AnyLinear) -> Tensor:
        """`reference.linear` for the 32-wide action projections; wider ones are `base`'s."""
        out, inside = layer.weight.shape
        if not _ours(x) or not isinstance(layer, Linear) or min(out, inside) > 64:
            return self.base.linear(x, layer)
        self._note(layer.name, "linear")
        return denoise_gemm.narrow(x.reshape(-1, inside), layer).view(*x.shape[:-1], out)

    def linear_residual_norm(
        self,
        x: Tensor,
        layer: AnyLinear,
        residual: Tensor,
        gate: Tensor | None,
        norm: AnyNorm,
        modulation: Tensor | None,
        into: AnyLinear,
    ) -> tuple[Tensor, Tensor]:
        """`reference.linear_residual_norm`; the residual stream comes back in float32."""
        if not _ours(x, layer, into) or isinstance(norm, LayerNorm):
            return self.base.linear_residual_norm(x, layer, residual, gate, norm, modulation, into)
        chosen = self._chosen(_rows(x), layer)
        field = "down" if layer.name.endswith("down") else "o"
        ahead = _ahead(chosen, field, x, layer)
        self._note_product(layer, "linear_residual_norm", ahead)
        if ahead is not None:
            parts = denoise_ahead.parts(_flat(x), layer, ahead)
        else:
            parts = denoise_gemm.parts(_flat(x), layer, getattr(chosen, field))
        total, normed = denoise_norm.sum_norm(
            parts,
            _flat(residual),
            gate,
            norm,
            modulation,
            into,
            warps=chosen.norm_warps,
            early=chosen.norm_early,
            carveout=chosen.norm_carveout,
        )
        return total.view(residual.shape), normed.view(residual.shape)

    def geglu(self, x: Tensor, layer: AnyLinear, into: AnyLinear) -> Tensor:
        """`reference.geglu`."""
        if not _ours(x, layer, into):
            return self.base.geglu(x, layer, into)
        chosen = self._chosen(_rows(x), layer)
        ahead = _ahead(chosen, "gate_up", x, layer)
        self._note_product(layer, "geglu", ahead)
        if ahead is not None:
            return denoise_ahead.geglu(_flat(x), layer, into, ahead).view(*x.shape[:-1], -1)
        return denoise_gemm.geglu(_flat(x), layer, into, chosen.gate_up).view(*x.shape[:-1], -1)

    def qkv_rope(
        self, x: Tensor, layer: AnyLinear, rope: Table, heads: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`reference.qkv_rope`; q, k and v are views of one packed row per token."""
        if not _ours(x, layer):
            return self.base.qkv_rope(x, layer, rope, heads)
        N, K, head_dim = heads
        cos, sin = (table.reshape(-1, head_dim // 2).contiguous() for table in rope)
        chosen = self._chosen(_rows(x), layer)
        ahead = _ahead(chosen, "qkv", x, layer)
        if ahead is not None and head_dim // 2 % ahead.block_n:
            ahead = None
        self._note_product(layer, "qkv_rope", ahead)
        if ahead is not None:
            packed = denoise_ahead.qkv(_flat(x), layer, (cos, sin), heads, ahead)
        else:
            packed = denoise_gemm.qkv(_flat(x), layer, (cos, sin), heads, chosen.qkv)
        q, k, v = packed.view(*x.shape[:-1], N + 2 * K, head_dim).split([N, K, K], dim=-2)
        return q, k, v

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: Table | None, into: AnyLinear
    ) -> Tensor:
        """`reference.attention` with a past."""
        rows = q.shape[0] * q.shape[1]
        if past is None or rows > MAX_ROWS or isinstance(into, Int8Linear):
            return self.base.attention(q, k, v, mask, past, into)
        chosen = self._chosen(rows, into)
        self._note(into.name, "attention")
        tile = _attention_tile(chosen, past[0].shape[1], launch.shared_bytes(q.device))
        return denoise_attention.attention(q, k, v, mask, past, into, tile)

    def step_boundary(
        self, n: Tensor, action_out: Linear, x: Tensor, dt: float, action_in: Linear, norm: RmsNorm,
        modulation: Tensor | None, into: AnyLinear,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """`reference.step_boundary`."""
        out, inside = action_out.weight.shape
        if not _ours(n, into) or out > 64 or inside > 2048:
            return self.base.step_boundary(n, action_out, x, dt, action_in, norm, modulation, into)
        chosen = self._chosen(_rows(n), into)
        self._note(action_out.name, "step_boundary")
        made = denoise_boundary.step_boundary(
            _flat(n),
            action_out,
            _flat(x),
            dt,
            action_in,
            norm,
            modulation,
            into,
            warps=chosen.boundary_warps,
            carveout=chosen.norm_carveout,
        )
        velocity, moved, tokens, normed = (one.view(*n.shape[:-1], -1) for one in made)
        return velocity, moved, tokens, normed

    def _note(self, layer: str, operation: str, kernel: str = "triton") -> None:
        if self.record is not None:
            self.record(layer, operation, kernel)

    def _note_product(self, layer: AnyLinear, operation: str, ahead: AheadTile | None) -> None:
        known = self.tiles is not None or tuple(layer.weight.shape) in MEASURED
        kernel = "triton" if ahead is None else "gluon early weights"
        if isinstance(layer, RowFp8Linear):
            self._note(layer.name, operation, row_scales.KERNEL)
        self._note(layer.name, operation, kernel if known else f"{kernel}, untuned")

    def _chosen(self, rows: int, layer: AnyLinear) -> Tiles:
        """The cuts for this call."""
        if self.tiles is not None:
            return self.tiles
        tiles = tiles_for(rows, layer)
        return with_early_weights(tiles, rows, layer) if self.early_weights else tiles


def _ahead(tiles: Tiles, field: str, x: Tensor, layer: AnyLinear) -> AheadTile | None:
    """The cut with early weights of this product, None where it cannot run."""
    tile: AheadTile | None = getattr(tiles.ahead, field, None)
    pairs = 2 if field in ("qkv", "gate_up") else 1
    if tile is None or denoise_ahead.why_not(layer, tile, rows=_rows(x), pairs=pairs) is not None:
        return None
    return tile


def _attention_tile(tiles: Tiles, cached_keys: int, shared_bytes: int | None) -> AttentionTile:
    """By the length of the cache; GPUs with little shared memory (RTX 30 to 50) keep the middle one for long caches."""
    if cached_keys <= MIN_MID_KEYS:
        return tiles.attention_short or tiles.attention
    small = shared_bytes is not None and shared_bytes < LONG_CACHE_BYTES
    return (tiles.attention_mid if small or cached_keys <= MAX_MID_KEYS else None) or tiles.attention


def denoise_ops(
    base: OpTable, tiles: Tiles | None = None, *, record: Recorder | None = None, early_weights: bool = True
) -> OpTable:
    """`base`, with calls of at most MAX_ROWS rows taken by the kernels of this file; see `Denoise`."""
    ops = Denoise(base, tiles, record, early_weights)
    return replace(
        base,
        rms_norm=ops.rms_norm,
        linear=ops.linear,
        linear_residual_norm=ops.linear_residual_norm,
        geglu=ops.geglu,
        qkv_rope=ops.qkv_rope,
        attention=ops.attention,
        step_boundary=ops.step_boundary,
    )


def _flat(x: Tensor) -> Tensor:
    """[..., D] as rows one behind the other: a kernel knows no strides, and a view of a strided tensor keeps its own."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def why_not(*, head_dim: int, device: torch.device, rows: int | None = None) -> str | None:
    """None if the kernels can run a stack with this head size on this device.

    rows  action rows of a call, batch x horizon, where the stack is modulated by flow time (pi0.5): no other kernel can
          take those. A stack with plain norms (pi0) has no limit, as more rows go to `base`
    """
    if head_dim < 16 or head_dim > MAX_HEAD_DIM or head_dim & (head_dim - 1):
        return f"head size {head_dim} is not a power of two from 16 to {MAX_HEAD_DIM}"
    if rows is not None and rows > MAX_ROWS:
        return f"{rows} action rows (batch x horizon) are more than {MAX_ROWS}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    return None


def check_rows(*, batch: int, horizon: int) -> None:
    """Raise Unsupported if a modulated stack (pi0.5) is to denoise more actions at once than the kernels take."""
    if batch * horizon > MAX_ROWS:
        raise Unsupported(
            "the denoise kernels take few rows", got=f"batch {batch} x horizon {horizon} = {batch * horizon} action rows",
            wanted=f"at most {MAX_ROWS} action rows (batch x horizon)",
            do="infer smaller batches, or choose --backend eager or compiled",
        )  # fmt: skip
