"""Run by test_denoise.py in a process with TRITON_INTERPRET=1. Prints "checked N comparisons"; asserts on the way."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends import eager
from vivace.backends.loop import run_flow
from vivace.config import EngineConfig
from vivace.ops import (
    denoise,
    denoise_attention,
    denoise_boundary,
    denoise_gemm,
    denoise_norm,
    launch,
    reference,
    row_scales,
)
from vivace.ops.denoise import Tiles
from vivace.ops.denoise_attention import AttentionTile
from vivace.ops.denoise_gemm import Tile
from vivace.ops.layers import Linear, RmsNorm
from vivace.ops.table import reference_ops
from vivace.precision import quantize
from vivace.precision.fit import all_layers
from vivace.precision.plan import preset
from vivace.precision.quantize import quantise_layer
from vivace.types import ModelInputs

TOLERANCE = 2e-6  # relative, float32 sums in another order
COUNT = [0]


def rand(*shape, seed=[0]):  # noqa: B006
    seed[0] += 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0]))


def layer(out, inside, name="x", *, bias=False):
    made = Linear(inside, out, name=name, bias=bias).requires_grad_(False)
    made.weight.data = rand(out, inside) / inside**0.5
    if bias:
        made.bias.data = rand(out)
    return made


def close(got, wanted, tolerance=TOLERANCE):
    COUNT[0] += 1
    error = ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
    assert error <= tolerance, f"relative error {error}"  # NaN fails too
    assert got.shape == wanted.shape


def neighbours(got, wanted):
    """E4M3 results: each within one code of the reference.

    Triton's interpreter loses the carry when rounding up to a power of two (64 instead of 128); few values may be halves.
    """
    COUNT[0] += 1
    got, wanted = got.float(), wanted.float()
    assert got.isfinite().all()
    near = (got - wanted).abs() <= wanted.abs() / 8 + 2**-9
    assert (near | (got == wanted / 2)).all()
    assert near.float().mean() > 0.9


@contextmanager
def exact_rows():
    """Codes of rows by the reference, for what is compared behind them: see `neighbours`."""
    mine = row_scales.quantise
    row_scales.quantise = lambda x, *, pdl: reference.rows_to_e4m3(x)
    try:
        yield
    finally:
        row_scales.quantise = mine


def tables(rows, half):
    angle = rand(1, rows, half)
    return torch.cos(angle), torch.sin(angle)


def products():
    for M, K, N, split in [(7, 48, 24, 1), (50, 64, 32, 4), (3, 80, 40, 3), (70, 32, 16, 2)]:
        x, made = rand(M, K), layer(N, K)
        tile = Tile(16, 16, split_k=split)
        close(denoise_gemm.parts(x, made, tile).sum(0), reference.linear(x, made))
        close(denoise_gemm.parts(x, made, replace(tile, ahead=True)).sum(0), reference.linear(x, made))
        once = Tile(16, 32, split_k=-(-K // 32), ahead=True)  # one block each, nothing left for the loop
        close(denoise_gemm.parts(x, made, once).sum(0), reference.linear(x, made))
        paired = layer(2 * N, K)
        for cut in (Tile(16, 32), Tile(16, 32, ahead=True), Tile(16, 128, ahead=True)):
            close(denoise_gemm.geglu(x, paired, layer(8, N), cut), reference.geglu(x, paired, layer(8, N)))
        quantised = quantise_layer(made, amax=float(x.abs().max()))
        x8 = reference.hand_over(x, quantised)
        close(denoise_gemm.parts(x8, quantised, tile).sum(0), reference.linear(x, quantised))
        down = quantise_layer(layer(8, N), amax=2.0)
        neighbours(denoise_gemm.geglu(x, paired, down, Tile(16, 32)), reference.geglu(x, paired, down))
        if split not in (1, 2):
            continue
        rowed, into = quantise_layer(made, amax=None), quantise_layer(layer(8, N), amax=None)
        x[0] *= 1e4
        codes, scales = row_scales.quantise(x, pdl=False)
        assert torch.equal(scales, reference.rows_to_e4m3(x)[1])
        neighbours(codes, reference.rows_to_e4m3(x)[0])
        with exact_rows():
            close(denoise_gemm.parts(x, rowed, tile).sum(0), reference.linear(x, rowed))
            pair = quantise_layer(paired, amax=None)
            close(denoise_gemm.geglu(x, pair, into, Tile(16, 32)), reference.geglu(x, pair, into))
    for heads, D in [((8, 1, 16), 32), ((4, 2, 32), 24)]:
        N, K, head_dim = heads
        made, x, rope = layer((N + 2 * K) * head_dim, D), rand(2, 5, D), tables(5, head_dim // 2)
        flat = (rope[0].flatten(0, 1), rope[1].flatten(0, 1))
        wanted = torch.cat([part.flatten(2) for part in reference.qkv_rope(x, made, rope, heads)], -1)
        for cut in (Tile(8, 16), Tile(8, 16, ahead=True), Tile(32, 16)):  # the last is wider than half a head
            close(denoise_gemm.qkv(x.flatten(0, 1), made, flat, heads, cut), wanted.flatten(0, 1))
        rowed = quantise_layer(made, amax=None)
        wanted = torch.cat([part.flatten(2) for part in reference.qkv_rope(x, rowed, rope, heads)], -1)
        with exact_rows():
            close(denoise_gemm.qkv(x.flatten(0, 1), rowed, flat, heads, Tile(8, 16)), wanted.flatten(0, 1))
    for out, inside in [(32, 100), (100, 32), (7, 16)]:
        made, x = layer(out, inside, bias=True), rand(6, inside)
        close(denoise_gemm.narrow(x, made), reference.linear(x, made))


def norms():
    for M, D, P, rows in [(7, 48, 4, 1), (6, 33, 1, 6), (6, 64, 8, 3)]:
        parts, residual, modulation = rand(P, M, D), rand(M, D), rand(rows, 3 * D)
        into, gate = layer(8, D), modulation[:, 2 * D :]
        norm = RmsNorm(D, name="n", modulated=True)
        every = torch.arange(M) % rows
        summed = residual + gate[every] * parts.sum(0)
        total, out = denoise_norm.sum_norm(parts, residual, gate, norm, modulation, into)
        close(total, summed)
        close(out, reference.rms_norm(summed[None], norm, modulation[every], into)[0])
        plain = RmsNorm(D, name="n").requires_grad_(False)
        plain.weight.data = rand(D)
        _, out = denoise_norm.sum_norm(parts, residual, None, plain, None, into)
        close(out, reference.rms_norm((residual + parts.sum(0))[None], plain, None, into)[0])
        _, out = denoise_norm.sum_norm(None, residual, None, plain, None, into)
        close(out, reference.rms_norm(residual[None], plain, None, into)[0])
        small = quantise_layer(into, amax=1.0)  # saturates: the largest values must stay 448, not become NaN
        _, out = denoise_norm.sum_norm(None, residual * 9, None, plain, None, small)
        neighbours(out, reference.rms_norm(residual[None] * 9, plain, None, small)[0])


def boundary():
    for M, D, A, rows in [(7, 48, 32, 1), (6, 33, 5, 6), (3, 64, 16, 1)]:
        n, x, modulation = rand(1, M, D), rand(1, M, A), rand(rows, 3 * D)
        leave, enter = layer(A, D, bias=True), layer(D, A, bias=rows == 1)
        norm, into = RmsNorm(D, name="n", modulated=True), layer(8, D)
        plain = RmsNorm(D, name="n").requires_grad_(False)
        plain.weight.data = rand(D)
        for how in ((norm, modulation), (plain, None)):
            got = denoise_boundary.step_boundary(n[0], leave, x[0], -0.1, enter, *how, into)
            wanted = reference.step_boundary(n, leave, x, -0.1, enter, *how, into)
            for one, other in zip(got, wanted, strict=True):
                close(one, other[0])
        small = quantise_layer(into, amax=2.0)
        got = denoise_boundary.step_boundary(n[0], leave, x[0], -0.1, enter, norm, modulation, small)[3]
        neighbours(got, reference.step_boundary(n, leave, x, -0.1, enter, norm, modulation, small)[3][0])


def attention():
    for B, T, S, heads, tile in [
        (1, 5, 40, (8, 1, 16), AttentionTile(rows=16, keys=16)),
        (2, 7, 33, (4, 2, 16), AttentionTile(rows=16, keys=16, combine_rows=4)),
        (1, 20, 12, (8, 1, 16), AttentionTile(rows=64, keys=32)),
    ]:
        N, K, head_dim = heads
        packed = rand(B, T, N + 2 * K, head_dim)
        q, k, v = packed.split([N, K, K], dim=2)
        past, into = (rand(B, S, K, head_dim), rand(B, S, K, head_dim)), layer(8, N * head_dim)
        for mask in (None, torch.arange(S + T).expand(B, -1) % 3 != 1, torch.arange(S + T).expand(B, -1) >= 18):
            got = denoise_attention.attention(q, k, v, mask, past, into, tile)
            close(got, reference.attention(q, k, v, mask, past, into))
        # a masked key has exactly zero probability: whatever it holds, the bits stay
        mask = torch.arange(S + T).expand(B, -1) != 3
        before = denoise_attention.attention(q, k, v, mask, past, into, tile)
        past[0][:, 3], past[1][:, 3] = 100.0, -1e6
        assert torch.equal(before, denoise_attention.attention(q, k, v, mask, past, into, tile))
        small = quantise_layer(into, amax=2.0)
        got = denoise_attention.attention(q, k, v, mask, past, small, tile)
        neighbours(got, reference.attention(q, k, v, mask, past, small))


def strides():
    """Tensors from outside may lie in memory as they like: noise in Fortran order gives what a plain copy of it gives."""
    into, leave, enter = layer(24, 48), layer(32, 48, "action_out", bias=True), layer(48, 32, "action_in", bias=True)
    n, norm = RmsNorm(48, name="n", modulated=True), rand(1, 144)
    ran = []
    ops = denoise.denoise_ops(reference_ops(), SMALL, record=lambda *what: ran.append(what))
    x, h = fortran(rand(1, 50, 32)), fortran(rand(1, 50, 48))
    assert x.stride()[1:] == (1, 50), "the noise of this test is not strided"
    close(denoise_gemm.narrow(x[0], enter), reference.linear(x[0], enter))
    close(ops.linear(x, enter), reference.linear(x, enter))
    close(ops.rms_norm(h, n, norm, into), reference.rms_norm(h, n, norm, into))
    gate_up = layer(32, 48)
    close(ops.geglu(h, gate_up, layer(8, 16)), reference.geglu(h, gate_up, layer(8, 16)))
    got = ops.step_boundary(h, leave, x, -0.1, enter, n, norm, into)
    for mine, wanted in zip(got, reference.step_boundary(h, leave, x, -0.1, enter, n, norm, into), strict=True):
        close(mine, wanted)
    assert ("action_out", "step_boundary", "triton") in ran
    T, S, tile = 5, 40, AttentionTile(rows=16, keys=16)
    q, k, v = (rand(2, T, heads, 16) for heads in (8, 1, 1))
    past, o = (rand(2, S, 1, 16), rand(2, S, 1, 16)), layer(8, 128)
    mask = rand(2, S + T) > 0
    strided = torch.empty_strided(mask.shape, (1, 2), dtype=torch.bool).copy_(mask)
    got = denoise_attention.attention(q, k, v, strided, past, o, tile)
    close(got, reference.attention(q, k, v, mask, past, o))


def fortran(x):
    """The same numbers, the last but one axis dense."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


