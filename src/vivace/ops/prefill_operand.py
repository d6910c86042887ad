"""What a product of the prefill reads, and cuBLAS' way to run it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .layers import AnyLinear


@dataclass(frozen=True)
class Operand:
    """The input of one product.  M rows of K values; N = weight rows.

    rows     [M, K] in the format of the weight
    channel  float32 [N], 8 bits alone: weight scale times static input scale, or the weight scale where `own` is given
    own      float32 [M, 1], a scale per row, or None
    """

    rows: Tensor
    channel: Tensor | None
    own: Tensor | None


def blas(given: Operand, layer: AnyLinear, *, ones: Tensor, finished: bool) -> tuple[Tensor, Tensor | None]:
    """cuBLASLt: bfloat16 [M, N], and the channel scales that are left to the next kernel.

    ones      float32 [R, 1]: row scales that cuBLAS asks for beside channel scales
    finished  with bias and all scales. Else the bias is left too, and channel scales unless rows have their own
    """
    rows, channel, bias = given.rows, given.channel, layer.bias if finished else None
    if channel is None:
        return functional.linear(rows, layer.weight, bias), None
    if given.own is not None:
        return _scaled(rows, layer, given.own, channel[None], bias), None
    if finished:
        return _scaled(rows, layer, _first(ones, rows.shape[0]), channel[None], bias), None
    return _scaled(rows, layer, ones[0], ones[0], None), channel


def _scaled(rows: Tensor, layer: AnyLinear, of_rows: Tensor, of_channels: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch._scaled_mm(
        rows, layer.weight.t(), scale_a=of_rows, scale_b=of_channels, bias=bias, out_dtype=layer.dtype,
        use_fast_accum=True,
    )  # fmt: skip
    return out


def _first(ones: Tensor, rows: int) -> Tensor:
    """That many ones. Beyond the table they are filled anew, a few us beside a product of that size."""
    return ones[:rows] if rows <= ones.shape[0] else ones.new_ones(rows, 1)
