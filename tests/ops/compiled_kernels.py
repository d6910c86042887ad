"""Run by test_compiled_kernels.py in a process of its own, without the interpreter. Compiles for Hopper, no GPU needed.

Every kernel that stores E4M3 is compiled with an E4M3 output, and its instructions are read: the clamp to 448 must be the
variant that keeps NaN. Small heads must compile at all. Prints "checked N kernels"; asserts on the way.
"""

from __future__ import annotations

import re

import torch
from compiled_ahead import Compiled, Hopper, call, layer
from triton.runtime import driver

from vivace.ops import (
    denoise,
    denoise_ahead,
    denoise_attention,
    denoise_boundary,
    denoise_gemm,
    denoise_norm,
    launch,
    prefill_attention,
    prefill_gemm,
    prefill_limits,
    prefill_pointwise,
    prefill_tail,
    prefill_tuning,
    row_scales,
)
from vivace.ops.layers import Linear, RmsNorm
from vivace.ops.prefill_attention import AttentionTile
from vivace.ops.prefill_gemm import Rotation, Tile

BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
INVERSE = torch.ones(1)
TRITON = {
    denoise_norm: ["_norm_kernel"],
    denoise_boundary: ["_boundary_kernel"],
    denoise_gemm: ["_product_kernel"],
    denoise_attention: ["_split_kernel", "_combine_kernel"],
    prefill_gemm: ["_gemm_kernel"],
    prefill_tail: ["_gated_tail_kernel"],
    prefill_pointwise: ["_norm_kernel", "_geglu_kernel"],
    prefill_attention: ["_attention_kernel", "_vision_kernel"],
    row_scales: ["_rows_kernel"],
}


def keeps_nan(ptx: str) -> bool:
    """Clamped at all, and never by an instruction that drops NaN (softmax needs max alone, so min is the clamp's)."""
    clamps = set(re.findall(r"\bmin\.[a-zA-Z.]*f32\b", ptx))
    return bool(clamps) and all(".NaN." in one for one in clamps)


def zeros(*shape, dtype=BF16):
    return torch.zeros(*shape, dtype=dtype)


def denoise_calls():
    """What to compile: (module, kernel, call)."""
    small, residual, norm = layer("down", True), zeros(10, 1024), RmsNorm(1024, name="n", modulated=True)
    modulation, parts = zeros(1, 3072, dtype=torch.float32), zeros(4, 10, 1024, dtype=torch.float32)
    into, tiles = layer("qkv", True), denoise.TILES[16, True]
    yield (
        denoise_norm, "_norm_kernel",
        lambda: denoise_norm.sum_norm(parts, residual, modulation[:, 2048:], norm, modulation, into),
    )  # fmt: skip
    leave, enter = Linear(1024, 32, name="action_out", bias=True), Linear(32, 1024, name="action_in", bias=True)
    x = zeros(10, 32, dtype=torch.float32)
    yield (
        denoise_boundary, "_boundary_kernel",
        lambda: denoise_boundary.step_boundary(residual, leave, x, -0.1, enter, norm, modulation, into),
    )  # fmt: skip
    x8 = zeros(10, 1024, dtype=E4M3)
    yield (
        denoise_gemm, "_product_kernel",
        lambda: denoise_gemm.geglu(x8, layer("gate_up", True), small, tiles.gate_up),
    )  # fmt: skip
    yield row_scales, "_rows_kernel", lambda: row_scales.quantise(zeros(10, 16384), pdl=True)
    q, k = zeros(1, 10, 8, 256), zeros(1, 10, 1, 256)
    past = zeros(1, 96, 1, 256), zeros(1, 96, 1, 256)
    yield (
        denoise_attention, "_combine_kernel",
        lambda: denoise_attention.attention(q, k, k, None, past, layer("o", True), tiles.attention),
    )  # fmt: skip


def prefill_calls():
    """What to compile: (module, kernel, call)."""
    rows, gain = zeros(256, 1152), zeros(1152, dtype=torch.float32)
    out, scale = zeros(256, 1152, dtype=E4M3), torch.ones(2304)
    yield (
        prefill_pointwise, "_norm_kernel",
        lambda: prefill_pointwise.residual_norm(rows, gain, out, shift=gain, out_inverse=INVERSE),
    )  # fmt: skip
    yield (
        prefill_pointwise, "_geglu_kernel",
        lambda: prefill_pointwise.geglu(zeros(256, 2304), out, channel_scale=scale, out_inverse=INVERSE),
    )  # fmt: skip
    x, w = zeros(256, 1152, dtype=E4M3), zeros(2304, 1152, dtype=E4M3)
    for epilogue, bulk in (("plain", False), ("plain", True), ("geglu", False)):
        tile = Tile(64, 64, 128, 4, 3, bulk_store=bulk)
        weight = w[:1152] if epilogue == "plain" else w
        options = {"tile": tile, "epilogue": epilogue, "channel_scale": scale, "out_inverse": INVERSE}
        yield prefill_gemm, "_gemm_kernel", lambda weight=weight, o=options: prefill_gemm.gemm(x, weight, out, **o)
    own = torch.ones(272, 1)
    yield (
        prefill_gemm, "_gemm_kernel",
        lambda: prefill_gemm.gemm(
            x, w, out, tile=Tile(64, 64, 128, 4, 3), epilogue="geglu", channel_scale=scale, row_scale=own[:256],
            out_inverse=INVERSE,
        ),
    )  # fmt: skip
    tail = Tile(128, 64, 128, 8, 3, tail=32, group=4)
    for each in (None, own):
        yield (
            prefill_tail, "_gated_tail_kernel",
            lambda each=each: prefill_tail.gated(
                zeros(272, 1152, dtype=E4M3), w, zeros(272, 1152, dtype=E4M3), tile=tail, channel_scale=scale,
                row_scale=each, out_inverse=INVERSE,
            ),
        )  # fmt: skip
    cut = AttentionTile(64, 64, warps=4, stages=2)
    q, k = zeros(1, 64, 8, 256), zeros(1, 64, 1, 256)
    yield (
        prefill_attention, "_attention_kernel",
        lambda: prefill_attention.attention(
            q, k, k, zeros(1, 64, 2048, dtype=E4M3), tile=cut, out_inverse=INVERSE
        ),
    )  # fmt: skip
    yield (
        prefill_attention, "_vision_kernel",
        lambda: prefill_attention.vision_attention(
            zeros(1, 64, 3456), zeros(1, 64, 1152, dtype=E4M3), heads=16, tile=cut, out_inverse=INVERSE
        ),
    )  # fmt: skip


