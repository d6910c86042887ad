"""Run by test_denoise_ahead.py in a process of its own, without the interpreter. Compiles for Hopper, no GPU needed.

Compiling says that layouts, copies and shared memory are possible, and the order of instructions is read from the result;
what the kernels compute is checked on a GPU. Prints "checked N kernels"; asserts on the way.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vivace.ops import denoise_ahead, launch
from vivace.ops.denoise_ahead import AHEAD_TILES, AheadTile
from vivace.ops.layers import Fp8Linear, Linear

HEADS = (8, 1, 256)
WIDTHS = {"qkv": (2560, 1024), "o": (1024, 2048), "gate_up": (8192, 1024), "down": (1024, 4096)}
COLUMNS = {"qkv": 2560, "o": 1024, "gate_up": 4096, "down": 1024}


class Hopper:
    """What the compiler asks a driver, for a GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel):
        self.kernel, self.grid, self.made = kernel, None, None

    def __getitem__(self, grid):
        def launch_on(*args, **kwargs):
            self.grid, self.made = grid, self.kernel.warmup(*args, grid=grid, **kwargs)

        return launch_on


def layer(name, fp8):
    weight = torch.zeros(WIDTHS[name])
    if fp8:
        scale = torch.ones(weight.shape[0])
        return Fp8Linear(name, weight.to(torch.float8_e4m3fn), weight_scale=scale, input_scale=torch.ones(1), bias=None)
    made = Linear(weight.shape[1], weight.shape[0], name=name).requires_grad_(False)
    made.weight.data = weight.bfloat16()
    return made


def call(name, rows, tile, fp8):
    linear = layer(name, fp8)
    x = torch.zeros(rows, linear.weight.shape[1], dtype=linear.weight.dtype)
    if name == "qkv":
        table = torch.zeros(rows, 128, dtype=torch.bfloat16)
        return denoise_ahead.qkv(x, linear, (table, table), HEADS, tile)
    if name == "gate_up":
        return denoise_ahead.geglu(x, linear, layer("down", fp8), tile)
    return denoise_ahead.parts(x, linear, tile)


def check(kernel, out, name, rows, tile, fp8):
    pairs = 2 if name in ("qkv", "gate_up") else 1
    assert kernel.grid == (WIDTHS[name][0] // (tile.block_n * pairs), tile.split_k)
    assert out.shape == ((tile.split_k,) if pairs == 1 else ()) + (rows, COLUMNS[name])
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    assert out.dtype == {"o": torch.float32, "down": torch.float32, "qkv": torch.bfloat16}.get(name, kind)
    assert kernel.made.metadata.shared <= denoise_ahead.SHARED_BYTES
    ptx = kernel.made.asm["ptx"]
    wait = ptx.index("griddepcontrol.wait")
    copies = [found.start() for found in re.finditer(r"cp\.async\.bulk\.tensor", ptx)]
    before = sum(at < wait for at in copies)
    chunk = 64 if rows <= 16 else 128
    weights = pairs * WIDTHS[name][1] * layer(name, fp8).weight.element_size() // (chunk * tile.split_k)
    assert before == weights // (tile.warps if rows <= 16 else 1), "all weights are asked for before the wait"
    assert ptx.index("griddepcontrol.launch_dependents") < copies[0]
    products = ptx.index("mma.sync" if rows <= 16 else "wgmma.mma_async")
    assert products > wait
    assert "st.global" not in ptx[:wait], "nothing is written before the wait"
    if rows <= 16:
        assert len(copies) == before
        assert "ld.global.v4" in ptx[wait:products], "x comes 16 bytes a thread"
        assert "ld.global.v4" not in ptx[:wait], "x is read after the wait"
    else:
        assert len(copies) > before


def main():
    kernels = {name: Compiled(getattr(denoise_ahead, name)) for name in ("few_kernel", "many_kernel")}
    vars(denoise_ahead).update(kernels)
    vars(launch)["programmatic"] = lambda x: True
    vars(launch)["share"] = lambda launched, percent: None
    driver.set_active(Hopper())
    count = 0
    for (rows, fp8), tiles in AHEAD_TILES.items():
        kernel = kernels["few_kernel" if rows <= 16 else "many_kernel"]
        for name in WIDTHS:
            tile = getattr(tiles, name)
            for tokens in (rows, rows - 6):
                out = call(name, tokens, tile, fp8)
                check(kernel, out, name, tokens, tile, fp8)
                count += 1
    call("down", 10, replace(AheadTile(32, 4), early=False), False)
    ptx = kernels["few_kernel"].made.asm["ptx"]
    assert ptx.rindex("mma.sync") < ptx.index("griddepcontrol.launch_dependents"), (
        "a late trigger comes after the products"
    )
    print(f"checked {count + 1} kernels")


if __name__ == "__main__":
    main()