SMALL = Tiles(
    qkv=Tile(8, 16), o=Tile(16, 32, split_k=2), gate_up=Tile(16, 16), down=Tile(16, 16, split_k=2),
    attention=AttentionTile(rows=16, keys=16),
)  # fmt: skip


def policy():
    """The whole tiny policy, both kinds, plain and masked, equals the eager backend; what ran is recorded."""
    for kind, masked in (("pi05", True), ("pi0", False)):
        config = tiny_config(kind)
        model, size = build(config, random_tensors(config)), config.vision.image_size
        ran = set()
        for mask in (torch.tensor([[True, True, True, False, False]]) if masked else None,):
            inputs = ModelInputs(rand(1, 2, 3, size, size), torch.arange(5)[None], token_mask=mask, state=rand(1, 32))
            noise = rand(1, config.horizon, 32)
            answers = []
            kernels = denoise.denoise_ops(reference_ops(), SMALL, record=lambda *what, ran=ran: ran.add(what))
            for ops in (reference_ops(), kernels):
                model.ops = ops
                backend = eager.create(model, EngineConfig(num_denoise_steps=1))
                cache = backend.prefill(inputs)
                answers.append(backend.denoise(cache, noise))
            close(answers[1], answers[0], 1e-5)
            if kind == "pi05":  # pi0 has no other way than step by step
                with torch.no_grad():
                    two = model.time_table(2)
                    chunk = run_flow(model, None, two, cache, noise, previous=None, trace=None)
                    steps = run_flow(model, model.denoise_step, two, cache, noise, previous=None, trace=None)
                close(chunk, steps, 1e-5)
            assert (("action_out", "step_boundary", "triton") in ran) == (kind == "pi05")
        layers = {layer for layer, operation, _ in ran if operation in ("qkv_rope", "geglu", "linear_residual_norm")}
        parts = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
        assert {f"expert.layers.{i}.{part}" for i in range(3) for part in parts} <= layers


