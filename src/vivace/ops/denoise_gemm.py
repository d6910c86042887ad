# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""The expert's matrix products at 10 to 64 rows: three epilogues, one kernel.

    part    float32 parts of a split product; the norm kernel adds them in a fixed order    (o, down)
    geglu   gelu(x Wg^T) * (x Wu^T), stored as the next linear takes it                       (gate_up)
    qkv     q and k rotated, v as it is, one packed row per token                              (qkv)

At these sizes a product is bound by reading weights and by latency, never by arithmetic: all weights of a layer pass once
through the chip per step. Every program also reads all rows of x, so x in E4M3 saves more than its own bytes suggest.
Split-K writes parts instead of adding atomically: the result is the same bits on every replay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import blocks, launch, row_scales
from .blocks import block_of, source
from .layers import AnyLinear, E4m3Linear, Fp8Linear, Linear
from .saturate import saturated


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    block_n  output columns of one program, per accumulator (geglu and qkv have two)
    split_k  programs that share an output tile; part only
    early    the successor may launch before the main loop, see `ops.launch`
    bulk     operands arrive through the bulk copy engine where there is one, see `blocks`
    carveout per cent of a processor's memory that shall be shared memory, see `launch.share`
    ahead    the first block of weights is loaded into registers before the wait, while the predecessor still runs
    """

    block_n: int
    block_k: int
    split_k: int = 1
    warps: int = 4
    stages: int = 4
    bulk: bool = False
    early: bool = False
    ahead: bool = False
    carveout: int = launch.BY_DRIVER


@triton.jit
def _later(block, M):
    """The block itself. M > 0 always holds, which the compiler does not know: the wait for the load is here."""
    if block.dtype.primitive_bitwidth == 8:
        bits = block.to(tl.int8, bitcast=True)
        block = tl.where(M > 0, bits, tl.zeros_like(bits)).to(block.dtype, bitcast=True)
    else:
        block = tl.where(M > 0, block, tl.zeros_like(block))
    return block


@triton.jit
def _accumulate(x, w, acc, INTERPRET: tl.constexpr):
    if INTERPRET:
        return acc + tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), input_precision="ieee")
    return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def _scaled(acc, channel_scale, input_scale, row_scale, at, N, rows, M):
    """E4M3: times the scale of the channel, and of the input: one for all, or of each row."""
    if channel_scale is not None:
        channel = tl.load(channel_scale + at, mask=at < N, other=0.0)
        if row_scale is not None:
            acc *= channel[None, :] * tl.load(row_scale + rows, mask=rows < M, other=0.0)[:, None]
        else:
            acc *= (channel * tl.load(input_scale))[None, :]
    return acc


@triton.jit
def hand_over(y, out, out_scale):
    """Float32 to the dtype of `out`; with `out_scale` (float32 [1]) as E4M3, see `saturate`."""
    if out_scale is not None:
        y = saturated(y / tl.load(out_scale))
    return y.to(out.dtype.element_ty)


@triton.jit(do_not_specialize=["M", "table_rows"])
def _product_kernel(
    x, weight, out, channel_scale, input_scale, row_scale, out_scale, cos, sin, table_rows, M, N, K,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
    HALF: tl.constexpr, ROTATED: tl.constexpr, BULK: tl.constexpr, AHEAD: tl.constexpr,
    EVEN: tl.constexpr, EVEN_N: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (column tiles, split_k, row tiles). weight [N, K], geglu N = 2F; HALF = head_dim/2; ROTATED heads turn."""
    tile, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_M
    first = tile * BLOCK_N
    second = first + N // 2
    if MODE == "qkv":
        per_half: tl.constexpr = HALF // BLOCK_N
        first = (tile // per_half) * (2 * HALF) + (tile % per_half) * BLOCK_N
        second = first + HALF
    rows, columns = row + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    weights_bulk: tl.constexpr = BULK and AHEAD == 0
    start = split * STEPS * BLOCK_K
    if AHEAD:
        w_ahead = block_of(weight, first, start, N, K, K, False, EVEN, BLOCK_N, BLOCK_K)
        if MODE != "part":
            w2_ahead = block_of(weight, second, start, N, K, K, False, EVEN, BLOCK_N, BLOCK_K)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    if AHEAD:
        x_ahead = block_of(x, row, start, M, K, K, BULK, EVEN, BLOCK_M, BLOCK_K)
    for step in tl.range(AHEAD, STEPS):
        at = start + step * BLOCK_K
        block = block_of(x, row, at, M, K, K, BULK, EVEN, BLOCK_M, BLOCK_K)
        w = block_of(weight, first, at, N, K, K, weights_bulk, EVEN, BLOCK_N, BLOCK_K)
        acc = _accumulate(block, w, acc, INTERPRET)
        if MODE != "part":
            w2 = block_of(weight, second, at, N, K, K, weights_bulk, EVEN, BLOCK_N, BLOCK_K)
            acc2 = _accumulate(block, w2, acc2, INTERPRET)
    if AHEAD:
        if STEPS > AHEAD and not BULK:
            x_ahead = _later(x_ahead, M)
        acc = _accumulate(x_ahead, _later(w_ahead, M), acc, INTERPRET)
        if MODE != "part":
            acc2 = _accumulate(x_ahead, _later(w2_ahead, M), acc2, INTERPRET)
    if PDL and not EARLY:
        gdc_launch_dependents()
    acc = _scaled(acc, channel_scale, input_scale, row_scale, columns, N, rows, M)
    inside = (rows < M)[:, None]
    if MODE == "part":
        if not EVEN_N:
            inside = inside & (columns < N)[None, :]
        tl.store(out + (split * M + rows)[:, None] * N + columns[None, :], acc, mask=inside)
    else:
        acc2 = _scaled(acc2, channel_scale, input_scale, row_scale, columns + (second - first), N, rows, M)
        if MODE == "geglu":
            y = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)) * acc2
            if not EVEN_N:
                inside = inside & (columns < N // 2)[None, :]
            tl.store(out + rows[:, None] * (N // 2) + columns[None, :], hand_over(y, out, out_scale), mask=inside)
        else:
            if first < ROTATED * 2 * HALF:
                turn = (rows % table_rows)[:, None] * HALF + (columns % (2 * HALF))[None, :]
                c = tl.load(cos + turn).to(tl.float32)
                s = tl.load(sin + turn).to(tl.float32)
                turned = acc * c - acc2 * s
                acc2 = acc2 * c + acc * s
                acc = turned
            to = out + rows[:, None] * N + columns[None, :]
            tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
            tl.store(to + HALF, acc2.to(out.dtype.element_ty), mask=inside)


def block_rows(rows: int) -> int:
    """Rows of one program: 64 feeds the wide matrix instruction of Hopper, fewer only where most would be empty."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def _product(x: Tensor, layer: AnyLinear, out: Tensor, tile: Tile, *, mode: str, tiles_n: int, **more: Any) -> Tensor:
    """Launch on x [M, K] (contiguous, as `layer` takes it) and return `out`."""
    x, row_scale = row_scales.operand(x, layer, pdl=launch.programmatic(x))
    (M, K), N = x.shape, layer.weight.shape[0]
    BM = block_rows(M)
    steps = triton.cdiv(K, tile.block_k * tile.split_k)
    bulk = tile.bulk and not launch.INTERPRET and blocks.bulk_copies(x.device)
    quantised = isinstance(layer, E4m3Linear)
    bytes_each = (BM + tile.block_n * (1 if mode == "part" else 2)) * tile.block_k * x.element_size()
    stages = launch.stages_that_fit(tile.stages, bytes_each=bytes_each, device=x.device)
    defaults = {"out_scale": None, "cos": None, "sin": None, "table_rows": 1, "HALF": 1, "ROTATED": 0}
    launched = _product_kernel[(tiles_n, tile.split_k, triton.cdiv(M, BM))](
        source(x, [BM, tile.block_k], bulk=bulk),
        source(layer.weight.data, [tile.block_n, tile.block_k], bulk=bulk and not tile.ahead), out,
        layer.weight_scale if quantised else None, layer.input_scale if isinstance(layer, Fp8Linear) else None, row_scale,
        M=M, N=N, K=K, MODE=mode, BLOCK_M=BM, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STEPS=steps, BULK=bulk,
        AHEAD=int(tile.ahead),
        EVEN=N % tile.block_n == 0 and K % (tile.block_k * tile.split_k) == 0, EVEN_N=N % (2 * tile.block_n) == 0,
        **{**defaults, **more}, **launch.options(x, warps=tile.warps, stages=stages, early=tile.early),
    )  # fmt: skip
    launch.share(launched, tile.carveout)
    return out


def parts(x: Tensor, layer: AnyLinear, tile: Tile) -> Tensor:
    """x [M, K] -> float32 [split_k, M, N]; their sum over the first axis is x W^T."""
    N = layer.weight.shape[0]
    out = torch.empty(tile.split_k, x.shape[0], N, dtype=torch.float32, device=x.device)
    return _product(x, layer, out, tile, mode="part", tiles_n=triton.cdiv(N, tile.block_n))


def geglu(x: Tensor, layer: AnyLinear, into: AnyLinear, tile: Tile) -> Tensor:
    """x [M, K] -> [M, F] as `into` takes it."""
    F = layer.weight.shape[0] // 2
    quantised = isinstance(into, Fp8Linear)
    out = torch.empty(x.shape[0], F, dtype=torch.float8_e4m3fn if quantised else into.dtype, device=x.device)
    scale = into.input_scale if quantised else None
    return _product(x, layer, out, tile, mode="geglu", tiles_n=triton.cdiv(F, tile.block_n), out_scale=scale)


def qkv(x: Tensor, layer: AnyLinear, rope: tuple[Tensor, Tensor], heads: tuple[int, int, int], tile: Tile) -> Tensor:
    """x [M, K] -> packed [M, (N + 2K) * head_dim] in `layer.dtype`.  rope: cos, sin [R, head_dim/2], R divides M.

    A tile that is wider than half a head is cut to it: a program holds columns of one half and their partners.
    """
    num_heads, num_kv_heads, head_dim = heads
    cos, sin = rope
    tile = replace(tile, block_n=min(tile.block_n, head_dim // 2))
    N = layer.weight.shape[0]
    out = torch.empty(x.shape[0], N, dtype=layer.dtype, device=x.device)
    return _product(
        x, layer, out, tile, mode="qkv", tiles_n=N // (2 * tile.block_n), cos=cos, sin=sin, table_rows=cos.shape[0],
        HALF=head_dim // 2, ROTATED=num_heads + num_kv_heads,
    )  # fmt: skip


@triton.jit
def _narrow_kernel(
    x, weight, bias, out, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (rows, column tiles): products in float32 without matrix instructions."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if bias is not None:
        acc += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    for step in tl.range(0, STEPS):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        w = tl.load(weight + columns[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0).to(
            tl.float32
        )
        acc += tl.sum(w * tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :], axis=1)
    if PDL and not EARLY:
        gdc_launch_dependents()
    tl.store(out + row * N + columns, acc.to(out.dtype.element_ty), mask=inside)


def narrow(x: Tensor, layer: Linear) -> Tensor:
    """x [M, K] -> [M, N] for the 32-wide action projections (K or N small), float32 sums. x may have any strides."""
    (M, K), N = x.shape, layer.weight.shape[0]
    x = x.contiguous()  # noise comes from outside, and a view of [B, T, 32] keeps its strides
    out = torch.empty(M, N, dtype=layer.dtype, device=x.device)
    block_n = 8 if K > 64 else min(triton.next_power_of_2(N), 128)
    block_k = min(triton.next_power_of_2(K), 8192 // block_n)
    _narrow_kernel[(M, triton.cdiv(N, block_n))](
        x, layer.weight, layer.bias, out, N, K, BLOCK_N=block_n, BLOCK_K=block_k,
        STEPS=triton.cdiv(K, block_k), **launch.options(x, warps=4),
    )  # fmt: skip
    return out
