"""Run by test_compiled_kernels.py in a process of its own, without the interpreter. Compiles for other GPUs, none needed.

No result of this project was measured but on Hopper. What can be known without such a GPU: one shape of each kernel, with
the tiles that are chosen there, compiles for A100 in bfloat16; those that take most shared memory compile for RTX 30, those
of E4M3 products for RTX 40 and 50, and the INT8 products of the prefix for A100 and RTX 50. None asks for more shared
memory than there is, and without a bulk copy engine loops copy ahead, 16 bytes at a time. Each once, as compiling takes
seconds. The kernels of early weights run on Hopper alone. Prints "compiled N kernels"; asserts on the way.
"""

from __future__ import annotations

import re

import torch
from compiled_ahead import Compiled, Hopper, layer
from compiled_kernels import BF16, E4M3, INT8, INVERSE, TRITON, zeros
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vivace.ops import (
    blocks,
    denoise,
    denoise_attention,
    denoise_boundary,
    denoise_gemm,
    denoise_norm,
    launch,
    prefill_attention,
    prefill_gemm,
    prefill_pointwise,
    prefill_tuning,
)
from vivace.ops.layers import Linear, RmsNorm
from vivace.ops.prefill_gemm import Rotation

GPUS = {80: (166_912, 108), 86: (101_376, 82), 89: (101_376, 128), 120: (101_376, 170)}
"""Shared memory of one block and processors: A100, RTX 30, RTX 40, RTX 50. Source: CUDA C++ Programming Guide, technical
specifications."""
COMPILED = {
    80: ("_norm_kernel", "_boundary_kernel", "_product_kernel", "_split_kernel", "_geglu_kernel", "_gemm_kernel",
         "_vision_kernel"),
    86: ("_product_kernel", "_attention_kernel", "_vision_kernel"),
    89: ("_product_kernel", "_gemm_kernel", "_attention_kernel", "_vision_kernel"),
    120: ("_product_kernel", "_split_kernel", "_gemm_kernel", "_attention_kernel", "_vision_kernel"),
}  # fmt: skip
"""By compute capability, the first kernel of the calls below."""


FEW_ROWS = {86: (False,), 120: (False, True)}
"""Where memory is short, in bfloat16 and (True) E4M3, the products and attention of 50 rows."""
WHOLE_NUMBERS = (80, 120)


