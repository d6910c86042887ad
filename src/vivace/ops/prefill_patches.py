# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Pixels to SigLIP tokens: float32 accuracy from bfloat16 matrix units.

The originals keep the patch convolution in float32, where the matrix units are of no use. But an integer from 0 to 255 is
a bfloat16 number exactly, and a float32 weight is the sum of three. So with the scaling folded into the weights,

    W (p / 127.5 - 1) + b  =  p (Wh + Wm + Wl) + (b - sum W),      W / 127.5 = Wh + Wm + Wl

is one product of 3 * 588 columns with float32 sums. Float pixels need three parts too; of the nine products the six
largest are kept, what is left out is below float32 rounding. Position embeddings are a bias per token. One rounding, at
the end.

What is left is how the matrix unit adds: measured on an H100 against float64, 5.5e-6 relative (torch's float32 product:
4.3e-7), 300 times below the rounding to bfloat16 that follows. 15 us for three views; torch in float32 takes 135.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..errors import ShapeError
from .prefill_gemm import Tile, gemm

# which part of the pixel meets which part of the weight: 0 high, 1 middle, 2 low
UINT8_TERMS = ((0, 0), (0, 1), (0, 2))
FLOAT_TERMS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))


@dataclass(frozen=True)
class PatchWeights:
    """Constants of one pixel type.  weight [D, terms * columns] in parts; bias float32 [tokens, D] with the positions.

    columns   3 p p rounded up to a multiple of 8, the bulk copy engine's 16 bytes; the rest is zero
    """

    weight: Tensor
    bias: Tensor
    columns: int
    patch_size: int
    uint8: bool


def patch_weights(
    weight: Tensor, bias: Tensor, position: Tensor, *, uint8: bool, dtype: torch.dtype = torch.bfloat16
) -> PatchWeights:
    """weight float32 [D, 3 p p], bias float32 [D], position float32 [tokens, D]; `dtype` stores the parts."""
    wide = weight.double()
    constant = bias.double() - wide.sum(1) if uint8 else bias.double()
    parts = three_parts(wide / 127.5 if uint8 else wide)
    numbers = weight.shape[1]
    patch_size = math.isqrt(numbers // 3)
    columns = -(-numbers // 8) * 8
    terms = [part for _, part in (UINT8_TERMS if uint8 else FLOAT_TERMS)]
    packed = torch.zeros(weight.shape[0], len(terms), columns, dtype=dtype, device=weight.device)
    for index, part in enumerate(terms):
        packed[:, index, :numbers] = parts[part].to(dtype)
    return PatchWeights(packed.flatten(1), (position.double() + constant).float(), columns, patch_size, uint8)


def three_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as high + middle + low, each a bfloat16 number; the rest is below 2^-24 of x.  Any shape, dtype of x."""
    high = x.bfloat16().to(x.dtype)
    middle = (x - high).bfloat16().to(x.dtype)
    return high, middle, (x - high - middle).bfloat16().to(x.dtype)


@triton.jit
def _unfold_kernel(
    pixels, out, numbers, columns, SIDE: tl.constexpr, PATCH: tl.constexpr, UINT8: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One patch a program: gathered once, written once per term, in parts."""
    GRID: tl.constexpr = SIDE // PATCH
    token = tl.program_id(0)
    view, patch = token // (GRID * GRID), token % (GRID * GRID)
    corner = view * 3 * SIDE * SIDE + (patch // GRID) * PATCH * SIDE + (patch % GRID) * PATCH
    number = tl.arange(0, BLOCK)
    channel, inside = number // (PATCH * PATCH), number % (PATCH * PATCH)
    at = channel * SIDE * SIDE + (inside // PATCH) * SIDE + inside % PATCH
    if PDL:
        gdc_wait()  # the memory of `out` may still be in use by the kernel before
        gdc_launch_dependents()
    x = tl.load(pixels + corner + at, mask=number < numbers, other=0).to(tl.float32)
    mask = number < columns
    if UINT8:
        for term in tl.static_range(3):
            tl.store(out + (token * 3 + term) * columns + number, x.to(out.dtype.element_ty), mask=mask)
    else:
        high = x.to(tl.bfloat16).to(tl.float32)
        middle = (x - high).to(tl.bfloat16).to(tl.float32)
        low = x - high - middle
        to = out + token * 6 * columns + number
        tl.store(to, high.to(out.dtype.element_ty), mask=mask)
        tl.store(to + columns, high.to(out.dtype.element_ty), mask=mask)
        tl.store(to + 2 * columns, middle.to(out.dtype.element_ty), mask=mask)
        tl.store(to + 3 * columns, middle.to(out.dtype.element_ty), mask=mask)
        tl.store(to + 4 * columns, high.to(out.dtype.element_ty), mask=mask)
        tl.store(to + 5 * columns, low.to(out.dtype.element_ty), mask=mask)


def patch_embed(images: Tensor, weights: PatchWeights, *, dtype: torch.dtype, tile: Tile, pdl: bool = False) -> Tensor:
    """images contiguous [V, 3, s, s] -> tokens [V, (s/p)^2, D] with position embeddings, in `dtype`.

    images   uint8, meaning p / 127.5 - 1, or float32 in [-1, 1]; as `weights` was made for
    """
    V, side, patch_size = images.shape[0], images.shape[-1], weights.patch_size
    tokens = (side // patch_size) ** 2
    wanted = torch.uint8 if weights.uint8 else torch.float32
    if images.dtype != wanted or not images.is_contiguous():
        raise ShapeError(
            "pixels of another format", got=(images.dtype, images.stride()), wanted=f"{wanted}, contiguous"
        )
    rows = torch.empty(V * tokens, weights.weight.shape[1], dtype=weights.weight.dtype, device=images.device)
    numbers = 3 * patch_size**2
    _unfold_kernel[(V * tokens,)](
        images, rows, numbers, weights.columns, SIDE=side, PATCH=patch_size, UINT8=weights.uint8,
        BLOCK=triton.next_power_of_2(weights.columns), PDL=pdl, num_warps=4,
    )  # fmt: skip
    out = torch.empty(V * tokens, weights.weight.shape[0], dtype=dtype, device=images.device)
    gemm(rows, weights.weight, out, tile=tile, bias=weights.bias, pdl=pdl)
    return out.view(V, tokens, -1)