def scales():
    """The tiny policy with E4M3 inputs of the expert, scaled by row and by step, against the reference operations.

    By step the interpreter's codes are wrong now and then (see `neighbours`), by far less than the scales of other steps.
    """
    config, observed = tiny_config("pi05"), torch.arange(5)[None]
    size, noise = config.vision.image_size, rand(1, config.horizon, 32)
    inputs = ModelInputs(rand(1, 2, 3, size, size), observed, state=rand(1, 32))
    ran = set()
    kernels = denoise.denoise_ops(reference_ops(), SMALL, record=lambda *what: ran.add(what))
    plain, answers = reference_ops(), {}
    for kind, steps, tables in (
        ("row", (), (plain, kernels)),
        ("step", (3.0, 0.2), (plain, kernels)),
        ("step", (0.2, 3.0), (plain,)),  # another step's scales, for comparison
    ):
        model, count = build(config, random_tensors(config)), max(len(steps), 1)
        names = [one for one in all_layers(model) if one.startswith("expert.layers.")]
        chosen = replace(preset("fp8-expert").with_input_scale(kind), amax=dict.fromkeys(names, 3.0))
        quantize.apply(model, replace(chosen, step_amax=dict.fromkeys(names, steps) if steps else {}))
        cache = eager.create(model, EngineConfig(num_denoise_steps=count)).prefill(inputs)
        with torch.no_grad(), exact_rows() if kind == "row" else nullcontext():
            for ops in tables:
                model.ops, table = ops, model.time_table(count)
                chunk = run_flow(model, None, table, cache, noise, previous=None, trace=None)
                answers[steps, ops is kernels] = chunk
    close(answers[(), True], answers[(), False])
    parts = {"qkv_rope", "geglu", "linear_residual_norm"}
    assert {operation for _, operation, kernel in ran if kernel == row_scales.KERNEL} == parts
    mine, wanted, other = answers[(3.0, 0.2), True], answers[(3.0, 0.2), False], answers[(0.2, 3.0), False]
    close(mine, wanted, 0.2 * float((wanted - other).norm() / wanted.norm()))


def poison():
    """Every output element is written: outputs start as NaN and end finite."""
    empty = torch.empty

    def poisoned(*shape, dtype=None, device=None):
        made = empty(*shape, dtype=dtype, device=device)
        return made.fill_(float("nan"))

    torch.empty = poisoned
    try:
        products(), norms(), attention(), boundary()
    finally:
        torch.empty = empty


if __name__ == "__main__":
    assert launch.INTERPRET, "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    groups = {"products": products, "norms": norms, "attention": attention, "boundary": boundary, "strides": strides}
    {**groups, "policy": policy, "scales": scales, "poison": poison}[sys.argv[1]]()
    print(f"checked {COUNT[0]} comparisons")