class Older(Hopper):
    """What the compiler asks a driver; every compute capability is another device, so nothing is taken for compiled."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get_current_target(self):
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self):
        return self.number


def calls(number, room):
    """(module, kernels, call) at the shapes of (2, 48, 10), in E4M3 where the GPU multiplies it.  room: shared memory."""
    fp8, tuning = number >= 89, prefill_tuning.tuning_for(divmod(number, 10), shared_bytes=room)
    kind, inverse = (E4M3, INVERSE) if fp8 else (BF16, None)
    tiles, rows, residual = denoise.TILES[16, fp8], 10, zeros(10, 1024)
    norm, modulation = RmsNorm(1024, name="n", modulated=True), zeros(1, 3072, dtype=torch.float32)
    parts = zeros(4, rows, 1024, dtype=torch.float32)
    yield (
        denoise_norm, ["_norm_kernel"],
        lambda: denoise_norm.sum_norm(parts, residual, modulation[:, 2048:], norm, modulation, layer("qkv", fp8)),
    )  # fmt: skip
    leave, enter = Linear(1024, 32, name="action_out", bias=True), Linear(32, 1024, name="action_in", bias=True)
    x = zeros(rows, 32, dtype=torch.float32)
    yield (
        denoise_boundary, ["_boundary_kernel"],
        lambda: denoise_boundary.step_boundary(residual, leave, x, -0.1, enter, norm, modulation, layer("qkv", fp8)),
    )  # fmt: skip
    yield (
        denoise_gemm, ["_product_kernel"],
        lambda: denoise_gemm.geglu(
            zeros(rows, 1024, dtype=kind), layer("gate_up", fp8), layer("down", fp8), tiles.gate_up
        ),
    )  # fmt: skip
    q, k, past = zeros(1, rows, 8, 256), zeros(1, rows, 1, 256), (zeros(1, 560, 1, 256),) * 2
    tile = denoise._attention_tile(tiles, 560, room)
    yield (
        denoise_attention, ["_split_kernel", "_combine_kernel"],
        lambda: denoise_attention.attention(q, k, k, None, past, layer("o", fp8), tile),
    )  # fmt: skip
    wide, gain, out = zeros(560, 2048), zeros(2048, dtype=torch.float32), zeros(560, 2048, dtype=kind)
    yield (
        prefill_pointwise, ["_norm_kernel"],
        lambda: prefill_pointwise.residual_norm(wide, gain, out, shift=gain, out_inverse=inverse),
    )  # fmt: skip
    yield (
        prefill_pointwise, ["_geglu_kernel"],
        lambda: prefill_pointwise.geglu(zeros(560, 4096), out, out_inverse=inverse),
    )  # fmt: skip
    scale = {"channel_scale": torch.ones(4096), "out_inverse": inverse} if fp8 else {}
    untuned = prefill_tuning.untuned("geglu", fp8=fp8).tile
    x, w = zeros(560, 2048, dtype=kind), zeros(4096, 2048, dtype=kind)
    yield (
        prefill_gemm, ["_gemm_kernel"],
        lambda: prefill_gemm.gemm(x, w, out, tile=untuned, epilogue="geglu", **scale),
    )  # fmt: skip
    pixels, patches = zeros(768, 1776), zeros(1152, 1776)  # three parts of 588 numbers, padded
    yield (
        prefill_gemm, ["_gemm_kernel"],
        lambda: prefill_gemm.gemm(pixels, patches, zeros(768, 1152), tile=tuning.patch_tile, bias=zeros(256, 1152)),
    )  # fmt: skip
    way = tuning.choose("gelu", rows=768, shape=(4304, 1152), fp8=fp8)
    if way.tile is not None:
        hidden, given = zeros(768, 4304, dtype=kind), zeros(768, 1152, dtype=kind)
        yield (
            prefill_gemm, ["_gemm_kernel"],
            lambda: prefill_gemm.gemm(
                given, zeros(4304, 1152, dtype=kind), hidden, tile=way.tile, gelu=True, bias=zeros(4304),
                channel_scale=torch.ones(4304), out_inverse=inverse,
            ),
        )  # fmt: skip
    q, k = zeros(1, 560, 8, 256), zeros(1, 560, 1, 256)
    cut = tuning.attention_tile(rows=560 * 8)
    yield (
        prefill_attention, ["_attention_kernel"],
        lambda: prefill_attention.attention(q, k, k, zeros(1, 560, 2048, dtype=kind), tile=cut, out_inverse=inverse),
    )  # fmt: skip
    yield (
        prefill_attention, ["_vision_kernel"],
        lambda: prefill_attention.vision_attention(
            zeros(2, 256, 3456), zeros(2, 256, 1152, dtype=kind), heads=16, tile=tuning.vision_tile,
            out_inverse=inverse
        ),
    )  # fmt: skip


def few_rows(room, *, fp8):
    """Products and attention of the expert with 50 rows, which ask for most shared memory."""
    kind, tiles, table = E4M3 if fp8 else BF16, denoise.TILES[denoise.MAX_ROWS, fp8], zeros(50, 128)
    x, mixed, wide = zeros(50, 1024, dtype=kind), zeros(50, 2048, dtype=kind), zeros(50, 4096, dtype=kind)
    yield lambda: denoise_gemm.qkv(x, layer("qkv", fp8), (table, table), (8, 1, 256), tiles.qkv)
    yield lambda: denoise_gemm.parts(mixed, layer("o", fp8), tiles.o)
    yield lambda: denoise_gemm.geglu(x, layer("gate_up", fp8), layer("down", fp8), tiles.gate_up)
    yield lambda: denoise_gemm.parts(wide, layer("down", fp8), tiles.down)
    q, k, past = zeros(1, 50, 8, 256), zeros(1, 50, 1, 256), (zeros(1, 968, 1, 256),) * 2
    cut = denoise._attention_tile(tiles, 968, room)
    yield lambda: denoise_attention.attention(q, k, k, None, past, layer("o", fp8), cut)


def whole_number_calls(processors):
    """(module, kernels, call) of INT8: each epilogue of the prefix' product, and what hands it rows."""
    x, w, scale = zeros(560, 2048, dtype=INT8), zeros(4096, 2048, dtype=INT8), torch.ones(4096)
    out = zeros(560, 2048, dtype=INT8)
    gated, cut, plain = (
        prefill_tuning.TUNED.choose_int8(epilogue, rows=560, shape=(columns, 2048), processors=processors).tile
        for epilogue, columns in (("geglu", 32768), ("qkv_rope", 2560), ("plain", 2048))
    )
    options = {"channel_scale": scale, "out_inverse": INVERSE}
    yield prefill_gemm, ["_gemm_kernel"], lambda: prefill_gemm.gemm(x, w, out, tile=gated, epilogue="geglu", **options)
    yield prefill_gemm, ["_gemm_kernel"], lambda: prefill_gemm.gemm(x, w[:2048], out, tile=plain, gelu=True, **options)
    k, table = zeros(2, 560, 256), zeros(560, 128)
    turn = Rotation(k=k[0], v=k[1], cos=table, sin=table, heads=(8, 1, 256))
    yield (
        prefill_gemm, ["_gemm_kernel"],
        lambda: prefill_gemm.gemm(
            x, w[:2560], zeros(560, 2048), tile=cut, epilogue="qkv_rope", channel_scale=scale, rotation=turn
        ),
    )  # fmt: skip
    gain = zeros(2048, dtype=torch.float32)
    yield (
        prefill_pointwise, ["_norm_kernel"],
        lambda: prefill_pointwise.residual_norm(zeros(560, 2048), gain, out, out_inverse=INVERSE),
    )  # fmt: skip


