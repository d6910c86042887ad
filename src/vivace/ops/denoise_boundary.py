# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: ANN001, ANN202
"""From one Euler step into the next as one kernel: velocity | Euler | action tokens | first norm, a program per token.

Five launches otherwise, two of them torch's own, which break the chain of programmatic launches. A program reads both
action projections (32 x 1024 each, float32, from the chip's cache), the first before the wait, as weights are constants.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import launch
from .denoise_gemm import hand_over
from .layers import AnyLinear, Fp8Linear, Linear, RmsNorm
from .reference import NORM_EPS


@triton.jit(do_not_specialize=["table_rows"])
def _boundary_kernel(
    n, out_weight, out_bias, x, dt, in_weight, in_bias, scale, shift, table_stride, table_rows,
    velocity, moved, tokens, out, out_scale, D, A, eps,
    BLOCK: tl.constexpr, ACTIONS: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (token rows). scale, shift: row (token % table_rows) of tables; shift and biases may be None."""
    row, d, a = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, ACTIONS)
    wide, narrow = d < D, a < A
    w = tl.load(out_weight + a[:, None] * D + d[None, :], mask=narrow[:, None] & wide[None, :], other=0.0).to(
        tl.float32
    )
    if PDL:
        if EARLY == 2:
            gdc_launch_dependents()
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()
    y = tl.load(n + row * D + d, mask=wide, other=0.0).to(tl.float32)
    v = tl.sum(w * y[None, :], axis=1)
    if out_bias is not None:
        v += tl.load(out_bias + a, mask=narrow, other=0.0).to(tl.float32)
    at = row * A + a
    tl.store(velocity + at, v, mask=narrow)
    v = tl.load(x + at, mask=narrow, other=0.0) + dt * v
    tl.store(moved + at, v, mask=narrow)
    w = tl.load(in_weight + d[:, None] * A + a[None, :], mask=wide[:, None] & narrow[None, :], other=0.0).to(tl.float32)
    y = tl.sum(w * v[None, :], axis=1)
    if in_bias is not None:
        y += tl.load(in_bias + d, mask=wide, other=0.0).to(tl.float32)
    if PDL and not EARLY:
        gdc_launch_dependents()
    token = y.to(tokens.dtype.element_ty)
    tl.store(tokens + row * D + d, token, mask=wide)
    y = token.to(tl.float32)
    table = (row % table_rows) * table_stride + d
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps) * (1.0 + tl.load(scale + table, mask=wide, other=0.0).to(tl.float32))
    if shift is not None:
        y += tl.load(shift + table, mask=wide, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, hand_over(y, out, out_scale), mask=wide)


def step_boundary(
    n: Tensor,
    action_out: Linear,
    x: Tensor,
    dt: float,
    action_in: Linear,
    norm: RmsNorm,
    modulation: Tensor | None,
    into: AnyLinear,
    *,
    warps: int = 16,
    early: int = launch.FIRST,
    carveout: int = launch.BY_DRIVER,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contract of `reference.step_boundary` on rows: n [M, D], x float32 [M, A] (contiguous); modulation rows divide M."""
    (M, D), A = n.shape, x.shape[1]
    quantised = isinstance(into, Fp8Linear)
    velocity, moved = (torch.empty(M, A, dtype=torch.float32, device=n.device) for _ in range(2))
    tokens = torch.empty(M, D, dtype=into.dtype, device=n.device)
    out = torch.empty(M, D, dtype=torch.float8_e4m3fn if quantised else into.dtype, device=n.device)
    scale: Tensor | None = norm.weight
    shift, rows, stride = None, 1, 0
    if modulation is not None:
        scale, shift, rows, stride = modulation, modulation[:, D:], modulation.shape[0], modulation.stride(0)
    launched = _boundary_kernel[(M,)](
        n, action_out.weight, action_out.bias, x, dt, action_in.weight, action_in.bias, scale, shift, stride, rows,
        velocity, moved, tokens, out, into.input_scale if quantised else None, D, A, NORM_EPS,
        BLOCK=triton.next_power_of_2(D), ACTIONS=triton.next_power_of_2(A),
        **launch.options(n, warps=warps, early=early),
    )  # fmt: skip
    launch.share(launched, carveout)
    return velocity, moved, tokens, out
