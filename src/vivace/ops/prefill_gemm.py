# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One Triton matrix product for M = 256..1024 rows, whose epilogue does what would otherwise be a second kernel.

    plain     x W^T (+ bias) (gelu)                  SigLIP's linears; o and down, whose sum and norm follow in one kernel
    geglu     gelu(x Wg^T) * (x Wu^T)                two accumulators, weight = gate rows | up rows
    qkv_rope  q, k rotated, v copied, each in place   two accumulators, one per half of a head

Why not cuBLAS alone: at these sizes the traffic between kernels costs more than a percent of matrix speed. GeGLU moves
95 MB through memory for one layer of the prefix, and SigLIP's M = 768 fills 54 of 132 processors with cuBLAS' tiles.

8 bits: x and weight are E4M3, or INT8, whose sums are exact (int32). `channel_scale` [N] = input scale * weight scale
multiplies the sum, and where rows of x have scales of their own, `row_scale` too. A quantised output: see `saturate`.

Split-K is deterministic: each program writes its float32 part [split_k, M, N], and the norm kernel adds them in order.
How operands arrive: `blocks`. All row tiles of one weight tile run side by side: a weight is read from memory once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..errors import ShapeError
from . import blocks
from .blocks import block_of, source
from .prefill_ahead import Ahead, ahead_options, fetch_ahead
from .saturate import in_8_bits


@dataclass(frozen=True)
class Tile:
    """How a product is cut.  block_n counts the columns of one accumulator; geglu and qkv_rope have two.

    split_k      programs that share one output tile; each writes its own part
    persistent   one program per processor walks over several tiles, so that loads run on through the epilogues
    bulk_store   whole tiles leave through the bulk copy engine (plain and geglu, unsplit)
    tail, group  geglu alone: rows that a carrier takes beside its own, and column tiles launched together; `prefill_tail`
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1
    persistent: bool = False
    bulk_store: bool = False
    tail: int = 0
    group: int = 1


@dataclass(frozen=True)
class Rotation:
    """Where k and v go and how q and k turn.

    k, v  [M, kv_heads * head_dim], any row stride      cos, sin  [R, head_dim/2], row of token m is m % R
    heads (query heads, key/value heads, head_dim); 0 query heads: keys and values alone
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    heads: tuple[int, int, int]


@triton.jit
def gelu_tanh(x):
    """Tanh-approximated GELU, written as x * sigmoid(2 z)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def as_stored(y, out_inverse, dtype: tl.constexpr):
    """Float32 as it is stored; with `out_inverse` (float32 [1] = 1 / scale) in 8 bits, see `saturate`."""
    if out_inverse is not None:
        y = in_8_bits(y * tl.load(out_inverse), dtype)
    return y.to(dtype)


@triton.jit
def _weight_rows(tile_n, N, BLOCK_N: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr):
    """First weight row of both accumulators of a tile: two halves of a head, or a gate and its up."""
    if EPILOGUE == "qkv_rope":
        per_half: tl.constexpr = HALF // BLOCK_N
        first = (tile_n // per_half) * (2 * HALF) + (tile_n % per_half) * BLOCK_N
        return first, first + HALF
    first = tile_n * BLOCK_N
    return first, first + N


@triton.jit
def _store_rotated(
    first, second, rows, in_rows, q, k, v, strides, tables, head, column,
    BLOCK_N: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Rotate both halves of a head's columns and write them to q, k or v."""
    cos_table, sin_table, rope_rows = tables
    q_stride, k_stride, v_stride = strides
    columns = column + tl.arange(0, BLOCK_N)
    if head < HEADS + KV_HEADS:
        at = (rows % rope_rows)[:, None] * HALF + columns[None, :]
        cos, sin = tl.load(cos_table + at).to(tl.float32), tl.load(sin_table + at).to(tl.float32)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
    if head < HEADS:
        to = q + rows[:, None] * q_stride + (head * 2 * HALF + columns)[None, :]
    elif head < HEADS + KV_HEADS:
        to = k + rows[:, None] * k_stride + ((head - HEADS) * 2 * HALF + columns)[None, :]
    else:
        to = v + rows[:, None] * v_stride + ((head - HEADS - KV_HEADS) * 2 * HALF + columns)[None, :]
    tl.store(to, first.to(q.dtype.element_ty), mask=in_rows[:, None])
    tl.store(to + HALF, second.to(q.dtype.element_ty), mask=in_rows[:, None])


