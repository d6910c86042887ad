# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN202, SIM108
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Row-wise kernels between the products of the prefill: residual + norm (+ quantise), GeGLU, rotary embedding.

One program owns one row (or a piece of it), reads it once, keeps it in float32 registers, and writes once. With
`out_inverse` (float32 [1] = 1 / scale) the result is E4M3 or INT8. `channel_scale` finishes a product that its kernel left
unscaled: cuBLAS is fastest with one scale per tensor, and the scale per output channel is free here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .prefill_ahead import Ahead, ahead_options, fetch_ahead
from .prefill_gemm import as_stored, gelu_tanh
from .reference import NORM_EPS


@triton.jit(do_not_specialize=["M", "ahead_turns"])
def _norm_kernel(
    parts, channel_scale, bias, residual, total, gain, shift, out, out_inverse, M, D, eps,
    PARTS: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, ahead, ahead_bytes,
    ahead_turns, AHEAD_LINES: tl.constexpr,
):  # fmt: skip
    """Row: sum of parts in order, scaled, + bias, rounded to the residual's dtype, + residual, stored; then the norm."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < D
    # weights do not depend on the kernel before: they may be read while it still runs
    weight = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        offset = tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        constant = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if AHEAD_LINES > 0:
        fetch_ahead(ahead, ahead_bytes, ahead_turns, AHEAD_LINES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.load(residual + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        branch = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            branch += tl.load(parts + (part * M + row) * D + columns, mask=inside, other=0.0).to(tl.float32)
        if channel_scale is not None:
            branch *= tl.load(channel_scale + columns, mask=inside, other=0.0)
        if bias is not None:
            branch += constant
        rounded = (y + branch.to(residual.dtype.element_ty).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * D + columns, rounded, mask=inside)
        y = rounded.to(tl.float32)
    if MEAN:
        y = tl.where(inside, y - tl.sum(y, 0) / D, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps)
    if MEAN:
        y = y * weight + offset
    else:
        y = y * (1.0 + weight)
    tl.store(out + row * D + columns, as_stored(y, out_inverse, out.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_kernel(packed, channel_scale, out, out_inverse, F, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row, columns = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = packed + row * 2 * F + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    if channel_scale is not None:
        gate *= tl.load(channel_scale + columns, mask=inside, other=0.0)
        up *= tl.load(channel_scale + F + columns, mask=inside, other=0.0)
    tl.store(out + row * F + columns, as_stored(gelu_tanh(gate) * up, out_inverse, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rope_rows"])
def _rope_kernel(
    packed, channel_scale, q, k, v, cos_table, sin_table, q_stride, k_stride, v_stride, rope_rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, ROUND_HEADS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program per token: all heads as a block [heads, half]; half a power of two."""
    total: tl.constexpr = HEADS + 2 * KV_HEADS
    row, head, column = tl.program_id(0), tl.arange(0, ROUND_HEADS)[:, None], tl.arange(0, HALF)[None, :]
    angle, at = (row % rope_rows) * HALF + column, head * 2 * HALF + column
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cos, sin = tl.load(cos_table + angle).to(tl.float32), tl.load(sin_table + angle).to(tl.float32)
    base = packed + row * total * 2 * HALF + at
    first = tl.load(base, mask=head < total, other=0.0).to(tl.float32)
    second = tl.load(base + HALF, mask=head < total, other=0.0).to(tl.float32)
    if channel_scale is not None:
        first *= tl.load(channel_scale + at, mask=head < total, other=0.0)
        second *= tl.load(channel_scale + at + HALF, mask=head < total, other=0.0)
    turned = head < HEADS + KV_HEADS
    left = tl.where(turned, first * cos - second * sin, first).to(k.dtype.element_ty)
    right = tl.where(turned, second * cos + first * sin, second).to(k.dtype.element_ty)
    if HEADS > 0:
        tl.store(q + row * q_stride + at, left, mask=head < HEADS)
        tl.store(q + row * q_stride + at + HALF, right, mask=head < HEADS)
    to, mine = k + row * k_stride + at - HEADS * 2 * HALF, (head >= HEADS) & turned
    tl.store(to, left, mask=mine)
    tl.store(to + HALF, right, mask=mine)
    to, mine = v + row * v_stride + at - (HEADS + KV_HEADS) * 2 * HALF, (head >= HEADS + KV_HEADS) & (head < total)
    tl.store(to, left, mask=mine)
    tl.store(to + HALF, right, mask=mine)


def _options(width: int, pdl: bool) -> dict[str, Any]:
    """Launch options: 8 warps from 4,096 elements a program on."""
    return {"num_warps": 4 if width < 4096 else 8, "PDL": pdl, **({"launch_pdl": True} if pdl else {})}


def residual_norm(
    residual: Tensor,
    gain: Tensor,
    out: Tensor,
    *,
    shift: Tensor | None = None,
    parts: Tensor | None = None,
    channel_scale: Tensor | None = None,
    bias: Tensor | None = None,
    total: Tensor | None = None,
    out_inverse: Tensor | None = None,
    warps: int | None = None,
    pdl: bool = False,
    ahead: Ahead = None,
) -> Tensor:
    """total = residual + sum(parts) * channel_scale + bias, then its norm to `out`.  All [M, D] contiguous.

    parts  [P, M, D], added in order, or None: the norm of `residual` alone, and `total` is not written
    shift  [D]: LayerNorm with gain and shift; None: RMSNorm with gain 1 + gain
    warps  None: 8 from 2,048 columns on (968 rows: 3.5 us against 3.8 with 4), else 2 (768 x 1,152: 2.5 against 2.9)
    ahead  see `prefill_ahead`
    """
    M, D = residual.shape
    block = triton.next_power_of_2(D)
    warps = warps or (8 if D >= 2048 else 2)
    _norm_kernel[(M,)](
        parts, channel_scale, bias, residual, total, gain, shift, out, out_inverse, M, D, NORM_EPS,
        PARTS=0 if parts is None else parts.shape[0], MEAN=shift is not None, BLOCK=block,
        **(_options(D, pdl) | {"num_warps": warps}), **ahead_options(ahead, programs=M, warps=warps),
    )  # fmt: skip
    return out


def geglu(
    packed: Tensor,
    out: Tensor,
    *,
    channel_scale: Tensor | None = None,
    out_inverse: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """gelu(gate) * up.  packed contiguous [M, 2F] = gate | up -> out [M, F]."""
    M, F = out.shape
    block = 2048
    grid = (triton.cdiv(F, block), M)
    _geglu_kernel[grid](packed, channel_scale, out, out_inverse, F, block, **_options(block, pdl))
    return out


def rope_split(
    packed: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    tables: tuple[Tensor, Tensor],
    heads: tuple[int, int, int],
    channel_scale: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Rotate and separate a packed projection.

    packed contiguous [M, (N + 2K) * d]; q [M, N * d], k, v [M, K * d], any row stride; tables cos, sin [R, d/2]
    """
    num_heads, kv_heads, head_dim = heads
    total = num_heads + 2 * kv_heads
    cos, sin = tables
    _rope_kernel[(packed.shape[0],)](
        packed, channel_scale, q, k, v, cos, sin, q.stride(0) if q is not None else 0, k.stride(0), v.stride(0),
        cos.shape[0], HEADS=num_heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
        ROUND_HEADS=triton.next_power_of_2(total), **_options(total * head_dim, pdl),
    )  # fmt: skip


def new_rows(like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [M, columns] on the device of `like` [M, ...]."""
    return torch.empty(like.shape[0], columns, dtype=dtype, device=like.device)
