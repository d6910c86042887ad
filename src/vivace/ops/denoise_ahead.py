"""The expert's products with their weights in shared memory before the predecessor has finished (Hopper).

In `denoise_gemm` a program waits for its predecessor and then reads weights. Weights are constants, so here the order is:

    let the successor start | issue the copies of all own weights | wait | load x | multiply | store

and the stream of weights of the next stages runs while the current stage computes. What makes the early start safe: every
program waits for its predecessor's end before it reads anything but constants, and before it writes at all, and ends
only after that wait. So a kernel that passes its wait knows that all older kernels have ended: it may read what they wrote
and overwrite what they read. A kernel starts only when all programs of its predecessor are resident: none starves another.

One rule for the chain around them: what a kernel reads before its wait (attention: old keys) must be older than some kernel
in between that lets its successor start only after its own wait. At the start of a loop that is the action projection.

`parts`, `geglu` and `qkv` have the contracts of `denoise_gemm`. At most 16 rows: `denoise_ahead_few`; at most 64:
`denoise_ahead_many`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import launch
from .layers import AnyLinear, Fp8Linear, RowFp8Linear

try:  # Gluon is younger than Triton and still moves: without it everything else works
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .denoise_ahead_few import few_kernel
    from .denoise_ahead_many import many_kernel
except ImportError:
    gl = None

FEW_ROWS, MAX_ROWS = 16, 64
SHARED_BYTES = 227 * 1024


@dataclass(frozen=True)
class AheadTile:
    """How a product with early weights is cut.

    block_n  output columns of one program, per accumulator (geglu and qkv have two)
    split_k  programs that share an output tile; part only
    warps    at most 16 rows: they share K. Above, always 4
    bars     at most 16 rows: barriers on which weights are announced; more let the first products start earlier
    each     above 16 rows: chunks of x (128 bytes wide) that arrive together
    slots    above 16 rows: groups of x in shared memory at a time
    early    the successor may start at once; otherwise after the products
    carveout per cent of a processor's memory that shall be shared memory, see `launch.share`
    """

    block_n: int
    split_k: int = 1
    warps: int = 4
    bars: int = 1
    each: int = 2
    slots: int = 4
    early: bool = True
    carveout: int = launch.BY_DRIVER


@dataclass(frozen=True)
class AheadTiles:
    """One cut per product, and when the norms between them let their successor start, see `ops.launch`."""

    qkv: AheadTile
    o: AheadTile
    gate_up: AheadTile
    down: AheadTile
    norm_early: int = launch.FIRST


# (rows at most, E4M3?) -> cuts: the fastest of each chain on an H100 at 10 rows and 50 rows (docs/log.md 2026-11-25)
AHEAD_TILES: dict[tuple[int, bool], AheadTiles] = {
    (FEW_ROWS, False): AheadTiles(
        qkv=AheadTile(16), o=AheadTile(32, 4), gate_up=AheadTile(32, bars=4), down=AheadTile(64, 8)
    ),
    (FEW_ROWS, True): AheadTiles(
        qkv=AheadTile(16, warps=8),
        o=AheadTile(32, 4, warps=8),
        gate_up=AheadTile(16),
        down=AheadTile(32, 8),
        norm_early=launch.EARLY,
    ),
    (MAX_ROWS, False): AheadTiles(
        qkv=AheadTile(16, slots=8),
        o=AheadTile(32, 4, each=1, slots=8),
        gate_up=AheadTile(32, slots=6),
        down=AheadTile(64, 8),
    ),
    (MAX_ROWS, True): AheadTiles(
        qkv=AheadTile(16, slots=8),
        o=AheadTile(32, 4, each=1, slots=8),
        gate_up=AheadTile(32, each=1, slots=8),
        down=AheadTile(32, 4, slots=8),
    ),
}


def parts(x: Tensor, layer: AnyLinear, tile: AheadTile) -> Tensor:
    """x [M, K] -> float32 [split_k, M, N]; their sum over the first axis is x W^T. Precondition: `why_not` is None."""
    N = layer.weight.shape[0]
    out = torch.empty(tile.split_k, x.shape[0], N, dtype=torch.float32, device=x.device)
    return _product(x, layer, out, tile, mode="part")


def geglu(x: Tensor, layer: AnyLinear, into: AnyLinear, tile: AheadTile) -> Tensor:
    """x [M, K] -> [M, F] as `into` takes it. Precondition: `why_not` is None."""
    quantised = isinstance(into, Fp8Linear)
    dtype = torch.float8_e4m3fn if quantised else into.dtype
    out = torch.empty(x.shape[0], layer.weight.shape[0] // 2, dtype=dtype, device=x.device)
    return _product(x, layer, out, tile, mode="geglu", out_scale=into.input_scale if quantised else None)


def qkv(
    x: Tensor, layer: AnyLinear, rope: tuple[Tensor, Tensor], heads: tuple[int, int, int], tile: AheadTile
) -> Tensor:
    """x [M, K] -> packed [M, (N + 2K) * head_dim] in `layer.dtype`.  rope: cos, sin [R, head_dim/2], R divides M.

    Precondition: `why_not` is None, and head_dim/2 is a multiple of `tile.block_n`
    """
    num_heads, num_kv_heads, head_dim = heads
    cos, sin = rope
    out = torch.empty(x.shape[0], layer.weight.shape[0], dtype=layer.dtype, device=x.device)
    return _product(
        x, layer, out, tile, mode="qkv", cos=cos, sin=sin, table_rows=cos.shape[0],
        HALF=head_dim // 2, ROTATED=num_heads + num_kv_heads,
    )  # fmt: skip


def _product(x: Tensor, layer: AnyLinear, out: Tensor, tile: AheadTile, *, mode: str, **more: Any) -> Tensor:
    """Launch on x [M, K] (contiguous, as `layer` takes it) and return `out`."""
    (M, K), weight = x.shape, layer.weight.data
    N, few = weight.shape[0], M <= FEW_ROWS
    chunk = (64 if few else 128) // weight.element_size()
    steps = K // (chunk * tile.split_k * (tile.warps if few else 1))
    quantised, bits = isinstance(layer, Fp8Linear), 8 * weight.element_size()
    pdl = launch.programmatic(x)
    stored = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}[out.dtype]
    common: dict[str, Any] = {
        "channel_scale": layer.weight_scale if quantised else None, "input_scale": layer.input_scale if quantised else None,
        "out_scale": None, "cos": None, "sin": None, "table_rows": 1, "M": M, "N": N, "MODE": mode, "BN": tile.block_n,
        "BK": chunk, "STEPS": steps, "HALF": 1, "ROTATED": 0, "STORED": stored, "PDL": pdl, "EARLY": tile.early,
        **({"launch_pdl": True} if pdl else {}), **more,
    }  # fmt: skip
    grid = (N // tile.block_n if mode == "part" else N // (2 * tile.block_n), tile.split_k)
    if few:
        view = weight.view(N, K // chunk, chunk).transpose(0, 1)
        source = TensorDescriptor.from_tensor(
            view, [tile.warps, tile.block_n, chunk], gl.NVMMASharedLayout(64, bits, 3)
        )
        launched = few_kernel[grid](source, x, out, K=K, BARS=tile.bars, num_warps=tile.warps, **common)
    else:
        layout = gl.NVMMASharedLayout(128, bits, 2)
        source = TensorDescriptor.from_tensor(weight, [tile.block_n, chunk], layout)
        rows = TensorDescriptor.from_tensor(x, [MAX_ROWS, chunk], layout)
        launched = many_kernel[grid](source, rows, out, EACH=tile.each, SLOTS=tile.slots, num_warps=4, **common)
    if tile.carveout != launch.BY_DRIVER:
        launch.share(launched, tile.carveout)
    return out


def tiles_for(rows: int, layer: AnyLinear) -> AheadTiles | None:
    """The row of `AHEAD_TILES` that fits; None above MAX_ROWS, for row-wise scales, and where these kernels cannot run."""
    if _unavailable(layer.weight.device) is not None or isinstance(layer, RowFp8Linear):
        return None
    quantised = isinstance(layer, Fp8Linear)
    return next((cut for (most, fp8), cut in AHEAD_TILES.items() if rows <= most and fp8 == quantised), None)


def _unavailable(device: torch.device) -> str | None:
    if gl is None:
        return "this Triton has no Gluon, or another one"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "the GPU is not a Hopper"
    return None


def why_not(layer: AnyLinear, tile: AheadTile, *, rows: int, pairs: int) -> str | None:
    """None if this product can take this tile.  rows = tokens, pairs = accumulators (2 in geglu and qkv, 1 in parts)."""
    (N, K), size, few = layer.weight.shape, layer.weight.element_size(), rows <= FEW_ROWS
    unavailable = _unavailable(layer.weight.device)
    if unavailable is not None:
        return unavailable
    if layer.weight.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return "weights are neither bfloat16 nor E4M3"
    if rows > MAX_ROWS:
        return f"{rows} rows are more than {MAX_ROWS}"
    group = 64 * tile.warps * tile.bars if few else 128 * tile.each
    if not few and tile.slots < 2:
        return "a ring of one place never turns"
    if N % (tile.block_n * pairs) or (K * size) % (tile.split_k * group):
        return f"[{N}, {K}] is not a multiple of the tile"
    shared = tile.block_n * pairs * (K // tile.split_k) * size
    shared += 0 if few else MAX_ROWS * 128 * tile.each * tile.slots
    if shared + 1024 > SHARED_BYTES:
        return f"{shared} bytes do not fit in shared memory"
    return None
