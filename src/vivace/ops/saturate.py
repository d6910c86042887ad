# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN201, SIM108
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Into 8 bits, as every kernel does it: what is too large saturates, and in E4M3 a NaN stays NaN.

The cast alone makes NaN of everything above 448, so values are clamped first. But the GPU's plain min and max drop a NaN,
and would turn a broken activation into +-448: finite actions, of which nothing downstream could say that they are wrong.
So these are the variants that keep it. Infinity saturates like every other large value, as in `reference.hand_over`.
INT8 has no NaN: one becomes a whole number there. Only the residual stream, which is never in 8 bits, keeps it, and under
a plan that has the keys and values of all layers in INT8 nothing of it reaches the actions (decision 0010).
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
# float32 has no digits behind the point at this size: adding it and taking it away rounds to the nearest, of two the even
WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def saturated(y):
    """y float32, any shape, between -448 and 448; NaN stays NaN. Gluon: `gluon.jit(saturated.fn)` is the same function."""
    return tl.clamp(y, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def in_8_bits(y, dtype: tl.constexpr):
    """y float32, any shape, in units of the scale -> E4M3, or INT8 rounded as `reference.round_to` rounds."""
    if dtype == tl.int8:
        y = (tl.clamp(y, -128.0, 127.0) + WHOLE) - WHOLE
    else:
        y = saturated(y)
    return y.to(dtype)