def clamps():
    """Each kernel that stores E4M3."""
    count = 0
    for module, name, launch_it in (*denoise_calls(), *prefill_calls()):
        launch_it()
        ptx = vars(module)[name].made.asm["ptx"]
        assert "e4m3x2" in ptx, f"{name} stores no E4M3"
        assert keeps_nan(ptx), f"{name} drops NaN"
        count += 1
    for rows, kernel in ((10, "few_kernel"), (50, "many_kernel")):
        call("gate_up", rows, denoise_ahead.AHEAD_TILES[16 if rows == 10 else 64, True].gate_up, True)
        assert keeps_nan(vars(denoise_ahead)[kernel].made.asm["ptx"]), f"{kernel} drops NaN"
        count += 1
    return count


def narrow_heads():
    """Heads of 16 and 32: tiles are wider than half of one."""
    count = 0
    for head_dim in (16, 32):
        heads, rows = (8, 1, head_dim), 50
        columns = (heads[0] + 2 * heads[1]) * head_dim
        table = zeros(rows, head_dim // 2)
        for (most, fp8), tiles in denoise.TILES.items():
            made = replace_weight(layer("qkv", fp8), columns)
            denoise_gemm.qkv(
                zeros(min(rows, most), 1024, dtype=made.weight.dtype), made, (table, table), heads, tiles.qkv
            )
            assert denoise_gemm._product_kernel.grid[0] >= columns // head_dim, "each head has its own program"
            count += 1
            x, k = zeros(rows, 1024, dtype=made.weight.dtype), zeros(2, rows, head_dim)
            rotation = Rotation(k=k[0], v=k[1], cos=table, sin=table, heads=heads)
            tile = prefill_tuning.untuned("qkv_rope", fp8=fp8).tile
            prefill_gemm.gemm(
                x, made.weight, zeros(rows, 8 * head_dim), tile=tile, epilogue="qkv_rope", rotation=rotation
            )
            assert prefill_gemm._gemm_kernel.grid[0] >= columns // head_dim, "each head has its own program"
            count += 1
    return count


def largest_attention():
    """What `why_not` compares with the GPU's shared memory is what the tuned tile takes."""
    q, k = zeros(1, 968, 8, 256), zeros(1, 968, 1, 256)
    tile = prefill_tuning.TUNED.attention_tile(rows=968 * 8)
    prefill_attention.attention(q, k, k, zeros(1, 968, 2048), tile=tile, mask=torch.ones(1, 968, dtype=torch.bool))
    assert prefill_attention._attention_kernel.made.metadata.shared <= prefill_limits.SHARED_BYTES
    tiles, rows = denoise.TILES[denoise.MAX_ROWS, False], 50
    q, k, past = zeros(1, rows, 8, 256), zeros(1, rows, 1, 256), (zeros(1, 968, 1, 256),) * 2
    denoise_attention.attention(q, k, k, None, past, layer("o", False), tiles.attention)
    assert denoise_attention._split_kernel.made.metadata.shared <= denoise.LONG_CACHE_BYTES
    denoise_attention.attention(q, k, k, None, past, layer("o", False), tiles.attention_mid)
    assert denoise_attention._split_kernel.made.metadata.shared <= 99 * 1024


def replace_weight(made, rows):
    """The layer with its first `rows` rows."""
    made.weight.data = made.weight.data[:rows].contiguous()
    if made.weight.dtype == E4M3:
        made.weight_scale.data = made.weight_scale.data[:rows]
    return made


def negative_control():
    """The reading of instructions itself: a plain clamp must be seen."""
    assert not keeps_nan("min.xorsign.abs.f32 \t%r1, %r2, %r3; max.f32 %r1")
    assert not keeps_nan("min.NaN.xorsign.abs.f32 \t%r1; min.f32 %r1")
    assert not keeps_nan("")
    assert keeps_nan("max.f32 %r1; min.NaN.xorsign.abs.f32 %r1")


def main():
    for module, names in {**TRITON, denoise_ahead: ["few_kernel", "many_kernel"]}.items():
        for name in names:
            vars(module)[name] = Compiled(vars(module)[name])
    vars(launch)["programmatic"] = lambda x: True
    vars(launch)["share"] = lambda launched, percent: None
    driver.set_active(Hopper())
    negative_control()
    largest_attention()
    print(f"checked {clamps()} clamps and {narrow_heads()} products of narrow heads")


if __name__ == "__main__":
    main()
