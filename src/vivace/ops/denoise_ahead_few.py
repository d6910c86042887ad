# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Products of at most 16 token rows whose weights are in shared memory before the predecessor has finished.

A program owns BN output columns (two times BN in geglu and qkv) and a range of K. Its weights are constants, so their
copies are issued first; then it waits for its predecessor, loads x (16 rows), multiplies and stores.

The warps share K, not columns: warp w multiplies chunk w of every step, which keeps each chain of dependent matrix
instructions short. Their sums meet in shared memory and are added in warp order, so every replay gives the same bits.
Weight [N, K] is described to the copy engine as [K / chunk, N, chunk], so one copy brings one chunk for every warp.

x goes from the second-level cache straight to registers in the order in which the matrix instruction wants it. A chunk is
64 bytes: a thread holds 16 consecutive bytes of x and of the weights (the sum over K may be taken in any order as long as
both agree), and two rows of a chunk cover all banks of shared memory once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .denoise_ahead_store import constants, first_columns, store


@gluon.jit
def _bring(
    weight, into, bars, chunk, first, second,
    PAIRS: gl.constexpr, STEPS: gl.constexpr, BARS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Start the copies of all weights of this program, announced on BARS barriers, an equal number of steps each."""
    each: gl.constexpr = STEPS // BARS
    for bar in gl.static_range(BARS):
        mbarrier.init(bars.index(bar), count=1)
    for bar in gl.static_range(BARS):
        mbarrier.expect(bars.index(bar), each * PAIRS * weight.block_type.nbytes)
    for step in gl.static_range(STEPS):
        at = chunk + step * WARPS
        bar = bars.index(step // each)
        tma.async_copy_global_to_shared(weight, [at, first, 0], bar, into.index(step * PAIRS))
        if PAIRS == 2:
            tma.async_copy_global_to_shared(weight, [at, second, 0], bar, into.index(step * PAIRS + 1))


@gluon.jit
def _rows(x, chunk, M, K, BK: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr):
    """[WARPS, 16, BK] of x from chunk number `chunk` on, zero below row M."""
    left: gl.constexpr = gl.DotOperandLayout(0, MMA, BK // 4)
    over_k: gl.constexpr = gl.SliceLayout(1, left)
    over_m: gl.constexpr = gl.SliceLayout(0, left)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, over_k))
    k = gl.arange(0, BK, gl.SliceLayout(0, over_k))
    m = gl.arange(0, 16, gl.SliceLayout(1, over_m))
    at = ((chunk + warp) * BK)[:, None] + k[None, :]
    row = gl.expand_dims(gl.expand_dims(m, 1), 0)
    return gl.load(x + row * K + gl.expand_dims(at, 1), mask=row < M, other=0.0)


@gluon.jit
def _added(acc, SPREAD: gl.constexpr):
    """[WARPS, 16, BN] over warps -> [16, BN]: every thread gets its elements from all warps and adds them in warp order."""
    return gl.sum(gl.convert_layout(acc, SPREAD), axis=0)


@gluon.jit(do_not_specialize=["M", "table_rows"])
def few_kernel(
    weight, x, out, channel_scale, input_scale, out_scale, cos, sin, table_rows, M, N, K,
    MODE: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, BARS: gl.constexpr,
    HALF: gl.constexpr, ROTATED: gl.constexpr, STORED: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Grid (column tiles, split_k).  weight: descriptor of [K/BK, N, BK] in blocks [warps, BN, BK]; x [M, K]."""
    if PDL and EARLY:
        gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    PAIRS: gl.constexpr = 1 if MODE == "part" else 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    right: gl.constexpr = gl.DotOperandLayout(1, mma, BK // 4)
    tiles = gl.allocate_shared_memory(weight.dtype, [STEPS * PAIRS, WARPS, BN, BK], weight.layout)
    bars = gl.allocate_shared_memory(gl.int64, [BARS, 1], mbarrier.MBarrierLayout())
    chunk = gl.program_id(1) * STEPS * WARPS
    first, second = first_columns(gl.program_id(0), N, MODE, BN, HALF)
    _bring(weight, tiles, bars, chunk, first, second, PAIRS, STEPS, BARS, WARPS)
    lanes: gl.constexpr = [1, 32 // min(BN, 32), min(BN, 32)]
    spread: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], lanes, [1, WARPS, 1], [2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(0, spread)
    factors = constants(
        channel_scale, input_scale, out_scale, cos, sin, table_rows, first, second, M, MODE, 16, BN, HALF, ROTATED, flat
    )
    if PDL:
        gdc_wait()
    rows = ()
    for step in gl.static_range(STEPS):
        rows = rows + (_rows(x, chunk + step * WARPS, M, K, BK, WARPS, mma),)  # type: ignore[assignment]  # noqa: RUF005
    acc = gl.zeros([WARPS, 16, BN], gl.float32, mma)
    acc2 = gl.zeros([WARPS, 16, BN], gl.float32, mma)
    for step in gl.static_range(STEPS):
        if step % (STEPS // BARS) == 0:
            mbarrier.wait(bars.index(step // (STEPS // BARS)), 0)
        acc = mma_v2(rows[step], tiles.index(step * PAIRS).permute([0, 2, 1]).load(right), acc)
        if PAIRS == 2:
            acc2 = mma_v2(rows[step], tiles.index(step * PAIRS + 1).permute([0, 2, 1]).load(right), acc2)
    if PDL and not EARLY:
        gdc_launch_dependents()
    y = _added(acc, spread)
    y2 = _added(acc2, spread) if PAIRS == 2 else y
    store(y, y2, out, factors, first, M, N, MODE, 16, BN, HALF, STORED, flat)