def main():
    for module, names in TRITON.items():
        for name in names:
            vars(module)[name] = Compiled(vars(module)[name])
    vars(launch)["programmatic"] = lambda x: False
    vars(launch)["share"] = lambda launched, percent: None
    count = 0
    for number, (room, processors) in GPUS.items():
        driver.set_active(Older(number))
        vars(blocks)["bulk_copies"] = lambda device, number=number: number >= 90
        vars(launch)["shared_bytes"] = lambda device, room=room: room
        for fp8 in FEW_ROWS.get(number, ()):
            for index, launch_it in enumerate(few_rows(room, fp8=fp8)):
                launch_it()
                fits(denoise_attention._split_kernel if index == 4 else denoise_gemm._product_kernel, number, room)
                count += 1
        for module, names, launch_it in calls(number, room):
            if names[0] not in COMPILED[number]:
                continue
            launch_it()
            for name in names:
                ptx = fits(vars(module)[name], number, room)
                assert name not in ("_gemm_kernel", "_attention_kernel", "_vision_kernel") or ahead(ptx, number), name
                count += 1
        for module, (name,), launch_it in whole_number_calls(processors) if number in WHOLE_NUMBERS else ():
            launch_it()
            ptx = fits(vars(module)[name], number, room)
            assert name != "_gemm_kernel" or ".s32.s8.s8.s32" in ptx, "no matrix unit multiplies whole numbers"
            assert name != "_gemm_kernel" or ahead(ptx, number)
            count += 1
    print(f"compiled {count} kernels")


def ahead(ptx, number):
    """Its loop copies before it multiplies: by the bulk copy engine, or in words of 16 bytes."""
    if number >= 90:
        return "cp.async.bulk" in ptx
    words = set(re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*?, (0x\w+)[,;]", ptx))
    return words == {"0x10"}


def fits(kernel, number, room):
    """Its instructions; the last compilation is for that GPU and asks for no more shared memory than it has."""
    made = kernel.made
    assert f".target sm_{number}" in made.asm["ptx"], f"{kernel} was compiled for another GPU"
    assert made.metadata.shared <= room, f"{kernel} takes {made.metadata.shared} of {room} on sm_{number}"
    return made.asm["ptx"]


if __name__ == "__main__":
    main()
