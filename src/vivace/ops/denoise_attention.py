# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: ANN001, ANN202
"""Attention of a few action tokens over the prefix cache and themselves: split over keys, then combined in a fixed order.

All query heads of one key/value head are rows of one matrix, so K and V are read once per row block and never repeated.
A program owns (row block, key block): 50 tokens x 8 heads against 1,018 keys are 7 x 16 programs, enough for the chip.
Prefix keys and values are constants of the request and are loaded before the wait; own keys come from the predecessor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..errors import ShapeError
from . import launch
from .denoise_gemm import hand_over
from .layers import Fp8Linear, Linear


@dataclass(frozen=True)
class AttentionTile:
    """rows x keys of one program, and how many rows one combining program takes."""

    rows: int = 64
    keys: int = 64
    warps: int = 8
    combine_rows: int = 2
    combine_warps: int = 4
    parts: torch.dtype = torch.float32


@triton.jit(do_not_specialize=["S", "T", "prefix_blocks"])
def _split_kernel(
    q, k, v, past_k, past_v, q_stride, k_stride, v_stride, past_k_stride, past_v_stride, mask, out, lse,
    S, T, prefix_blocks, score_scale,
    GROUP: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PDL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, key blocks, B * KV). Row r is token r // GROUP, head r % GROUP of this key/value head."""
    block, which = tl.program_id(1), tl.program_id(2)
    batch, kv = which // KV, which % KV
    own = block >= prefix_blocks
    count = tl.where(own, T, S)
    keys = tl.where(own, block - prefix_blocks, block) * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, HEAD)
    seen = keys < count
    if mask is not None:
        seen = seen & (tl.load(mask + batch * (S + T) + tl.where(own, S, 0) + keys, mask=seen, other=0) != 0)
    if own:
        if PDL:
            gdc_wait()
        token, at = (batch * T + keys)[:, None], (kv * HEAD + d)[None, :]
        k_block = tl.load(k + token * k_stride + at, mask=(keys < count)[:, None], other=0.0)
        v_block = tl.load(v + token * v_stride + at, mask=(keys < count)[:, None], other=0.0)
    else:
        token, at = (batch * S + keys)[:, None], (kv * HEAD + d)[None, :]
        k_block = tl.load(past_k + token * past_k_stride + at, mask=(keys < count)[:, None], other=0.0)
        v_block = tl.load(past_v + token * past_v_stride + at, mask=(keys < count)[:, None], other=0.0)
        if PDL:
            gdc_wait()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of, head = rows // GROUP, kv * GROUP + rows % GROUP
    q_at = ((batch * T + of) * q_stride + head * HEAD)[:, None] + d[None, :]
    q_block = tl.load(q + q_at, mask=(of < T)[:, None], other=0.0)
    if INTERPRET:
        scores = tl.dot(q_block.to(tl.float32), tl.trans(k_block.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q_block, tl.trans(k_block), input_precision="ieee")
    scores = tl.where(seen[None, :], scores * score_scale, float("-inf"))
    top = tl.max(scores, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(scores - safe[:, None])
    weight = tl.sum(p, 1)
    if INTERPRET:
        mixed = tl.dot(p, v_block.to(tl.float32), input_precision="ieee")
    else:
        mixed = tl.dot(p.to(v_block.dtype), v_block, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    mixed = mixed / tl.where(weight == 0.0, 1.0, weight)[:, None]
    to = (which * tl.num_programs(1) + block) * (T * GROUP) + rows
    tl.store(out + to[:, None] * HEAD + d[None, :], mixed.to(out.dtype.element_ty), mask=(of < T)[:, None])
    tl.store(lse + to, tl.where(weight == 0.0, float("-inf"), safe + tl.log2(weight)), mask=of < T)


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def _combine_kernel(
    parts, lse, out, out_scale, T, BLOCKS,
    GROUP: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    PDL: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T * GROUP / ROWS), B * KV): softmax over the parts' log-sums, then their weighted sum in index order."""
    which = tl.program_id(1)
    batch, kv = which // KV, which % KV
    rows, blocks, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED), tl.arange(0, HEAD)
    inside = (blocks < BLOCKS)[:, None] & (rows < T * GROUP)[None, :]
    at = (which * BLOCKS + blocks)[:, None] * (T * GROUP) + rows[None, :]
    if PDL:
        gdc_wait()
    sums = tl.load(lse + at, mask=inside, other=float("-inf"))
    mixed = tl.load(parts + at[:, :, None] * HEAD + d[None, None, :], mask=inside[:, :, None], other=0.0)
    if PDL:
        gdc_launch_dependents()
    top = tl.max(sums, 0)
    share = tl.exp2(sums - tl.where(top == float("-inf"), 0.0, top)[None, :])
    share = share / tl.sum(share, 0)[None, :]
    y = tl.sum(mixed.to(tl.float32) * share[:, :, None], 0)
    token, head = rows // GROUP, kv * GROUP + rows % GROUP
    to = ((batch * T + token) * (KV * GROUP) + head)[:, None] * HEAD + d[None, :]
    tl.store(out + to, hand_over(y, out, out_scale), mask=(rows < T * GROUP)[:, None])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: tuple[Tensor, Tensor],
    into: Linear | Fp8Linear,
    tile: AttentionTile,
) -> Tensor:
    """Contract of `reference.attention` with a past. Tokens may have any stride (views of packed rows); heads are dense."""
    (B, T, N, head_dim), K, S = q.shape, k.shape[2], past[0].shape[1]
    group = N // K
    prefix_blocks = triton.cdiv(S, tile.keys)
    blocks = prefix_blocks + triton.cdiv(T, tile.keys)
    parts = torch.empty(B * K, blocks, T * group, head_dim, dtype=tile.parts, device=q.device)
    lse = torch.empty(B * K, blocks, T * group, dtype=torch.float32, device=q.device)
    quantised = isinstance(into, Fp8Linear)
    out = torch.empty(B, T, N * head_dim, dtype=torch.float8_e4m3fn if quantised else into.dtype, device=q.device)
    log2_e = 1.4426950408889634
    _split_kernel[(triton.cdiv(T * group, tile.rows), blocks, B * K)](
        q, k, v, *past, _stride(q), _stride(k), _stride(v), _stride(past[0]), _stride(past[1]), mask, parts, lse,
        S, T, prefix_blocks, head_dim**-0.5 * log2_e,
        GROUP=group, KV=K, HEAD=head_dim, ROWS=tile.rows, KEYS=tile.keys, **launch.options(q, warps=tile.warps),
    )  # fmt: skip
    _combine_kernel[(triton.cdiv(T * group, tile.combine_rows), B * K)](
        parts, lse, out, into.input_scale if quantised else None, T, blocks, GROUP=group, KV=K, HEAD=head_dim,
        ROWS=tile.combine_rows, PADDED=triton.next_power_of_2(blocks), **launch.options(q, warps=tile.combine_warps),
    )  # fmt: skip
    return out


def _stride(x: Tensor) -> int:
    """Elements from one token of [B, T, heads, head_dim] to the next, also across the batch."""
    dense = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    if not dense or (x.shape[0] > 1 and x.stride(0) != x.stride(1) * x.shape[1]):
        raise ShapeError(
            "the attention kernel cannot read this layout", got=x.stride(), wanted="dense heads, dense batch"
        )
    return x.stride(1)
