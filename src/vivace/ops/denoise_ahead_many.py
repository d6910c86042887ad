# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Products of 17 to 64 token rows whose weights are in shared memory before the predecessor has finished.

The order is that of `denoise_ahead_few`: copies of all weights of this program, constants, wait, x, sums, store. Here 64
rows of x (128 KB at K = 1024 in bfloat16) do not fit beside the weights, so x passes through a ring of SLOTS groups, and
the wide matrix instruction of Hopper takes both operands from shared memory. A chunk is 128 bytes, the width of its
swizzle; the two column blocks of geglu and qkv lie behind each other, so one instruction multiplies both.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .denoise_ahead_store import constants, first_columns, store


@gluon.jit
def _bring_weights(weight, into, bar, k, first, second, PAIRS: gl.constexpr, STEPS: gl.constexpr, BK: gl.constexpr):
    """Start the copies of all weights of this program."""
    mbarrier.expect(bar, STEPS * PAIRS * weight.block_type.nbytes)
    for step in gl.static_range(STEPS):
        tma.async_copy_global_to_shared(weight, [first, k + step * BK], bar, into.index(step * PAIRS))
        if PAIRS == 2:
            tma.async_copy_global_to_shared(weight, [second, k + step * BK], bar, into.index(step * PAIRS + 1))


@gluon.jit
def _bring_rows(x, ring, bars, k, group, EACH: gl.constexpr, SLOTS: gl.constexpr, BK: gl.constexpr):
    """Start the copies of group `group` of x into its place in the ring."""
    mbarrier.expect(bars.index(1 + group), EACH * x.block_type.nbytes)
    for i in gl.static_range(EACH):
        tma.async_copy_global_to_shared(
            x, [0, k + (group * EACH + i) * BK], bars.index(1 + group), ring.index((group % SLOTS) * EACH + i)
        )


@gluon.jit
def _multiply(
    x, tiles, ring, bars, k, acc, STEPS: gl.constexpr, EACH: gl.constexpr, SLOTS: gl.constexpr, BK: gl.constexpr
):  # fmt: skip
    """acc + x W^T over the K range of this program; a group of x is replaced when those of the next have begun."""
    GROUPS: gl.constexpr = STEPS // EACH
    for group in gl.static_range(min(SLOTS, GROUPS)):
        _bring_rows(x, ring, bars, k, group, EACH, SLOTS, BK)
    stacked = tiles._reinterpret(tiles.dtype, [STEPS, acc.shape[1], BK], tiles.layout)
    mbarrier.wait(bars.index(0), 0)
    for group in gl.static_range(GROUPS):
        mbarrier.wait(bars.index(1 + group), 0)
        for i in gl.static_range(EACH):
            w = stacked.index(group * EACH + i).permute([1, 0])
            acc = warpgroup_mma(ring.index((group % SLOTS) * EACH + i), w, acc, is_async=True)
        if group > 0 and group - 1 + SLOTS < GROUPS:
            acc = warpgroup_mma_wait(EACH, deps=[acc])
            _bring_rows(x, ring, bars, k, group - 1 + SLOTS, EACH, SLOTS, BK)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _halves(acc, BN: gl.constexpr):
    """[64, 2 BN] -> two [64, BN]."""
    return acc.reshape([64, 2, BN]).permute([0, 2, 1]).split()


@gluon.jit(do_not_specialize=["M", "table_rows"])
def many_kernel(
    weight, x, out, channel_scale, input_scale, out_scale, cos, sin, table_rows, M, N,
    MODE: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, EACH: gl.constexpr, SLOTS: gl.constexpr,
    HALF: gl.constexpr, ROTATED: gl.constexpr, STORED: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Grid (column tiles, split_k).  weight, x: descriptors of [N, K] and [M, K] in blocks [BN or 64, BK]."""
    if PDL and EARLY:
        gdc_launch_dependents()
    PAIRS: gl.constexpr = 1 if MODE == "part" else 2
    GROUPS: gl.constexpr = STEPS // EACH
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIRS * BN, 256 // x.dtype.primitive_bitwidth])
    tiles = gl.allocate_shared_memory(weight.dtype, [STEPS * PAIRS, BN, BK], weight.layout)
    ring = gl.allocate_shared_memory(x.dtype, [SLOTS * EACH, 64, BK], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [1 + GROUPS, 1], mbarrier.MBarrierLayout())
    for bar in gl.static_range(1 + GROUPS):
        mbarrier.init(bars.index(bar), count=1)
    k = gl.program_id(1) * STEPS * BK
    first, second = first_columns(gl.program_id(0), N, MODE, BN, HALF)
    _bring_weights(weight, tiles, bars.index(0), k, first, second, PAIRS, STEPS, BK)
    acc = gl.zeros([64, PAIRS * BN], gl.float32, wide)
    y = acc
    if PAIRS == 2:
        y, y2 = _halves(acc, BN)
    flat: gl.constexpr = y.type.layout
    factors = constants(
        channel_scale, input_scale, out_scale, cos, sin, table_rows, first, second, M, MODE, 64, BN, HALF, ROTATED, flat
    )
    if PDL:
        gdc_wait()
    acc = _multiply(x, tiles, ring, bars, k, acc, STEPS, EACH, SLOTS, BK)
    if PDL and not EARLY:
        gdc_launch_dependents()
    y = acc
    y2 = acc
    if PAIRS == 2:
        y, y2 = _halves(acc, BN)
    store(y, y2, out, factors, first, M, N, MODE, 64, BN, HALF, STORED, flat)
