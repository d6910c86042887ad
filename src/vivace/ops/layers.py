"""What an operation is given: small modules that hold weights, and nothing about how they are applied.

A precision plan swaps a `Linear` for another holder with the same `name`; the operation table decides what to do with it.
`name` is the canonical tensor name without ".weight" (packed layers list their parts), used by coverage and errors.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T + b.  weight [out, in], bias [out] or None."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, name: str, bias: bool = False) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which it takes and gives activations."""
        return self.weight.dtype


class QuantisedLinear(nn.Module):
    """The same product with 8-bit weights and inputs: y = input_scale * weight_scale[n] * (x8 W8^T) + b.

    `Fp8Linear`, `RowFp8Linear` or `Int8Linear`. Kernels of the denoise loop know the first two, those of the prefill all.

    weight        [out, in] in the format of the class
    weight_scale  float32 [out]: one scale per output channel (a per-tensor plan repeats one value)
    input_scale   float32 [1], static: x = x8 * input_scale. Whoever makes x stores x8 right away (see `ops.table`)
    step_scales   float32 [S, 4] or None: such a scale for each of S denoise steps, in the first column (a kernel wants
                  addresses of 16 bytes); `input_scale` is then the largest, for what belongs to no step
    bias          as in the layer it replaces, or None
    dtype         dtype of the result: that of the layer it replaces

    Made by `precision.quantize`; it never exists during loading.
    """

    stored: ClassVar[torch.dtype]
    largest: ClassVar[float]  # the largest value of a group lands on it

    def __init__(
        self,
        name: str,
        weight: Tensor,
        *,
        weight_scale: Tensor,
        input_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype = torch.bfloat16,
        step_scales: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.dtype = dtype
        self.of_step: int | None = None  # what `at_step` returned knows its step
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        self.input_scale = nn.Parameter(input_scale, requires_grad=False)
        self.step_scales = None if step_scales is None else nn.Parameter(step_scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def steps(self) -> int:
        """Of how many denoise steps it has own input scales; 0: one scale for all."""
        return 0 if self.step_scales is None else self.step_scales.shape[0]

    def at_step(self, step: int) -> Self:
        """The same layer as denoise step `step` uses it: the same memory, that step's input scale."""
        if self.step_scales is None:
            return self
        used = copy.copy(self)  # the same parameters, one of them exchanged: a tenth of the time of a new module
        own = nn.Parameter(self.step_scales[step, :1], requires_grad=False)
        used._parameters = {**self._parameters, "input_scale": own, "step_scales": None}
        used.of_step = step
        return used


@final
class Fp8Linear(QuantisedLinear):
    """E4M3: 3 bits of mantissa, values to 448 scales."""

    stored = torch.float8_e4m3fn
    largest = 448.0


@final
class RowFp8Linear(QuantisedLinear):
    """E4M3 with a scale per token, found while running: x[m] = x8[m] * row_scale[m], the largest |x[m]| lands on 448.

    It is handed x in `dtype`, like a plain linear, and rounds it itself. Its `input_scale` is 1 and no step has another.
    """

    stored = torch.float8_e4m3fn
    largest = 448.0


@final
class Int8Linear(QuantisedLinear):
    """INT8, symmetric: whole numbers of scales, -128 to 127."""

    stored = torch.int8
    largest = 127.0


AnyLinear = Linear | Fp8Linear | RowFp8Linear | Int8Linear
"""What every implementation of an operation takes. `ops.denoise` leaves `Int8Linear` to the table that it is laid over."""
E4m3Linear = Fp8Linear | RowFp8Linear
StaticLinear = Fp8Linear | Int8Linear
"""Whoever makes the input of one stores it in 8 bits right away."""


class LayerNorm(nn.Module):
    """SigLIP's norm: mean and variance, eps 1e-6.  weight, bias [D]."""

    def __init__(self, width: int, *, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))


class RmsNorm(nn.Module):
    """Gemma's norm, eps 1e-6.  weight [D] zero-centred (gain = 1 + weight), or None where flow time modulates instead."""

    weight: nn.Parameter | None

    def __init__(self, width: int, *, name: str, modulated: bool = False) -> None:
        super().__init__()
        self.name = name
        self.width = width
        self.weight = None if modulated else nn.Parameter(torch.empty(width))


class Rope(tuple[Tensor, Tensor]):
    """(cos, sin), each [B or 1, T, head_dim/2] in the compute dtype; angles were formed in float32."""

    __slots__ = ()
