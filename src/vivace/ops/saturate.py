# kernels have no annotations: their arguments are Triton's, and one name serves tensors and pointers
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Into E4M3's range, as every kernel does it: what is too large saturates at 448, and NaN stays NaN.

The cast alone makes NaN of everything above 448, so values are clamped first. But the GPU's plain min and max drop a NaN,
and would turn a broken activation into +-448: finite actions, of which nothing downstream could say that they are wrong.
So these are the variants that keep it. Infinity saturates like every other large value, as in `reference.hand_over`.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def saturated(y):
    """y float32, any shape, between -448 and 448; NaN stays NaN. Gluon: `gluon.jit(saturated.fn)` is the same function."""
    return tl.clamp(y, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
