"""Products with early weights on a Hopper GPU: no worse than plain torch, equal on every run, safe in a chain.

Errors are against float32 on the same weights, next to that of the plain operation.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from vivace.ops import denoise_ahead, reference
from vivace.ops.denoise_ahead import AheadTile
from vivace.ops.layers import Linear
from vivace.precision.quantize import quantise_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]
HEADS = (8, 1, 256)
FACTOR = 2.0
ROWS = [1, 10, 16, 17, 50, 64]


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def layer(out, inside, seed):
    made = Linear(inside, out, name="expert.layers.0.mlp.down").cuda().requires_grad_(False)
    made.weight.data = (rand(out, inside, seed=seed) / inside**0.5).bfloat16()
    return made


def wide(weight, scale=None):
    out = Linear(weight.shape[1], weight.shape[0], name="wide").cuda().requires_grad_(False)
    out.weight.data = weight.float() if scale is None else weight.float() * scale[:, None]
    return out


def inputs(T, made, fp8):
    """The layer, x as it takes it, and both in float32."""
    x = rand(T, made.weight.shape[1], seed=T).bfloat16()
    if not fp8:
        return made, x, wide(made.weight), x.float()
    small = quantise_layer(made, amax=8.0)
    x8 = reference.hand_over(x, small)
    return small, x8, wide(small.weight, small.weight_scale), x8.float() * small.input_scale


def distance(got, truth):
    assert torch.isfinite(got.float()).all()
    return float((got.float() - truth).norm() / truth.norm())


def poison(monkeypatch):
    real = torch.empty

    def empty(*shape, **kwargs):
        made = real(*shape, **kwargs)
        if made.dtype == torch.float8_e4m3fn:
            made.view(torch.uint8).fill_(0x7F)
        else:
            made.fill_(float("nan"))
        return made

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(1024, 2048), (1024, 4096)])
def test_parts(monkeypatch, T, fp8, shape):
    made, x, wide_layer, wide_x = inputs(T, layer(*shape, 1), fp8)
    poison(monkeypatch)
    tiles = (AheadTile(32, 4), AheadTile(64, 8, warps=8, each=1), AheadTile(32, 4, early=False, bars=2))
    fit = [tile for tile in tiles if denoise_ahead.why_not(made, tile, rows=T, pairs=1) is None]
    assert len(fit) >= 2
    for tile in fit:
        got = denoise_ahead.parts(x, made, tile)
        truth = wide_x @ wide_layer.weight.T
        assert distance(got.sum(0), truth) < 1e-3 if fp8 else distance(got.sum(0), truth) < 1e-5
        assert torch.equal(got, denoise_ahead.parts(x, made, tile))


@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize("fp8", [False, True])
def test_geglu(monkeypatch, T, fp8):
    made, x, wide_layer, wide_x = inputs(T, layer(8192, 1024, 2), fp8)
    down = layer(1024, 4096, 3)
    into = quantise_layer(down, amax=8.0) if fp8 else down
    truth = reference.geglu(wide_x, wide_layer, wide(down.weight))
    plain = distance(reference.hand_over(truth.bfloat16(), into).float() * (into.input_scale if fp8 else 1.0), truth)
    poison(monkeypatch)
    for tile in (AheadTile(32), AheadTile(16, warps=8, each=1)):
        got = denoise_ahead.geglu(x, made, into, tile)
        assert got.dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
        assert distance(got.float() * (into.input_scale if fp8 else 1.0), truth) <= FACTOR * plain
        assert torch.equal(got.float(), denoise_ahead.geglu(x, made, into, tile).float())


@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize("fp8", [False, True])
def test_qkv(monkeypatch, T, fp8):
    made, x, wide_layer, wide_x = inputs(T, layer(2560, 1024, 4), fp8)
    angle = rand(T, 128, seed=5)
    rope = (torch.cos(angle).bfloat16(), torch.sin(angle).bfloat16())
    exact = tuple(table.float()[None] for table in rope)
    q, k, v = reference.qkv_rope(wide_x[None], wide_layer, exact, HEADS)
    truth = torch.cat([q, k, v], dim=2).reshape(T, -1)
    poison(monkeypatch)
    for tile in (AheadTile(16), AheadTile(8, warps=8, each=1)):
        got = denoise_ahead.qkv(x, made, rope, HEADS, tile)
        assert distance(got, truth) <= FACTOR * distance(truth.bfloat16(), truth)
        assert torch.equal(got, denoise_ahead.qkv(x, made, rope, HEADS, tile))


@pytest.mark.parametrize("T", [10, 50])
def test_chain_waits_for_what_it_reads(T):
    """Each product reads what the one before it wrote; 300 replays of a graph give the bits of launches one at a time."""
    gate_up, down = layer(8192, 1024, 6), layer(1024, 4096, 7)
    start, up, out = rand(T, 1024, seed=8).bfloat16(), AheadTile(32), AheadTile(32, 4)

    def chain(pause):
        x = start.clone()
        for _ in range(12):
            hidden = denoise_ahead.geglu(x, gate_up, down, up)
            pause()
            parts = denoise_ahead.parts(hidden, down, out)
            pause()
            total = parts.sum(0)
            x = (total / total.abs().amax()).bfloat16()
        return x

    wanted = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(lambda: None)
    for _ in range(300):
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, wanted)
