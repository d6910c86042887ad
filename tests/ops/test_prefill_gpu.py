"""The prefill's operations on a GPU at the model's own shapes and odd ones: two errors, equal bits, no silent format.

Rule: our error against float32 on the same weights is at most twice that of the plain operations in the same formats.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from vivace.ops import blocks, prefill, prefill_limits, reference
from vivace.ops.layers import LayerNorm, Linear, RmsNorm
from vivace.ops.prefill_gemm import Tile
from vivace.ops.prefill_tuning import Choice, Key, Tuning, tuning_for
from vivace.ops.table import reference_ops
from vivace.precision.quantize import quantise_layer

pytestmark = pytest.mark.gpu
CAPABILITY = torch.cuda.get_device_capability()
BF16 = torch.bfloat16
PREFIX_ROWS, VISION_VIEWS = (968, 784, 560, 512, 304, 259), (3, 2, 1)
FORMATS = ["bf16", "fp8", "fp8-rows", "int8"]


def linear(rows, columns, *, name, seed, bias=False):
    g = torch.Generator(device="cuda").manual_seed(seed)
    layer = Linear(columns, rows, name=name, bias=bias).cuda().to(BF16).requires_grad_(False)
    layer.weight.copy_(torch.randn(rows, columns, generator=g, device="cuda") * columns**-0.5)
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(rows, generator=g, device="cuda"))
    return layer


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator(device="cuda").manual_seed(seed), device="cuda")


def in_format(layer, kind, amax=6.0):
    if kind == "bf16":
        return layer
    made = quantise_layer(layer, amax=None if kind == "fp8-rows" else amax, format="int8" if kind == "int8" else "e4m3")
    if reason := prefill_limits.why_not_layer(made, capability=CAPABILITY):
        pytest.skip(reason)
    return made


def wide(layer):
    """The float32 layer that the bfloat16 one was meant to be."""
    made = Linear(layer.weight.shape[1], layer.weight.shape[0], name=layer.name, bias=layer.bias is not None).cuda()
    made.requires_grad_(False).weight.copy_(layer.weight)
    if layer.bias is not None:
        made.bias.copy_(layer.bias)
    return made


def ops_for(*layers):
    return prefill.prefill_ops(torch.nn.ModuleList(layers))


def numbers(x, into):
    """A result as float32 numbers, whatever format it was handed over in."""
    return x.float() * into.input_scale if x.element_size() == 1 else x.float()


def check(mine, plain, truth):
    """Two errors; every value written."""
    for ours, theirs, right in zip(mine, plain, truth, strict=True):
        assert torch.isfinite(ours).all()
        scale = right.float().norm()
        error, allowed = (ours - right.float()).norm() / scale, (theirs - right.float()).norm() / scale
        assert error <= 2 * allowed, (float(error), float(allowed))


def both(ops, call, into):
    """Ours (twice, equal bits), the reference in the same formats, and the reference in float32; all as float32."""
    mine = call(ops)
    again = call(ops)
    plain, truth = call(reference_ops()), call(reference_ops(), wide=True)
    for first, second in zip(mine, again, strict=True):
        assert torch.equal(first, second), "two runs differ"
    return ([numbers(x, into) for x in mine], [numbers(x, into) for x in plain], [x.float() for x in truth])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", PREFIX_ROWS)
def test_gated_mlp(kind, rows):
    plain_up, plain_down = linear(32768, 2048, name="gate_up", seed=0), linear(2048, 16384, name="down", seed=1)
    up, down = in_format(plain_up, kind), in_format(plain_down, kind)
    exact_up, exact_down = wide(plain_up), wide(plain_down)
    x = randn(1, rows, 2048, seed=2).to(BF16)

    def call(table, *, wide=False):
        if wide:
            return (table.geglu(x.float(), exact_up, exact_down),)
        return (table.geglu(reference.hand_over(x, up), up, down),)

    check(*both(ops_for(up, down), call, down))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", PREFIX_ROWS)
@pytest.mark.parametrize("inner", [2048, 16384], ids=["o", "down"])
def test_end_of_a_branch(kind, rows, inner):
    plain_layer, plain_into = linear(2048, inner, name="branch", seed=0), linear(2560, 2048, name="qkv", seed=1)
    layer, into = in_format(plain_layer, kind), in_format(plain_into, kind, amax=12.0)
    exact = wide(plain_layer)
    norm = RmsNorm(2048, name="norm").cuda().requires_grad_(False)
    norm.weight.copy_(randn(2048, seed=2) * 0.2)
    x, old = randn(1, rows, inner, seed=3).to(BF16), randn(1, rows, 2048, seed=4).to(BF16)

    def call(table, *, wide=False):
        if wide:
            return table.linear_residual_norm(x.float(), exact, old.float(), None, norm, None, exact)
        handed = reference.hand_over(x, layer)
        return table.linear_residual_norm(handed, layer, old, None, norm, None, into)

    check(*both(ops_for(layer, into), call, into))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", PREFIX_ROWS)
def test_projection_and_rotation(kind, rows):
    plain_layer = linear(2560, 2048, name="qkv", seed=0)
    layer, exact = in_format(plain_layer, kind), wide(plain_layer)
    x = randn(1, rows, 2048, seed=1).to(BF16)
    angles = randn(1, rows, 128, seed=2)
    rope = (torch.cos(angles), torch.sin(angles))

    def call(table, *, wide=False):
        if wide:
            return table.qkv_rope(x.float(), exact, rope, (8, 1, 256))
        rounded = rope[0].to(BF16), rope[1].to(BF16)
        return table.qkv_rope(reference.hand_over(x, layer), layer, rounded, (8, 1, 256))

    check(*both(ops_for(layer), call, layer))


@pytest.mark.parametrize("rows", PREFIX_ROWS)
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "mask"])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention(rows, masked, batch):
    into = linear(2048, 2048, name="o", seed=0)
    q = randn(batch, rows, 8, 256, seed=1).to(BF16)
    k, v = (randn(batch, rows, 1, 256, seed=seed).to(BF16) for seed in (2, 3))
    mask = torch.arange(rows, device="cuda").expand(batch, rows) < rows - 70 if masked else None
    mask = mask.contiguous() if mask is not None else None

    def call(table, *, wide=False):
        qkv = (t.float() if wide else t for t in (q, k, v))
        return (table.attention(*qkv, mask, None, into if not wide else Linear(1, 1, name="float32").cuda()),)

    check(*both(ops_for(into), call, into))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("views", VISION_VIEWS)
def test_siglip_block(kind, views):
    names = {"qkv": (3456, 1152), "o": (1152, 1152), "fc1": (4304, 1152), "fc2": (1152, 4304)}
    plain = {n: linear(*shape, name=n, seed=i, bias=True) for i, (n, shape) in enumerate(names.items())}
    layers = {n: in_format(layer, kind) for n, layer in plain.items()}
    exact = {n: wide(layer) for n, layer in plain.items()}
    norm = LayerNorm(1152, name="norm").cuda().to(BF16).requires_grad_(False)
    norm.weight.copy_(1 + randn(1152, seed=7) * 0.1)
    norm.bias.copy_(randn(1152, seed=8) * 0.1)
    exact_norm = LayerNorm(1152, name="norm").cuda().requires_grad_(False)
    exact_norm.weight.copy_(norm.weight)
    exact_norm.bias.copy_(norm.bias)
    x = randn(views, 256, 1152, seed=9).to(BF16)

    def call(table, *, wide=False):
        used, gain, old = (exact, exact_norm, x.float()) if wide else (layers, norm, x)
        n = table.layer_norm(old, gain, used["qkv"])
        mixed = table.vision_attention(table.linear(n, used["qkv"]), 16, used["o"])
        total, n = table.linear_residual_norm(mixed, used["o"], old, None, gain, None, used["fc1"])
        hidden = table.linear_gelu(n, used["fc1"], used["fc2"])
        return (table.linear_residual_norm(hidden, used["fc2"], total, None, gain, None, plain["qkv"])[0],)

    check(*both(ops_for(*layers.values()), call, plain["qkv"]))


@pytest.mark.parametrize("tokens", [16, 64, 128, 256])
@pytest.mark.parametrize("views", [1, 3])
def test_views_of_few_tokens(views, tokens):
    """16 tokens are 56 pixels: fewer than the keys of one turn."""
    into = linear(1152, 1152, name="o", seed=0)
    qkv = randn(views, tokens, 3456, seed=1).to(BF16)

    def call(table, *, wide=False):
        return (
            table.vision_attention(qkv.float() if wide else qkv, 16, Linear(1, 1, name="f").cuda() if wide else into),
        )

    check(*both(ops_for(into), call, into))


@pytest.mark.parametrize("tail", [0, 16, 32, 64])
@pytest.mark.parametrize("kind", FORMATS[:3])  # INT8 has one way to be cut
@pytest.mark.parametrize("rows", [784, 560, 304, 129, 320, 353])
def test_rows_that_ride_along(rows, kind, tail):
    if tail and CAPABILITY[0] != 9:
        pytest.skip("tiles that carry other rows are cut for the shared memory of Hopper, and chosen there alone")
    plain_up, plain_down = linear(4096, 2048, name="gate_up", seed=0), linear(2048, 2048, name="down", seed=1)
    up, down = in_format(plain_up, kind), in_format(plain_down, kind)
    exact_up, exact_down = wide(plain_up), wide(plain_down)
    x = randn(1, rows, 2048, seed=2).to(BF16)
    tile = Tile(128, 128, 64 if kind == "bf16" else 128, warps=8, stages=3, tail=tail, group=8)
    key = Key("geglu", 4096, 2048, fp8=kind != "bf16")
    ops = prefill.prefill_ops(
        torch.nn.ModuleList([up, down]), tuning=Tuning(products={key: ((rows, Choice(tile)),)}, ahead_bytes=16 << 20)
    )

    def call(table, *, wide=False):
        if wide:
            return (table.geglu(x.float(), exact_up, exact_down),)
        return (table.geglu(reference.hand_over(x, up), up, down),)

    check(*both(ops, call, down))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("rows", [968, 259])
def test_what_other_gpus_run(kind, rows, monkeypatch):
    """Blocks by address, cuBLAS or untuned tiles, little shared memory: like RTX 30 and 40, as far as this GPU can tell."""
    monkeypatch.setattr(prefill, "tuning_for", lambda *_, **__: tuning_for((8, 9), shared_bytes=101_376))
    monkeypatch.setattr(blocks, "bulk_copies", lambda device: False)
    test_gated_mlp(kind, rows)
    test_end_of_a_branch(kind, rows, 16384)
    test_projection_and_rotation(kind, rows)
    test_attention(rows, True, 2)
    test_siglip_block(kind, 2)


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_patches_of_three_views(pixels):
    layer = Linear(588, 1152, name="vision.patch", bias=True).cuda().requires_grad_(False)
    layer.weight.copy_(randn(1152, 588, seed=0) * 588**-0.5)
    layer.bias.copy_(randn(1152, seed=1))
    position = randn(256, 1152, seed=2)
    images = (randn(3, 3, 224, 224, seed=3) * 60 + 128).clamp(0, 255).to(torch.uint8)
    images = images if pixels == "uint8" else reference.to_unit_range(images)
    got = ops_for(layer).patch_embed(images, layer, position, BF16)
    truth = reference.patch_embed(images, layer, position, torch.float32)
    plain = reference.patch_embed(images, layer, position, BF16)
    check([got.float()], [plain.float()], [truth])
