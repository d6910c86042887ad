# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rows into E4M3 with a scale each, in front of a product whose plan asks for that.

A kernel of its own, one program per token: what makes the rows of o and down cuts them into pieces, and no piece knows the
largest value of the whole row. One launch and one pass more for each product, which is why static scales are the rule.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .layers import AnyLinear, RowFp8Linear
from .reference import SMALLEST_SCALE
from .saturate import saturated

KERNEL = "triton row scales"
"""What coverage calls it, beside the kernel of the product."""


@triton.jit
def _rows_kernel(x, out, scales, K, smallest, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (rows)."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < K
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.load(x + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(y), 0) / 448.0, smallest)
    tl.store(scales + row, scale)
    tl.store(out + row * K + columns, saturated(y / scale).to(out.dtype.element_ty), mask=inside)


def quantise(x: Tensor, *, pdl: bool) -> tuple[Tensor, Tensor]:
    """x [M, K] contiguous -> (E4M3 [M, K], float32 [M, 1]), as `reference.rows_to_e4m3`. A NaN stays one."""
    M, K = x.shape
    out = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    block = triton.next_power_of_2(K)
    warps = 4 if block <= 2048 else 8 if block <= 4096 else 16
    _rows_kernel[(M,)](x, out, scales, K, SMALLEST_SCALE, BLOCK=block, PDL=pdl, num_warps=warps, **options)
    return out, scales


def operand(x: Tensor, layer: AnyLinear, *, pdl: bool) -> tuple[Tensor, Tensor | None]:
    """x [M, K] in the format that `layer`'s product reads, and the row scales [M, 1] if its rows have their own."""
    return quantise(x, pdl=pdl) if isinstance(layer, RowFp8Linear) else (x, None)
