# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: ANN001, ANN202
"""Sum of a split product + gate + residual + norm (+ quantise), one program per token row.

Parts are added in index order, so the result never depends on which program finished first. The residual stream stays
float32 in memory: it is small, and rounding it 36 times a step is what a bfloat16 policy loses most by.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..errors import ShapeError
from . import launch
from .denoise_gemm import hand_over
from .layers import AnyLinear, Fp8Linear, RmsNorm
from .reference import NORM_EPS


@triton.jit(do_not_specialize=["M", "table_rows"])
def _norm_kernel(
    parts, residual, gate, gate_stride, total, scale, shift, table_stride, table_rows, out, out_scale, M, D, eps,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """scale, shift, gate: row (token % table_rows) of tables with the given strides; gate and shift may be None."""
    row, d = tl.program_id(0), tl.arange(0, BLOCK)
    inside = d < D
    table = row % table_rows
    gain = 1.0 + tl.load(scale + table * table_stride + d, mask=inside, other=0.0).to(tl.float32)
    offset = tl.zeros((BLOCK,), dtype=tl.float32)
    if shift is not None:
        offset = tl.load(shift + table * table_stride + d, mask=inside, other=0.0).to(tl.float32)
    opening = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if gate is not None:
        opening = tl.load(gate + table * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        if EARLY == 2:
            gdc_launch_dependents()
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()
    y = tl.load(residual + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        branch = tl.load(parts + row * D + d, mask=inside, other=0.0)
        for part in tl.static_range(1, PARTS):
            branch += tl.load(parts + (part * M + row) * D + d, mask=inside, other=0.0)
        y += opening * branch
        tl.store(total + row * D + d, y, mask=inside)
    if PDL and not EARLY:
        gdc_launch_dependents()
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps) * gain + offset
    tl.store(out + row * D + d, hand_over(y, out, out_scale), mask=inside)


def sum_norm(
    parts: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
    norm: RmsNorm,
    modulation: Tensor | None,
    into: AnyLinear,
    *,
    warps: int = 4,
    early: int = launch.LATE,
    carveout: int = launch.BY_DRIVER,
) -> tuple[Tensor, Tensor]:
    """s = residual + gate * (parts[0] + parts[1] + ...), and norm(s) as `into` takes it.

    parts [P, M, D] float32 or None (then s is residual itself), residual [M, D], gate [1 or T, D] or None,
    modulation [1 or T, 3D] or None (then norm.weight); T divides M, and is the gate's T where both are given
    """
    M, D = residual.shape
    if gate is not None and modulation is not None and gate.shape[0] != modulation.shape[0]:
        raise ShapeError("gate and modulation of other tokens", got=f"{gate.shape[0]} and {modulation.shape[0]} rows")
    quantised = isinstance(into, Fp8Linear)
    out = torch.empty(M, D, dtype=torch.float8_e4m3fn if quantised else into.dtype, device=residual.device)
    total = residual if parts is None else torch.empty(M, D, dtype=torch.float32, device=residual.device)
    scale: Tensor | None = norm.weight
    shift, rows, stride = None, 1, 0
    if modulation is not None:
        scale, shift, rows, stride = modulation, modulation[:, D:], modulation.shape[0], modulation.stride(0)
    if gate is not None:
        rows = gate.shape[0]
    launched = _norm_kernel[(M,)](
        parts, residual, gate, 0 if gate is None else gate.stride(0), total, scale, shift, stride, rows, out,
        into.input_scale if quantised else None, M, D, NORM_EPS,
        PARTS=0 if parts is None else parts.shape[0], BLOCK=triton.next_power_of_2(D),
        **launch.options(residual, warps=warps, early=early),
    )  # fmt: skip
    launch.share(launched, carveout)
    return total, out
