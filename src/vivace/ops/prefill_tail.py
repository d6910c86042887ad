# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The gated product for row counts that are a few rows more than whole tiles: the rows left over ride along.

784 rows are 6 tiles of 128 and 16 rows. A seventh tile would multiply 112 rows of zeros, a sixth of the whole product. A
short tile of its own saves the arithmetic but reads every weight once more, and at this size the way from L2 to the
processor is as busy as the matrix unit. So some programs of the full tiles, the carriers, take `tail` rows more: their
weight blocks already lie in shared memory. There the roles are swapped,

    main  [128 rows, columns] += x W^T          tail  [columns, tail rows] += W x_tail^T

because the matrix unit's second operand may be as narrow as 8 (16 in Triton), its first may not: it has 64 rows. A tail of
64 rows needs no such change of roles. What a carrier multiplies beyond the last row
is zero (descriptors return zero outside) and is not stored. Every sum is one program's: equal bits at every launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from . import blocks
from .prefill_gemm import Tile, as_stored, check_operands, gelu_tanh, gemm


@triton.jit
def _store_gated(
    gate, up, out, out_stride, channel_scale, row_scale, out_inverse, row, column, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """gate, up [BLOCK_M, BLOCK_N] -> out[row.., column..]."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    if channel_scale is not None:
        gate *= tl.load(channel_scale + columns, mask=columns < N, other=0.0)[None, :]
        up *= tl.load(channel_scale + N + columns, mask=columns < N, other=0.0)[None, :]
    if row_scale is not None:
        own = tl.load(row_scale + rows, mask=rows < M, other=0.0)[:, None]
        gate *= own
        up *= own
    y = as_stored(gelu_tanh(gate) * up, out_inverse, out.dtype.element_ty)
    to = out + rows[:, None] * out_stride + columns[None, :]
    tl.store(to, y, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _store_gated_tail(
    gate, up, out, out_stride, channel_scale, row_scale, out_inverse, row, column, M, N,
    TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """gate, up [BLOCK_N, TAIL], columns of the result along the first axis."""
    rows, columns = row + tl.arange(0, TAIL), column + tl.arange(0, BLOCK_N)
    if channel_scale is not None:
        gate *= tl.load(channel_scale + columns, mask=columns < N, other=0.0)[:, None]
        up *= tl.load(channel_scale + N + columns, mask=columns < N, other=0.0)[:, None]
    if row_scale is not None:
        own = tl.load(row_scale + rows, mask=rows < M, other=0.0)[None, :]
        gate *= own
        up *= own
    y = as_stored(gelu_tanh(gate) * up, out_inverse, out.dtype.element_ty)
    to = out + rows[None, :] * out_stride + columns[:, None]
    tl.store(to, y, mask=(rows < M)[None, :] & (columns < N)[:, None])


@triton.jit
def _tail_dot(weights, rest, acc, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    if TAIL < 64:
        acc = tl.dot(weights, rest.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(rest, weights.T, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "full_tiles", "carriers", "tiles_n"])
def _gated_tail_kernel(
    x, x_tail, weight, out, out_stride, channel_scale, row_scale, out_inverse, M, N, full_tiles, carriers, tiles_n,
    K_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (full_tiles * tiles_n).  In a group of GROUP column tiles the carriers come first: they run longest."""
    program = tl.program_id(0)
    start = program // (GROUP * full_tiles) * GROUP
    width = tl.minimum(tiles_n - start, GROUP)
    inside = program - start * full_tiles
    row_tile, column = inside // width, (start + inside % width) * BLOCK_N
    row = row_tile * BLOCK_M
    if PDL:
        gdc_wait()
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if row_tile < carriers:
        tail_row = full_tiles * BLOCK_M + row_tile * TAIL
        if TAIL < 64:
            tail_gate = tl.zeros((BLOCK_N, TAIL), dtype=tl.float32)
            tail_up = tl.zeros((BLOCK_N, TAIL), dtype=tl.float32)
        else:
            tail_gate = tl.zeros((TAIL, BLOCK_N), dtype=tl.float32)
            tail_up = tl.zeros((TAIL, BLOCK_N), dtype=tl.float32)
        for step in tl.range(0, K_TILES):
            block, rest = x.load([row, step * BLOCK_K]), x_tail.load([tail_row, step * BLOCK_K])
            weights = weight.load([column, step * BLOCK_K])
            gate = tl.dot(block, weights.T, gate, input_precision=PRECISION)
            tail_gate = _tail_dot(weights, rest, tail_gate, TAIL, PRECISION)
            weights = weight.load([N + column, step * BLOCK_K])
            up = tl.dot(block, weights.T, up, input_precision=PRECISION)
            tail_up = _tail_dot(weights, rest, tail_up, TAIL, PRECISION)
        if PDL:
            gdc_launch_dependents()
        _store_gated(
            gate, up, out, out_stride, channel_scale, row_scale, out_inverse, row, column, M, N, BLOCK_M, BLOCK_N
        )
        if TAIL < 64:
            _store_gated_tail(
                tail_gate, tail_up, out, out_stride, channel_scale, row_scale, out_inverse, tail_row, column, M, N,
                TAIL, BLOCK_N,
            )  # fmt: skip
        else:
            _store_gated(
                tail_gate, tail_up, out, out_stride, channel_scale, row_scale, out_inverse, tail_row, column, M, N,
                TAIL, BLOCK_N,
            )  # fmt: skip
    else:
        for step in tl.range(0, K_TILES):
            block = x.load([row, step * BLOCK_K])
            gate = tl.dot(block, weight.load([column, step * BLOCK_K]).T, gate, input_precision=PRECISION)
            up = tl.dot(block, weight.load([N + column, step * BLOCK_K]).T, up, input_precision=PRECISION)
        if PDL:
            gdc_launch_dependents()
        _store_gated(
            gate, up, out, out_stride, channel_scale, row_scale, out_inverse, row, column, M, N, BLOCK_M, BLOCK_N
        )


def carriers(rows: int, tile: Tile) -> int:
    """How many row tiles take `tile.tail` rows more, so that no further tile is needed; 0: the rows do not allow it."""
    full, rest = divmod(rows, tile.block_m)
    needed = triton.cdiv(rest, tile.tail) if tile.tail else 0
    return needed if needed <= full else 0


def gated(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    tile: Tile,
    channel_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_inverse: Tensor | None = None,
    processors: int = 132,
    pdl: bool = False,
) -> Tensor:
    """out[M, N] = gelu(x Wg^T) * (x Wu^T), with carriers if `tile` has a tail and M leaves rows over.

    Arguments as `prefill_gemm.gemm` with epilogue geglu: x [M, K], weight [2N, K] = gate rows | up rows, one dtype
    """
    (M, K), count = x.shape, carriers(x.shape[0], tile) if blocks.bulk_copies(x.device) else 0
    if not count:
        return gemm(
            x, weight, out, tile=tile, epilogue="geglu", channel_scale=channel_scale, row_scale=row_scale,
            out_inverse=out_inverse, processors=processors, pdl=pdl,
        )  # fmt: skip
    check_operands(x, weight, out, tile=tile, plain=False)
    columns = weight.shape[0] // 2
    full, tiles_n = M // tile.block_m, triton.cdiv(columns, tile.block_n)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _gated_tail_kernel[(full * tiles_n,)](
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(x, [tile.tail, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        out, out.stride(0), channel_scale, row_scale, out_inverse, M, columns, full, count, tiles_n,
        K_TILES=triton.cdiv(K, tile.block_k), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        TAIL=tile.tail, GROUP=tile.group, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return out
