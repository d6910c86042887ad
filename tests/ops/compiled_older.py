"""Run by test_compiled_kernels.py in a process of its own, without the interpreter. Compiles for older GPUs, none needed.

No result of this project was measured below Hopper. What can be known without such a GPU: one shape of each kernel, with
the tiles that are chosen there, compiles for A100 in bfloat16; those that take most shared memory compile for RTX 30, those
of E4M3 products for RTX 40, and the INT8 products of the prefix for all three; none asks for more shared memory than there
is. Each once, as compiling takes seconds. The kernels of early weights run on Hopper alone. Prints "compiled N kernels";
asserts on the way.
"""

from __future__ import annotations

import torch
from compiled_ahead import Compiled, Hopper, layer
from compiled_kernels import BF16, E4M3, INT8, INVERSE, TRITON, zeros
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vivace.ops import (
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

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376}
"""What one block may have: A100, RTX 30, RTX 40. Source: CUDA C++ Programming Guide, technical specifications."""
COMPILED = {
    80: ("_norm_kernel", "_boundary_kernel", "_product_kernel", "_split_kernel", "_geglu_kernel", "_gemm_kernel",
         "_vision_kernel"),
    86: ("_product_kernel", "_attention_kernel"),
    89: ("_product_kernel", "_gemm_kernel", "_attention_kernel"),
}  # fmt: skip
"""By compute capability, the first kernel of the calls below."""


class Older(Hopper):
    """What the compiler asks a driver; every compute capability is another device, so nothing is taken for compiled."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get_current_target(self):
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self):
        return self.number


def calls(fp8, room):
    """(module, kernels, call) at the shapes of (2, 48, 10).  fp8: of products and what they read.  room: shared memory."""
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
    q, k = zeros(1, 560, 8, 256), zeros(1, 560, 1, 256)
    cut = prefill_tuning.TUNED.attention_tile(rows=560 * 8)
    yield (
        prefill_attention, ["_attention_kernel"],
        lambda: prefill_attention.attention(q, k, k, zeros(1, 560, 2048, dtype=kind), tile=cut, out_inverse=inverse),
    )  # fmt: skip
    yield (
        prefill_attention, ["_vision_kernel"],
        lambda: prefill_attention.vision_attention(
            zeros(2, 256, 3456), zeros(2, 256, 1152, dtype=kind), heads=16, tile=prefill_tuning.TUNED.vision_tile,
            out_inverse=inverse
        ),
    )  # fmt: skip


def whole_number_calls():
    """(module, kernels, call) of INT8: each epilogue of the prefix' product, and what hands it rows."""
    x, w, scale = zeros(560, 2048, dtype=INT8), zeros(4096, 2048, dtype=INT8), torch.ones(4096)
    out, tuning = zeros(560, 2048, dtype=INT8), prefill_tuning.TUNED
    gated, cut, plain = (tuning.choose_int8(epilogue).tile for epilogue in ("geglu", "qkv_rope", "plain"))
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
    for number, room in SHARED_BYTES.items():
        driver.set_active(Older(number))
        for module, names, launch_it in calls(number >= 89, room):
            if names[0] not in COMPILED[number]:
                continue
            launch_it()
            for name in names:
                fits(vars(module)[name], number, room)
                count += 1
        for module, (name,), launch_it in whole_number_calls():
            launch_it()
            ptx = fits(vars(module)[name], number, room)
            assert name != "_gemm_kernel" or ".s32.s8.s8.s32" in ptx, "no matrix unit multiplies whole numbers"
            count += 1
    print(f"compiled {count} kernels")


def fits(kernel, number, room):
    """Its instructions; the last compilation is for that GPU and asks for no more shared memory than it has."""
    made = kernel.made
    assert f".target sm_{number}" in made.asm["ptx"], f"{kernel} was compiled for another GPU"
    assert made.metadata.shared <= room, f"{kernel} takes {made.metadata.shared} of {room} on sm_{number}"
    return made.asm["ptx"]


if __name__ == "__main__":
    main()
