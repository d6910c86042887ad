# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention of the prefix and of SigLIP in Triton, reading and writing the layouts that the products around it use.

Prefix: 8 query heads share one key/value head, so the queries of a group, taken token by token, are simply the rows of one
matrix [T * 8, 256] in memory, and so are the results. A key mask costs one byte per key; cuDNN and flash take no boolean
mask together with grouped queries.

SigLIP: head dim 72 is no power of two. It is read as 64 + 16 columns, of which the last 8 are zero: 80 in place of 128.
q, k, v are strided views of the packed projection, and the result lands where the output projection reads it.

Numerics: scores and softmax stay float32 (the eager reference rounds scores to bfloat16); probabilities are rounded to
the values' dtype before the second product.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from .prefill_gemm import as_stored

LOG2_E = 1.4426950408889634
# finite, so that a block of masked keys gives numbers; the next block with a valid key rescales them to zero
MASKED = tl.constexpr(-1.0e30)


@dataclass(frozen=True)
class AttentionTile:
    """block_m rows (token x head) by block_n keys.

    stages   two or more: with one, Triton 3.6 reads through descriptors out of bounds (illegal access on an H100)
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


@triton.jit
def _attention_kernel(
    q, k, v, k_stride, v_stride, k_end, v_end, mask, out, out_inverse, q_batch, q_token, k_rows, v_rows, out_batch,
    rows_in_all, keys, score_scale,
    KEY_BLOCKS: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    BULK: tl.constexpr, PDL: tl.constexpr, ahead, ahead_bytes, ahead_turns, AHEAD_LINES: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, B * KV_HEADS).  Row r of a group is head r % GROUP of token r // GROUP.

    Keys and values: rows [.., KV_HEADS * HEAD_DIM] of all batches together, so many as k_end and v_end say.
    """
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < rows_in_all
    columns = tl.arange(0, HEAD_DIM)
    token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    if AHEAD_LINES > 0:
        fetch_ahead(ahead, ahead_bytes, ahead_turns, AHEAD_LINES)
    if PDL:
        gdc_wait()
    at = (token * q_token + head * HEAD_DIM)[:, None] + columns[None, :]
    queries = tl.load(q + batch * q_batch + at, mask=in_rows[:, None], other=0.0)
    first_key, first_value, column = batch * k_rows, batch * v_rows, kv_head * HEAD_DIM
    key = tl.arange(0, BLOCK_N)
    seen = key < keys
    if MASKED_KEYS:
        seen = tl.load(mask + batch * keys + key, mask=seen, other=0) != 0
    top = tl.full((BLOCK_M,), MASKED, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), dtype=tl.float32)
    for block in tl.range(0, KEY_BLOCKS):
        row = first_key + block * BLOCK_N
        shown = block_of(k, row, column, k_end, 0, k_stride, BULK, True, BLOCK_N, HEAD_DIM)
        scores = tl.dot(queries, shown.T, input_precision=PRECISION)
        scores = tl.where(seen[None, :], scores * score_scale, MASKED)
        # which keys the next block shows is read now: in the next turn it would be waited for
        key += BLOCK_N
        seen = key < keys
        if MASKED_KEYS:
            seen = tl.load(mask + batch * keys + key, mask=seen, other=0) != 0
        new_top = tl.maximum(top, tl.max(scores, 1))
        correction = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * correction + tl.sum(weights, 1)
        top = new_top
        row = first_value + block * BLOCK_N
        values = block_of(v, row, column, v_end, 0, v_stride, BULK, True, BLOCK_N, HEAD_DIM)
        acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision=PRECISION)
    if PDL:
        gdc_launch_dependents()
    acc = as_stored(acc / total[:, None], out_inverse, out.dtype.element_ty)
    to = out + batch * out_batch + ((token * KV_HEADS * GROUP + head) * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(to, acc, mask=in_rows[:, None])


@triton.jit
def _vision_kernel(
    qkv, main_rows, rest_rows, all_rows, out, out_inverse, token_stride, out_view, out_token, tokens, score_scale,
    KEY_BLOCKS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr, PDL: tl.constexpr,
    ahead, ahead_bytes, ahead_turns, AHEAD_LINES: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, V * HEADS).  HEAD_DIM = MAIN + a part of REST; MAIN and REST are powers of two.

    Keys and values are read from all rows [V * T, 3 D] together. What a block of REST columns holds beyond the
    head belongs to the next one: queries are zero there, and such columns of the result are not stored.
    """
    view, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    column = head * HEAD_DIM
    width: tl.constexpr = HEADS * HEAD_DIM
    columns: tl.constexpr = 3 * width
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
    in_rows, in_rest = (rows < tokens)[:, None], (rest < HEAD_DIM)[None, :]
    if AHEAD_LINES > 0:
        fetch_ahead(ahead, ahead_bytes, ahead_turns, AHEAD_LINES)
    if PDL:
        gdc_wait()
    at = qkv + column + (view * tokens + rows)[:, None] * token_stride
    q_main = tl.load(at + main[None, :], mask=in_rows, other=0.0)
    q_rest = tl.load(at + rest[None, :], mask=in_rows & in_rest, other=0.0)
    top = tl.full((BLOCK_M,), MASKED, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_main = tl.zeros((BLOCK_M, MAIN), dtype=tl.float32)
    acc_rest = tl.zeros((BLOCK_M, REST), dtype=tl.float32)
    for block in tl.range(0, KEY_BLOCKS):
        first = view * tokens + block * BLOCK_N
        side = width + column
        keys = block_of(main_rows, first, side, all_rows, columns, token_stride, BULK, True, BLOCK_N, MAIN)
        scores = tl.dot(q_main, keys.T, input_precision=PRECISION)
        keys_rest = block_of(rest_rows, first, side + MAIN, all_rows, columns, token_stride, BULK, False, BLOCK_N, REST)
        scores = tl.dot(q_rest, keys_rest.T, scores, input_precision=PRECISION) * score_scale
        # rows beyond this view's tokens are the next view's: finite, and their weight is zero
        scores = tl.where((block * BLOCK_N + tl.arange(0, BLOCK_N) < tokens)[None, :], scores, MASKED)
        new_top = tl.maximum(top, tl.max(scores, 1))
        correction = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * correction + tl.sum(weights, 1)
        top = new_top
        side = 2 * width + column
        values = block_of(main_rows, first, side, all_rows, columns, token_stride, BULK, True, BLOCK_N, MAIN)
        rounded = weights.to(values.dtype)
        acc_main = tl.dot(rounded, values, acc_main * correction[:, None], input_precision=PRECISION)
        values = block_of(rest_rows, first, side + MAIN, all_rows, columns, token_stride, BULK, False, BLOCK_N, REST)
        acc_rest = tl.dot(rounded, values, acc_rest * correction[:, None], input_precision=PRECISION)
    if PDL:
        gdc_launch_dependents()
    to = out + view * out_view + column + rows[:, None] * out_token
    acc_main = as_stored(acc_main / total[:, None], out_inverse, out.dtype.element_ty)
    acc_rest = as_stored(acc_rest / total[:, None], out_inverse, out.dtype.element_ty)
    tl.store(to + main[None, :], acc_main, mask=in_rows)
    tl.store(to + rest[None, :], acc_rest, mask=in_rows & in_rest)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    tile: AttentionTile,
    mask: Tensor | None = None,
    out_inverse: Tensor | None = None,
    pdl: bool = False,
    ahead: Ahead = None,
) -> Tensor:
    """q [B, T, N, d], k and v [B, S, K, d], mask bool [B, S] or None, out [B, T, N * d]; heads contiguous in each.

    ahead  see `prefill_ahead`
    """
    assert tile.stages >= 2, tile
    B, T, N, head_dim = q.shape
    S, K = k.shape[1], k.shape[2]
    rows = T * (N // K)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    grid, bulk = (triton.cdiv(rows, tile.block_m), B * K), blocks.bulk_copies(q.device)
    keys, values = _rows_of(k), _rows_of(v)
    _attention_kernel[grid](
        q, *(source(each, [tile.block_n, head_dim], bulk=bulk) for each in (keys, values)),
        keys.stride(0), values.stride(0), keys.shape[0], values.shape[0],
        mask.contiguous().view(torch.uint8) if mask is not None else q, out, out_inverse,
        q.stride(0), q.stride(1), k.stride(0) // k.stride(1), v.stride(0) // v.stride(1),
        out.stride(0), rows, S, head_dim**-0.5 * LOG2_E,
        KEY_BLOCKS=_key_blocks(S, tile), GROUP=N // K, KV_HEADS=K, HEAD_DIM=head_dim, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, MASKED_KEYS=mask is not None, PRECISION=_precision(q), BULK=bulk, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, **options,
        **ahead_options(ahead, programs=grid[0] * grid[1], warps=tile.warps),
    )  # fmt: skip
    return out


def vision_attention(
    qkv: Tensor,
    out: Tensor,
    *,
    heads: int,
    tile: AttentionTile,
    out_inverse: Tensor | None = None,
    pdl: bool = False,
    ahead: Ahead = None,
) -> Tensor:
    """qkv contiguous [V, T, 3 D] = q | k | v, out [V, T, D]; every view sees itself alone."""
    assert tile.stages >= 2, tile
    V, T, packed = qkv.shape
    head_dim = packed // 3 // heads
    main, rest = split_head_dim(head_dim)
    rows = qkv.view(V * T, packed)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    grid, bulk = (triton.cdiv(T, tile.block_m), V * heads), blocks.bulk_copies(qkv.device)
    _vision_kernel[grid](
        rows, *(source(rows, [tile.block_n, width], bulk=bulk) for width in (main, rest)), V * T, out, out_inverse,
        rows.stride(0), out.stride(0), out.stride(1), T, head_dim**-0.5 * LOG2_E,
        KEY_BLOCKS=_key_blocks(T, tile), HEADS=heads, HEAD_DIM=head_dim, MAIN=main, REST=rest,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, PRECISION=_precision(qkv), BULK=bulk, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, **options,
        **ahead_options(ahead, programs=grid[0] * grid[1], warps=tile.warps),
    )  # fmt: skip
    return out


def _rows_of(x: Tensor) -> Tensor:
    """[B, S, K, d] as rows [.., K * d]; batch b starts at row b * S'."""
    B, S, K, head_dim = x.shape
    token = x.stride(1)
    if x.stride(3) != 1 or (K > 1 and x.stride(2) != head_dim) or (B > 1 and x.stride(0) % token):
        raise ShapeError("keys or values cannot be read as rows", got=x.stride(), wanted="heads contiguous in a token")
    rows = (B - 1) * (x.stride(0) // token) + S
    return x.as_strided((rows, K * head_dim), (token, 1))


def _key_blocks(keys: int, tile: AttentionTile) -> int:
    """Turns of the key loop, never one: a loop of one turn has no pipeline, and fails as one stage does (`AttentionTile`).

    The keys of a turn beyond the last are all masked: their weights are zero.
    """
    return max(2, -(-keys // tile.block_n))


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Largest power of two below `head_dim`, and one >= 16 that holds the rest: 72 -> (64, 16). At least 24: (16, 16)."""
    main = 1 << (head_dim.bit_length() - 1)
    if main == head_dim:
        main //= 2
    return main, max(16, triton.next_power_of_2(head_dim - main))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