@triton.jit(do_not_specialize=["M", "rope_rows", "bias_rows", "ahead_turns"])
def _gemm_kernel(
    x, x_stride, weight, weight_stride, out, out_stride, k_out, k_stride, v_out, v_stride, channel_scale, row_scale, bias,
    bias_rows, out_inverse, cos_table, sin_table, rope_rows, M, N, K,
    K_TILES: tl.constexpr, TILES_EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EPILOGUE: tl.constexpr, GELU: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, ROW_BIAS: tl.constexpr,
    BULK: tl.constexpr, EVEN: tl.constexpr, BULK_STORE: tl.constexpr, PDL: tl.constexpr, ahead, ahead_bytes, ahead_turns,
    AHEAD_LINES: tl.constexpr,
):  # fmt: skip
    """Grid (programs, split_k).  N = output columns of one accumulator (qkv_rope: all columns / 2); WHOLE: INT8."""
    PAIRED: tl.constexpr = EPILOGUE != "plain"
    SUM: tl.constexpr = tl.int32 if WHOLE else tl.float32
    W = 2 * N if PAIRED else N
    tiles_m = tl.cdiv(M, BLOCK_M)
    split = tl.program_id(1)
    if AHEAD_LINES > 0:
        fetch_ahead(ahead, ahead_bytes, ahead_turns, AHEAD_LINES)
    if PDL:
        gdc_wait()
    for index in tl.range(0, TILES_EACH, flatten=TILES_EACH > 1):
        tile = tl.program_id(0) + index * tl.num_programs(0)
        row, tile_n = (tile % tiles_m) * BLOCK_M, tile // tiles_m
        first_row, second_row = _weight_rows(tile_n, N, BLOCK_N, EPILOGUE, HALF)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
        second = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
        for step in tl.range(0, K_TILES):
            at = (split * K_TILES + step) * BLOCK_K
            block = block_of(x, row, at, M, K, x_stride, BULK, EVEN, BLOCK_M, BLOCK_K)
            w = block_of(weight, first_row, at, W, K, weight_stride, BULK, EVEN, BLOCK_N, BLOCK_K)
            acc = tl.dot(block, w.T, acc, input_precision=PRECISION, out_dtype=SUM)
            if PAIRED:
                w = block_of(weight, second_row, at, W, K, weight_stride, BULK, EVEN, BLOCK_N, BLOCK_K)
                second = tl.dot(block, w.T, second, input_precision=PRECISION, out_dtype=SUM)
        if PDL and TILES_EACH == 1:
            gdc_launch_dependents()
        if WHOLE:
            acc, second = acc.to(tl.float32), second.to(tl.float32)
        rows, columns = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        in_rows = rows < M
        if channel_scale is not None:
            # a persistent program may stand on a tile beyond the last: its loads must stay inside the table
            valid = columns < N - first_row if not PAIRED else first_row + columns < 2 * N
            acc *= tl.load(channel_scale + first_row + columns, mask=valid, other=0.0)[None, :]
            if PAIRED:
                valid = second_row + columns < 2 * N
                second *= tl.load(channel_scale + second_row + columns, mask=valid, other=0.0)[None, :]
        if row_scale is not None:
            own = tl.load(row_scale + rows, mask=in_rows, other=0.0)[:, None]
            acc *= own
            if PAIRED:
                second *= own
        if EPILOGUE == "qkv_rope":
            per_half: tl.constexpr = HALF // BLOCK_N
            _store_rotated(
                acc, second, rows, in_rows & (first_row < 2 * N), out, k_out, v_out, (out_stride, k_stride, v_stride),
                (cos_table, sin_table, rope_rows), tile_n // per_half, (tile_n % per_half) * BLOCK_N,
                BLOCK_N, HALF, HEADS, KV_HEADS,
            )  # fmt: skip
        else:
            columns += tile_n * BLOCK_N
            if EPILOGUE == "geglu":
                acc = gelu_tanh(acc) * second
            if ROW_BIAS:
                at = (rows % bias_rows)[:, None] * N + columns[None, :]
                acc += tl.load(bias + at, mask=in_rows[:, None] & (columns < N)[None, :], other=0.0).to(tl.float32)
            elif bias is not None:
                acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            if GELU:
                acc = gelu_tanh(acc)
            if BULK_STORE:
                out.store([row, tile_n * BLOCK_N], as_stored(acc, out_inverse, out.dtype))
            else:
                to = out + (split * M + rows)[:, None] * out_stride + columns[None, :]
                tl.store(
                    to,
                    as_stored(acc, out_inverse, out.dtype.element_ty),
                    mask=in_rows[:, None] & (columns < N)[None, :],
                )


def gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    tile: Tile,
    epilogue: str = "plain",
    channel_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gelu: bool = False,
    out_inverse: Tensor | None = None,
    rotation: Rotation | None = None,
    processors: int = 132,
    pdl: bool = False,
    ahead: Ahead = None,
) -> Tensor:
    """Launch the product; returns `out`, completely written.

    x              [M, K]; weight [N, K], geglu [2N, K]; one dtype; columns side by side, any row stride
    out            [M, N], any row stride; split_k > 1: float32 [split_k, M, N]; qkv_rope: q, or k if there are no queries
    channel_scale  float32, one per weight row
    row_scale      float32 [M, 1], one per row of x
    bias           [N], or [R, N] contiguous: row m of the result gets row m % R (position embeddings)
    out_inverse    float32 [1] = 1 / scale of an output in E4M3 or INT8
    rotation       qkv_rope; a tile wider than half a head is cut to it, as a program holds columns of one half
    ahead          see `prefill_ahead`
    """
    M, K = x.shape
    check_operands(x, weight, out, tile=tile, plain=epilogue == "plain" and bias is None and not gelu)
    if rotation is not None:
        tile = replace(tile, block_n=min(tile.block_n, rotation.heads[2] // 2))
    columns = weight.shape[0] if epilogue == "plain" else weight.shape[0] // 2
    heads, kv_heads, head_dim = rotation.heads if rotation is not None else (0, 0, 2 * tile.block_n)
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(columns, tile.block_n)
    programs = min(tiles, processors) if tile.persistent else tiles
    bulk = blocks.bulk_copies(x.device)
    bulk_store = bulk and tile.bulk_store and epilogue != "qkv_rope" and tile.split_k == 1
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _gemm_kernel[(programs, tile.split_k)](
        source(x, [tile.block_m, tile.block_k], bulk=bulk), x.stride(0),
        source(weight, [tile.block_n, tile.block_k], bulk=bulk), weight.stride(0),
        source(out, [tile.block_m, tile.block_n], bulk=bulk_store), out.stride(-2),
        rotation.k if rotation else None, rotation.k.stride(0) if rotation else 0,
        rotation.v if rotation else None, rotation.v.stride(0) if rotation else 0,
        channel_scale, row_scale, bias, bias.shape[0] if bias is not None else 1, out_inverse,
        rotation.cos if rotation else None, rotation.sin if rotation else None,
        rotation.cos.shape[0] if rotation else 1, M, columns, K,
        K_TILES=triton.cdiv(triton.cdiv(K, tile.block_k), tile.split_k), TILES_EACH=triton.cdiv(tiles, programs),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, EPILOGUE=epilogue, GELU=gelu,
        HALF=head_dim // 2, HEADS=heads, KV_HEADS=kv_heads, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        WHOLE=x.dtype == torch.int8,
        ROW_BIAS=bias is not None and bias.dim() == 2,
        BULK=bulk, EVEN=K % (tile.block_k * tile.split_k) == 0, BULK_STORE=bulk_store, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, **options,
        **ahead_options(ahead, programs=programs * tile.split_k, warps=tile.warps),
    )  # fmt: skip
    return out


def check_operands(x: Tensor, weight: Tensor, out: Tensor, *, tile: Tile, plain: bool) -> None:
    """Raise ShapeError unless the operands agree and a split product has room for its parts and no epilogue."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        got = f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
        raise ShapeError("operands of a matrix product do not fit", got=got, wanted="[M, K] and [N, K] of one dtype")
    wanted = (tile.split_k, x.shape[0], weight.shape[0])
    if tile.split_k > 1 and not (plain and tuple(out.shape) == wanted and out.dtype == torch.float32):
        got = f"out {tuple(out.shape)} {out.dtype}, plain epilogue: {plain}"
        raise ShapeError(
            "a split product writes float32 parts", got=got, wanted=f"{wanted} float32 and no bias or gelu"
        )
