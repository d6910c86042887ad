# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: ANN001, ANN201
"""What the products with early weights share: which columns are theirs, constants of the epilogue, and the epilogue.

The three epilogues are those of `denoise_gemm`, in explicit layouts. Scales and rotary tables are constants like the
weights, so `constants` runs before the wait and `store` only multiplies.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .saturate import saturated

_saturated = gluon.jit(saturated.fn)


@gluon.jit
def first_columns(tile, N, MODE: gl.constexpr, BN: gl.constexpr, HALF: gl.constexpr):
    """First weight row of both accumulators of a column tile."""
    first = tile * BN
    second = first + N // 2
    if MODE == "qkv":
        per_half: gl.constexpr = HALF // BN
        first = (tile // per_half) * (2 * HALF) + (tile % per_half) * BN
        second = first + HALF
    return first, second


@gluon.jit
def constants(
    channel_scale, input_scale, out_scale, cos, sin, table_rows, first, second, M,
    MODE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, HALF: gl.constexpr, ROTATED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """(left, right, shift): factors of both accumulators and, in qkv, sin; their meaning is `store`'s."""
    rows = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    columns = first + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    left = gl.full([1, BN], 1.0, gl.float32, LAYOUT)
    right = left
    shift = left
    if channel_scale is not None:
        scale = gl.load(input_scale)
        left = (gl.load(channel_scale + columns) * scale)[None, :]
        if MODE != "part":
            right = (gl.load(channel_scale + columns + (second - first)) * scale)[None, :]
    if MODE == "geglu" and out_scale is not None:
        right = right / gl.load(out_scale)
    cosine = left
    if MODE == "qkv":
        turn = (rows % table_rows)[:, None] * HALF + (columns % (2 * HALF))[None, :]
        turned = (rows < M)[:, None] & (first < ROTATED * 2 * HALF)
        cosine = gl.load(cos + turn, mask=turned, other=1.0).to(gl.float32)
        shift = gl.load(sin + turn, mask=turned, other=0.0).to(gl.float32)
    return left, right, cosine, shift


@gluon.jit
def store(
    y, y2, out, factors, first, M, N,
    MODE: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, HALF: gl.constexpr, STORED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """y, y2 float32 [BM, BN] in LAYOUT: both accumulators of the columns from `first` on, to `out` as MODE says."""
    left, right, cosine, shift = factors
    rows = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    columns = first + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    inside = (rows < M)[:, None]
    y = y * left
    if MODE == "part":
        gl.store(out + (gl.program_id(1) * M + rows)[:, None] * N + columns[None, :], y, mask=inside)
    else:
        y2 = y2 * right
        if MODE == "geglu":
            y = y / (1.0 + gl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y))) * y2
            if STORED == gl.float8e4nv:  # noqa: SIM300
                y = _saturated(y)
            gl.store(out + rows[:, None] * (N // 2) + columns[None, :], y.to(STORED), mask=inside)
        else:
            to = out + rows[:, None] * N + columns[None, :]
            gl.store(to, (y * cosine - y2 * shift).to(STORED), mask=inside)
            gl.store(to + HALF, (y2 * cosine + y * shift).to(STORED), mask=inside)
