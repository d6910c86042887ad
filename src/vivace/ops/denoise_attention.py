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
from .layers import AnyLinear, Fp8Linear


@dataclass(frozen=True)
class AttentionTile:
    """rows x keys of one program, and how many rows one combining program takes."""

    rows: int = 64
    keys: int = 64
    warps: int = 8
    combine_rows: int = 2
    combine_warps: int = 4
    parts: torch.dtype = torch.float32
    early: int = launch.LATE
    combine_early: int = launch.LATE
    carveout: int = launch.BY_DRIVER


@triton.jit(do_not_specialize=["S", "T"])
def _split_kernel(
    q, k, v, past_k, past_v, q_stride, k_stride, v_stride, past_k_stride, past_v_stride, mask, out, lse, S, T, score_scale,
    GROUP: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, key blocks, B * KV). Row r is token r // GROUP, head r % GROUP; keys are the past, then the own."""
    block, which = tl.program_id(1), tl.program_id(2)
    batch, kv = which // KV, which % KV
    keys, d = block * KEYS + tl.arange(0, KEYS), tl.arange(0, HEAD)
    inside, old = keys < S + T, keys < S
    seen = inside
    if mask is not None:
        seen = inside & (tl.load(mask + batch * (S + T) + keys, mask=inside, other=0) != 0)
    past_token, own_token = (batch * S + keys)[:, None], (batch * T + keys - S)[:, None]
    at = (kv * HEAD + d)[None, :]
    if block * KEYS + KEYS <= S:
        k_block = tl.load(past_k + past_token * past_k_stride + at)
        v_block = tl.load(past_v + past_token * past_v_stride + at)
        if PDL:
            if EARLY == 2:
                gdc_launch_dependents()
            gdc_wait()
    else:
        if PDL:
            if EARLY == 2:
                gdc_launch_dependents()
            gdc_wait()
        k_from = tl.where(old[:, None], past_k + past_token * past_k_stride, k + own_token * k_stride)
        v_from = tl.where(old[:, None], past_v + past_token * past_v_stride, v + own_token * v_stride)
        k_block = tl.load(k_from + at, mask=inside[:, None], other=0.0)
        v_block = tl.load(v_from + at, mask=inside[:, None], other=0.0)
    if PDL and EARLY == 1:
        gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = rows // GROUP, kv * GROUP + rows % GROUP
    q_at = ((batch * T + token) * q_stride + head * HEAD)[:, None] + d[None, :]
    q_block = tl.load(q + q_at, mask=(token < T)[:, None], other=0.0)
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
    if PDL and not EARLY:
        gdc_launch_dependents()
    none = weight == 0.0
    mixed = mixed / tl.where(none, 1.0, weight)[:, None]
    to = (which * tl.num_programs(1) + block) * (T * GROUP) + rows
    tl.store(out + to[:, None] * HEAD + d[None, :], mixed.to(out.dtype.element_ty), mask=(token < T)[:, None])
    tl.store(lse + to, tl.where(none, float("-inf"), safe + tl.log2(tl.where(none, 1.0, weight))), mask=token < T)


@triton.jit(do_not_specialize=["T"])
def _combine_kernel(
    parts, lse, out, out_scale, T, GROUP: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T * GROUP / ROWS), B * KV): softmax over the parts' log-sums, then their weighted sum in index order."""
    which = tl.program_id(1)
    batch, kv = which // KV, which % KV
    rows, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HEAD)
    inside = rows < T * GROUP
    first = which * BLOCKS * (T * GROUP) + rows
    if PDL:
        if EARLY == 2:
            gdc_launch_dependents()
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        top = tl.maximum(top, tl.load(lse + first + block * (T * GROUP), mask=inside, other=0.0))
    y = tl.zeros((ROWS, HEAD), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        at = first + block * (T * GROUP)
        share = tl.exp2(tl.load(lse + at, mask=inside, other=0.0) - top)
        mixed = tl.load(parts + at[:, None] * HEAD + d[None, :], mask=inside[:, None], other=0.0)
        y += share[:, None] * mixed.to(tl.float32)
        total += share
    if PDL and not EARLY:
        gdc_launch_dependents()
    y = y / total[:, None]
    token, head = rows // GROUP, kv * GROUP + rows % GROUP
    to = ((batch * T + token) * (KV * GROUP) + head)[:, None] * HEAD + d[None, :]
    tl.store(out + to, hand_over(y, out, out_scale), mask=inside[:, None])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: tuple[Tensor, Tensor],
    into: AnyLinear,
    tile: AttentionTile,
) -> Tensor:
    """Contract of `reference.attention` with a past. Tokens may have any stride (views of packed rows); heads are dense."""
    (B, T, N, head_dim), K, S = q.shape, k.shape[2], past[0].shape[1]
    group = N // K
    blocks = triton.cdiv(S + T, tile.keys)
    parts = torch.empty(B * K, blocks, T * group, head_dim, dtype=tile.parts, device=q.device)
    lse = torch.empty(B * K, blocks, T * group, dtype=torch.float32, device=q.device)
    mask = None if mask is None else mask.contiguous()
    quantised = isinstance(into, Fp8Linear)
    out = torch.empty(B, T, N * head_dim, dtype=torch.float8_e4m3fn if quantised else into.dtype, device=q.device)
    log2_e = 1.4426950408889634
    split = _split_kernel[(triton.cdiv(T * group, tile.rows), blocks, B * K)](
        q, k, v, *past, _stride(q), _stride(k), _stride(v), _stride(past[0]), _stride(past[1]), mask, parts, lse,
        S, T, head_dim**-0.5 * log2_e,
        GROUP=group, KV=K, HEAD=head_dim, ROWS=tile.rows, KEYS=tile.keys,
        **launch.options(q, warps=tile.warps, early=tile.early),
    )  # fmt: skip
    combine = _combine_kernel[(triton.cdiv(T * group, tile.combine_rows), B * K)](
        parts, lse, out, into.input_scale if quantised else None, T, GROUP=group, KV=K, HEAD=head_dim,
        ROWS=tile.combine_rows, BLOCKS=blocks, **launch.options(q, warps=tile.combine_warps, early=tile.combine_early),
    )  # fmt: skip
    launch.share(split, tile.carveout)
    launch.share(combine, tile.carveout)
    return out


def _stride(x: Tensor) -> int:
    """Elements from one token of [B, T, heads, head_dim] to the next, also across the batch."""
    dense = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    if not dense or (x.shape[0] > 1 and x.stride(0) != x.stride(1) * x.shape[1]):
        raise ShapeError(
            "the attention kernel cannot read this layout", got=x.stride(), wanted="dense heads, dense batch"
        )
    return x.stride(1)
