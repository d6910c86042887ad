# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Pixels to SigLIP tokens in one kernel: cut patches, scale uint8, multiply, add bias and position, round once.

A patch row has 3 * 14 * 14 = 588 numbers. They are gathered from the image while the product runs, so neither the float
image nor the matrix of patches ever lies in memory.

Numerics: float32, as the originals keep it. The matrix unit multiplies TF32; "tf32x3" adds the two correction products
that bring the result back to float32 rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _patch_kernel(
    pixels, weight, bias, position, out, M, N, K,
    SIDE: tl.constexpr, PATCH: tl.constexpr, UINT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, K_TILES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column tiles).  Token m is patch m % (SIDE/PATCH)^2 of view m // (SIDE/PATCH)^2, row-major."""
    GRID: tl.constexpr = SIDE // PATCH
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    view, patch = rows // (GRID * GRID), rows % (GRID * GRID)
    corner = view * 3 * SIDE * SIDE + (patch // GRID) * PATCH * SIDE + (patch % GRID) * PATCH
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if PDL:
        gdc_wait()
    for step in tl.range(0, K_TILES):
        number = step * BLOCK_K + tl.arange(0, BLOCK_K)
        channel, inside = number // (PATCH * PATCH), number % (PATCH * PATCH)
        at = channel * SIDE * SIDE + (inside // PATCH) * SIDE + inside % PATCH
        mask = (rows < M)[:, None] & (number < K)[None, :]
        block = tl.load(pixels + corner[:, None] + at[None, :], mask=mask, other=0)
        if UINT8:
            block = tl.where(mask, block.to(tl.float32) / 255.0 * 2.0 - 1.0, 0.0)
        mask = (columns < N)[None, :] & (number < K)[:, None]
        kernel = tl.load(weight + columns[None, :] * K + number[:, None], mask=mask, other=0.0)
        acc = tl.dot(block, kernel, acc, input_precision=PRECISION)
    if PDL:
        gdc_launch_dependents()
    acc += tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    acc += tl.load(position + patch[:, None] * N + columns[None, :], mask=mask, other=0.0)
    tl.store(out + rows[:, None] * N + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    *,
    dtype: torch.dtype,
    patch_size: int = 14,
    pdl: bool = False,
) -> Tensor:
    """images [V, 3, s, s] contiguous, uint8 (value / 255 * 2 - 1) or float32 in [-1, 1] -> tokens [V, (s/p)^2, D].

    weight    float32 [D, 3 p p], columns channel, row, column      bias float32 [D]      position float32 [(s/p)^2, D]
    dtype     of the result: bias and position are added in float32, then it is rounded once
    """
    V, side, tokens = images.shape[0], images.shape[-1], (images.shape[-1] // patch_size) ** 2
    N, K = weight.shape
    out = torch.empty(V, tokens, N, dtype=dtype, device=images.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    block_m, block_n, block_k = 64, 64, 32
    _patch_kernel[(triton.cdiv(V * tokens, block_m), triton.cdiv(N, block_n))](
        images, weight, bias, position, out, V * tokens, N, K,
        SIDE=side, PATCH=patch_size, UINT8=images.dtype == torch.uint8, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, K_TILES=triton.cdiv(K, block_k), PRECISION="tf32x3", PDL=pdl, num_warps=4, num_stages=3,
        **options,
    )  # fmt: skip
    return out
