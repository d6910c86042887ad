"""The denoise kernels on a GPU with E4M3 in every product, two requests at a time, and with what is not a number.

Kernel and reference get the same operands in the same formats: they may differ by summation and by one code of the result.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends import eager
from vivace.backends.loop import run_flow
from vivace.config import EngineConfig, GemmaConfig, VisionConfig
from vivace.ops import denoise, prefill, reference, row_scales
from vivace.ops.layers import Linear, RmsNorm
from vivace.ops.table import reference_ops
from vivace.precision import calibrate, plan, quantize
from vivace.precision.flavours import parameter_dtype
from vivace.precision.quantize import quantise_layer
from vivace.types import ModelInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs an NVIDIA GPU with E4M3",
    ),
]
HEADS, BATCH = (8, 1, 256), 2
CODE, ROUNDING = 2**-5, 2**-8  # one code of E4M3, one rounding to bfloat16, as relative L2
EARLY = pytest.mark.parametrize("early", [False, True], ids=["late", "early"])


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def layer(out, inside, seed, *, name="expert.layers.0.mlp.down", amax=8.0):
    made = Linear(inside, out, name=name).cuda().requires_grad_(False)
    made.weight.data = (rand(out, inside, seed=seed) / inside**0.5).bfloat16()
    return quantise_layer(made, amax=amax)


def handed(T, into, seed):
    """[BATCH, T, inside] as `into` takes it."""
    return reference.hand_over(rand(BATCH, T, into.weight.shape[1], seed=seed), into)


def near(got, wanted, bound):
    assert got.dtype == wanted.dtype or got.dtype == torch.float32
    got, wanted = got.float(), wanted.float()
    assert torch.isfinite(got).all()
    assert float((got - wanted).norm() / wanted.norm()) < bound


def kernels(early):
    return denoise.denoise_ops(reference_ops(), early_weights=early)


@EARLY
@pytest.mark.parametrize("T", [5, 8, 10, 25, 32, 50, 64])
@pytest.mark.parametrize("modulated", ["one row", "per token"])
def test_mlp_of_two_requests(T, early, modulated):
    gate_up, down, qkv = layer(8192, 1024, 1), layer(1024, 4096, 2), layer(2560, 1024, 3)
    x8, ops = handed(T, gate_up, seed=T), kernels(early)
    hidden = reference.geglu(x8, gate_up, down)
    near(ops.geglu(x8, gate_up, down), hidden, CODE)
    modulation, norm = rand(1 if modulated == "one row" else T, 3072, seed=4), RmsNorm(1024, name="n", modulated=True)
    residual = rand(BATCH, T, 1024, seed=5)
    arguments = hidden, down, residual, modulation[:, 2048:], norm, modulation, qkv
    for got, wanted, bound in zip(
        ops.linear_residual_norm(*arguments), reference.linear_residual_norm(*arguments), (ROUNDING, CODE), strict=True
    ):
        near(got, wanted, bound)


@EARLY
@pytest.mark.parametrize(("T", "S"), [(5, 560), (10, 560), (32, 304), (50, 968)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_two_requests(T, S, early, masked):
    qkv, o, gate_up = layer(2560, 1024, 1), layer(1024, 2048, 2, name="attn.o", amax=4.0), layer(8192, 1024, 3)
    ops, angle = kernels(early), rand(1, T, 128, seed=3)
    rope = torch.cos(angle).bfloat16(), torch.sin(angle).bfloat16()
    past = rand(BATCH, S, 1, 256, seed=4).bfloat16(), rand(BATCH, S, 1, 256, seed=5).bfloat16()
    mask = None
    if masked:
        mask = torch.arange(S + T, device="cuda").expand(BATCH, -1) % 5 != torch.arange(BATCH, device="cuda")[:, None]
    x8 = handed(T, qkv, seed=T)
    wanted = reference.qkv_rope(x8, qkv, rope, HEADS)
    for mine, want in zip(ops.qkv_rope(x8, qkv, rope, HEADS), wanted, strict=True):
        near(mine, want, ROUNDING)
    mixed = reference.attention(*wanted, mask, past, o)
    near(ops.attention(*wanted, mask, past, o), mixed, CODE)
    residual, norm, modulation = (
        rand(BATCH, T, 1024, seed=7),
        RmsNorm(1024, name="n", modulated=True),
        rand(1, 3072, seed=8),
    )
    arguments = mixed, o, residual, None, norm, modulation, gate_up
    near(ops.linear_residual_norm(*arguments)[0], reference.linear_residual_norm(*arguments)[0], ROUNDING)


def only_row(out, batch, token):
    """NaN in that row alone; NaN of E4M3 becomes NaN of float32."""
    broken = out.float().isnan().flatten(2).any(-1)
    assert bool(broken[batch, token]), "NaN was lost"
    broken[batch, token] = False
    assert not bool(broken.any()), "NaN reached another token"


@EARLY
@pytest.mark.parametrize("T", [5, 25])
def test_nan_in_nan_out(T, early):
    """One broken token; every result in E4M3 says so, and no other token does."""
    gate_up, down, qkv, o = layer(8192, 1024, 1), layer(1024, 4096, 2), layer(2560, 1024, 3), layer(1024, 2048, 4)
    ops, norm, modulation = kernels(early), RmsNorm(1024, name="n", modulated=True), rand(1, 3072, seed=5)
    x = rand(BATCH, T, 1024, seed=6).bfloat16()
    x[1, 3, 7] = float("nan")
    only_row(ops.rms_norm(x, norm, modulation, qkv), 1, 3)
    x8 = reference.hand_over(x, gate_up)
    hidden = ops.geglu(x8, gate_up, down)
    only_row(hidden, 1, 3)
    for out in ops.linear_residual_norm(hidden, down, rand(BATCH, T, 1024, seed=7), None, norm, modulation, qkv):
        only_row(out, 1, 3)
    q, k, v = (rand(BATCH, T, heads, 256, seed=heads).bfloat16() for heads in (*HEADS[:2], 1))
    past = rand(BATCH, 96, 1, 256, seed=8).bfloat16(), rand(BATCH, 96, 1, 256, seed=9).bfloat16()
    q[1, 3, 2] = float("nan")
    only_row(ops.attention(q, k, v, None, past, o), 1, 3)
    past[1][0, 40] = float("nan")  # a broken prefix: every token of that request
    assert ops.attention(q, k, v, None, past, o)[0].float().isnan().any(-1).all()
    leave, enter = (Linear(*shape, name="action").cuda().requires_grad_(False) for shape in ((1024, 32), (32, 1024)))
    for made in (leave, enter):
        made.weight.data = rand(*made.weight.shape, seed=1)
    for out in ops.step_boundary(x, leave, rand(BATCH, T, 32, seed=2), -0.1, enter, norm, modulation, qkv):
        only_row(out, 1, 3)


def test_nan_in_nan_out_of_the_prefill():
    gate_up, down = layer(32768, 2048, 1, name="gate_up"), layer(2048, 16384, 2, name="down")
    ops = prefill.prefill_ops(torch.nn.ModuleList([gate_up, down]))
    norm = RmsNorm(2048, name="n").cuda().requires_grad_(False)
    norm.weight.zero_()
    for rows in (304, 400, 512):  # rows that ride along, cuBLAS and a kernel, whole tiles
        x = rand(1, rows, 2048, seed=3).bfloat16()
        x[0, rows - 1, 5] = float("nan")
        normed = ops.rms_norm(x, norm, None, gate_up)
        only_row(normed, 0, rows - 1)
        hidden = ops.geglu(normed, gate_up, down)
        only_row(hidden, 0, rows - 1)
        for out in ops.linear_residual_norm(
            hidden, down, rand(1, rows, 2048, seed=4).bfloat16(), None, norm, None, gate_up
        ):
            only_row(out, 0, rows - 1)


# --- a whole chunk ----------------------------------------------------------------------------------------------------


def network(device):
    """Few layers at full width of the expert, which is what the kernels are cut for; bfloat16."""
    config = replace(
        tiny_config("pi05"),
        vision=VisionConfig(width=144, layers=1, mlp_width=304, num_heads=2, patch_size=14, image_size=56),
        prefix=GemmaConfig(width=512, layers=3, mlp_width=1024, num_heads=8, num_kv_heads=1, head_dim=256),
        expert=GemmaConfig(width=1024, layers=3, mlp_width=4096, num_heads=8, num_kv_heads=1, head_dim=256),
    )

    def bf16(name):
        return parameter_dtype(name, precision="bfloat16", flavour="openpi_torch")

    return build(config, random_tensors(config), dtype_of=bf16, device=device)


def request(batch, device):
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (batch, 2, 3, 56, 56), dtype=torch.uint8, generator=g).to(device)
    return ModelInputs(images, torch.randint(0, 64, (batch, 9), generator=g).to(device))


def quantised(model, inputs, noise, scale):
    """`model` under the plan fp8-expert, its ranges seen on this very request; the model as it was, in float32, too.

    scale  "tensor", "row" or "step": the plan's input scales
    """
    wide = copy.deepcopy(model).float()
    backend = eager.create(model, EngineConfig(num_denoise_steps=4))
    with calibrate.watch(model) as ranges:
        cache = backend.prefill(inputs)
        ranges.begin_denoise()
        backend.denoise(cache, noise)
    chosen = plan.preset("fp8-expert").with_input_scale(scale)
    done = quantize.apply(model, calibrate.with_ranges(chosen, ranges, data="synthetic: test"))
    assert {name for name in done if name.startswith("expert.layers.1.")} == {
        f"expert.layers.1.{part}" for part in ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
    }
    return wide


@torch.no_grad()
def chunks(batch, horizon, tables, device="cuda", scale="tensor"):
    """(truth in float32, {name: actions with the operations of that name}); all but truth under one FP8 plan and cache."""
    model, inputs = network(device), request(batch, device)
    noise = torch.randn(batch, horizon, 32, generator=torch.Generator().manual_seed(4)).to(device)
    truth = eager.create(quantised(model, inputs, noise, scale), EngineConfig(num_denoise_steps=4)).infer(inputs, noise)
    cache, table = eager.create(model, EngineConfig(num_denoise_steps=4)).prefill(inputs), model.time_table(4)
    found = {}
    for name, ops in tables.items():
        model.ops = ops
        found[name] = run_flow(model, None, table, cache, noise, previous=None, trace=None)
    return truth, found


@pytest.mark.parametrize(("batch", "horizon"), [(1, 10), (2, 5), (1, 50), (2, 25), (2, 50)])
@pytest.mark.parametrize("scale", ["tensor", "row", "step"])
def test_a_chunk_under_an_fp8_plan(batch, horizon, scale):
    """With early weights and without: as near to float32 as the reference operations, and nearer to them than that."""
    ran = {"late": set(), "early": set()}
    tables = {"plain": reference_ops()}
    for name, said in ran.items():
        tables[name] = denoise.denoise_ops(
            reference_ops(), record=lambda *what, said=said: said.add(what), early_weights=name == "early"
        )
    truth, found = chunks(batch, horizon, tables, scale=scale)
    allowed = (found["plain"] - truth).norm()
    assert allowed > 0
    for name in ran:
        assert torch.isfinite(found[name]).all()
        assert (found[name] - truth).norm() <= 1.25 * allowed, name
        assert (found[name] - found["plain"]).norm() <= allowed, name
    products = {"qkv_rope", "linear_residual_norm", "geglu"}
    late = {"triton", row_scales.KERNEL} if scale == "row" else {"triton"}
    assert {kernel for _, operation, kernel in ran["late"] if operation in products} == late
    hopper = torch.cuda.get_device_capability()[0] == 9 and batch * horizon <= 64
    kernels_of = {kernel for _, operation, kernel in ran["early"] if operation in products}
    assert kernels_of == ({"gluon early weights"} if hopper and scale != "row" else late)
