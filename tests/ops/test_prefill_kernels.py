"""Prefill kernels against float32 formulas, through Triton's interpreter on a CPU, and at real shapes on a GPU.

Interpreted runs are float32: the interpreter multiplies raw codes in a bfloat16 product.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's first import: its own library is decorated then
pytest.importorskip("triton", reason="Triton is not installed")

from vivace.errors import ShapeError  # noqa: E402
from vivace.ops import blocks, prefill_attention, prefill_patches, prefill_pointwise, prefill_tail  # noqa: E402
from vivace.ops.layers import Linear  # noqa: E402
from vivace.ops.prefill_attention import AttentionTile  # noqa: E402
from vivace.ops.prefill_gemm import Rotation, Tile, gemm  # noqa: E402

KEEP = Linear(1, 1, name="float32")
DEVICE = torch.device("cuda" if GPU else "cpu")
SMALL = Tile(block_m=16, block_n=16, block_k=16, warps=4, stages=2)
BULK = Tile(block_m=16, block_n=16, block_k=16, warps=4, stages=2, bulk_store=True)
WALKING = Tile(block_m=16, block_n=16, block_k=16, warps=4, stages=2, persistent=True)
# float32 sums of up to 100 unit-variance products, added in another order
TIGHT = {"rtol": 2e-5, "atol": 2e-5}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)


@pytest.mark.parametrize("tile", [SMALL, WALKING, BULK], ids=["one-tile", "persistent", "bulk"])
@pytest.mark.parametrize("shape", [(32, 32, 32), (37, 40, 52), (1, 16, 16)])
def test_plain_product_with_every_epilogue(shape, tile):
    M, N, K = shape
    x, w, bias = randn(M, K, seed=0), randn(N, K, seed=1), randn(N, seed=2)
    out = gemm(x, w, poisoned(M, N), tile=tile, processors=3)
    torch.testing.assert_close(out, x @ w.T, **TIGHT)
    out = gemm(x, w, poisoned(M, N), tile=tile, bias=bias, gelu=True, processors=3)
    torch.testing.assert_close(out, functional.gelu(x @ w.T + bias, approximate="tanh"), **TIGHT)


@pytest.mark.parametrize("split", [2, 3])
@pytest.mark.parametrize("mean", [False, True], ids=["rms", "layer-norm"])
def test_parts_of_a_split_product_are_added_once_inside_the_norm(split, mean):
    M, N, K = 37, 40, 100
    x, w, bias, old = randn(M, K, seed=0), randn(N, K, seed=1), randn(N, seed=2), randn(M, N, seed=3)
    gain, shift, scale = randn(N, seed=4), randn(N, seed=5), randn(N, seed=6)
    cut = Tile(16, 16, 16, warps=4, stages=2, split_k=split)
    own = randn(M, 1, seed=7).abs()
    each = gemm(x, w, poisoned(split, M, N), tile=cut, row_scale=own)
    torch.testing.assert_close(each.sum(0), (x @ w.T) * own, **TIGHT)
    parts = gemm(x, w, poisoned(split, M, N), tile=cut)
    total = poisoned(M, N)
    out = prefill_pointwise.residual_norm(
        old,
        gain,
        poisoned(M, N),
        shift=shift if mean else None,
        parts=parts,
        channel_scale=scale,
        bias=bias,
        total=total,
    )
    wanted = old + (x @ w.T) * scale + bias
    torch.testing.assert_close(total, wanted, **TIGHT)
    torch.testing.assert_close(out, norm_of(wanted, gain, shift if mean else None), rtol=1e-4, atol=1e-4)


def norm_of(x, gain, shift):
    if shift is not None:
        return functional.layer_norm(x, (x.shape[-1],), gain, shift, 1e-6)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + gain)


def test_operands_that_do_not_fit_are_refused():
    x, w = randn(32, 32, seed=0), randn(32, 32, seed=1)
    with pytest.raises(ShapeError, match="parts"):
        gemm(x, w, poisoned(32, 32), tile=Tile(16, 16, 16, warps=4, stages=2, split_k=2))
    with pytest.raises(ShapeError, match="operands"):
        gemm(x, w[:, :16], poisoned(32, 32), tile=SMALL)


@pytest.mark.parametrize("tile", [SMALL, WALKING, BULK], ids=["one-tile", "persistent", "bulk"])
def test_gated_product(tile):
    M, F, K = 37, 48, 36
    x, w = randn(M, K, seed=0), randn(2 * F, K, seed=1)
    gate, up = (x @ w.T).chunk(2, dim=-1)
    out = gemm(x, w, poisoned(M, F), tile=tile, epilogue="geglu", processors=2)
    torch.testing.assert_close(out, functional.gelu(gate, approximate="tanh") * up, **TIGHT)


def carrying(tail: int, group: int = 1) -> Tile:
    return Tile(128, 16, 16, warps=8, stages=3, tail=tail, group=group)


@pytest.mark.parametrize(
    ("rows", "tile", "carriers"),
    [
        (256, carrying(16), 0),  # no row left over
        (257, carrying(16), 1),
        (272, carrying(16), 1),
        (273, carrying(16, 2), 2),
        (288, carrying(16, 3), 2),
        (289, carrying(16), 0),  # three carriers, two row tiles: a tile of its own again
        (304, carrying(32, 2), 2),
        (320, carrying(64), 1),
        (321, carrying(64), 2),
        (383, carrying(64, 2), 2),
        (100, carrying(64), 0),  # no full tile that could carry
    ],
)
def test_rows_left_over_ride_along(rows, tile, carriers):
    F, K = 48, 36
    assert prefill_tail.carriers(rows, tile) == carriers
    x, w, scale = randn(rows, K, seed=0), randn(2 * F, K, seed=1), randn(2 * F, seed=2).abs()
    gate, up = ((x @ w.T) * scale).chunk(2, dim=-1)
    wanted = functional.gelu(gate, approximate="tanh") * up
    room = poisoned(rows + 70, F)
    out = prefill_tail.gated(x, w, room[:rows], tile=tile, channel_scale=scale)
    torch.testing.assert_close(out, wanted, **TIGHT)
    assert room[rows:].isnan().all(), "wrote below the last row"
    inverse = torch.full((1,), 100.0, device=DEVICE)
    out = prefill_tail.gated(x, w, poisoned(rows, F), tile=tile, channel_scale=scale, out_inverse=inverse)
    own = randn(rows, 1, seed=3).abs()
    gate, up = ((x @ w.T) * scale * own).chunk(2, dim=-1)
    each = prefill_tail.gated(x, w, poisoned(rows, F), tile=tile, channel_scale=scale, row_scale=own)
    torch.testing.assert_close(each, functional.gelu(gate, approximate="tanh") * up, **TIGHT)
    clamped = (wanted * 100.0).clamp(-448.0, 448.0)
    assert (clamped[-1].abs() == 448.0).any(), "no value of the last row was clamped"
    torch.testing.assert_close(out, clamped, rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("tile", [SMALL, WALKING, BULK], ids=["one-tile", "persistent", "bulk"])
@pytest.mark.parametrize("epilogue", ["plain", "geglu"])
def test_scales_multiply_the_sum_and_an_output_scale_divides_and_clamps(tile, epilogue):
    M, N, K = 37, 40, 36
    rows = N if epilogue == "plain" else 2 * N
    x, w, scale = randn(M, K, seed=0), randn(rows, K, seed=1), randn(rows, seed=3).abs()
    own = randn(M, 1, seed=4).abs()
    wide, each = (x @ w.T) * scale, (x @ w.T) * scale * own
    if epilogue == "geglu":
        wide, each = (
            functional.gelu(gate, approximate="tanh") * up
            for gate, up in (one.chunk(2, dim=-1) for one in (wide, each))
        )
    out = gemm(x, w, poisoned(M, N), tile=tile, epilogue=epilogue, channel_scale=scale, row_scale=own, processors=2)
    torch.testing.assert_close(out, each, **TIGHT)
    inverse = torch.full((1,), 100.0, device=DEVICE)
    out = gemm(
        x, w, poisoned(M, N), tile=tile, epilogue=epilogue, channel_scale=scale, out_inverse=inverse, processors=2
    )
    wanted = (wide * 100.0).clamp(-448.0, 448.0)
    assert (wanted.abs() == 448.0).any(), "no value was clamped: the test would not see a missing clamp"
    torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-3)


def whole(*shape: int, seed: int) -> torch.Tensor:
    """Every code of INT8, extremes included."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(DEVICE)


def exactly(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x.cpu().long() @ w.cpu().long().T).to(DEVICE)


def codes(y: torch.Tensor) -> torch.Tensor:
    """To the nearest whole number, of two the even one, within INT8; y float64, in scales."""
    return y.round().clamp(-128, 127).to(torch.int8)


@pytest.mark.parametrize("tile", [SMALL, WALKING, BULK], ids=["one-tile", "persistent", "bulk"])
@pytest.mark.parametrize("shape", [(37, 48, 64), (16, 16, 2048)])
def test_sums_of_whole_numbers_are_exact(tile, shape):
    """K = 2,048 at full range: the largest sum is 2^25, and float32 skips numbers from 2^24 on."""
    (M, N, K), scale = shape, 2.0 ** (torch.arange(shape[1], device=DEVICE) % 5 - 20)
    x, w, bias = whole(M, K, seed=0), whole(N, K, seed=1), randn(N, seed=2)
    x[0], w[0] = -128, -128
    wanted = exactly(x, w)
    assert wanted[0, 0] == K * 2**14
    out = gemm(x, w, poisoned(M, N), tile=tile, channel_scale=scale, processors=3)
    assert torch.equal(out, wanted.float() * scale)
    split = Tile(16, 16, 32, warps=4, stages=2, split_k=2)
    assert torch.equal(gemm(x, w, poisoned(2, M, N), tile=split).double().sum(0), wanted.double())
    # an eighth of a scale: half of the values lie on or beside a tie, and the last ones saturate
    eighth, inverse = 2.0**-11, torch.full((1,), 2.0**8, device=DEVICE)
    near = torch.full((N,), eighth, device=DEVICE)
    room = torch.full((M, N), 99, dtype=torch.int8, device=DEVICE)
    out = gemm(x, w, room, tile=tile, channel_scale=near, out_inverse=inverse, processors=3)
    want = codes(wanted.double() * eighth * 2.0**8)
    assert torch.equal(out, want)
    assert {-128, 127} <= set(want.unique().tolist())
    halves = wanted.double() * eighth * 2.0**8 % 1 == 0.5
    assert halves.any(), "no value lies between two codes"
    out = gemm(x, w, poisoned(M, N), tile=tile, channel_scale=scale, bias=bias, gelu=True, processors=3)
    torch.testing.assert_close(out, functional.gelu(wanted.float() * scale + bias, approximate="tanh"), **TIGHT)


@pytest.mark.parametrize("tile", [SMALL, WALKING], ids=["one-tile", "persistent"])
def test_gated_and_rotated_products_of_whole_numbers(tile):
    M, F, K, head_dim = 37, 48, 64, 32
    x, w, scale = whole(M, K, seed=0), whole(2 * F, K, seed=1), randn(2 * F, seed=2).abs() * 1e-5
    gate, up = (exactly(x, w).float() * scale).chunk(2, dim=-1)
    wanted = functional.gelu(gate, approximate="tanh") * up
    out = gemm(x, w, poisoned(M, F), tile=tile, epilogue="geglu", channel_scale=scale, processors=2)
    torch.testing.assert_close(out, wanted, **TIGHT)
    inverse = 20.0 / wanted.abs().max().reshape(1)
    room = torch.full((M, F), 99, dtype=torch.int8, device=DEVICE)
    out = prefill_tail.gated(x, w, room, tile=tile, channel_scale=scale, out_inverse=inverse, processors=2)
    assert float((out.float() - wanted * inverse).abs().max()) <= 0.5 + 1e-4
    from vivace.ops import reference

    w = whole(3 * head_dim, K, seed=3)
    scale, cos, sin = randn(3 * head_dim, seed=4).abs() * 1e-5, randn(M, 16, seed=5), randn(M, 16, seed=6)
    q, k, v = poisoned(3, M, head_dim)
    rotation = Rotation(k=k, v=v, cos=cos, sin=sin, heads=(1, 1, head_dim))
    gemm(x, w, q, tile=tile, epilogue="qkv_rope", channel_scale=scale, rotation=rotation, processors=2)
    packed = (exactly(x, w).float() * scale).view(1, M, 3, head_dim)
    turned = reference.rotate(packed[:, :, :2], (cos[None], sin[None]))
    for mine, want in zip((q, k, v), (*turned.unbind(2), packed[:, :, 2]), strict=True):
        torch.testing.assert_close(mine, want[0], **TIGHT)


def test_norms_and_gates_of_a_row_become_whole_numbers():
    """The row-wise kernels; without rounding, casting would cut towards zero."""
    old, gain, inverse = randn(37, 40, seed=0), randn(40, seed=1), torch.full((1,), 40.0, device=DEVICE)
    room = torch.full((37, 40), 99, dtype=torch.int8, device=DEVICE)
    out = prefill_pointwise.residual_norm(old, gain, room, out_inverse=inverse)
    exact = norm_of(old.double(), gain.double(), None) * 40.0
    assert float((out.double() - exact.clamp(-128, 127)).abs().max()) <= 0.5 + 1e-4
    assert (exact.abs() > 128).any()
    packed = randn(37, 80, seed=2) * 3
    gate, up = packed.double().chunk(2, dim=-1)
    out = prefill_pointwise.geglu(packed, room, out_inverse=inverse)
    exact = functional.gelu(gate, approximate="tanh") * up * 40.0
    assert float((out.double() - exact.clamp(-128, 127)).abs().max()) <= 0.5 + 1e-3


@pytest.mark.parametrize(
    "heads", [(4, 1, 32), (4, 2, 32), (0, 1, 32), (4, 1, 16)], ids=["mqa", "gqa", "keys-values", "half-a-tile"]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_projection_with_rotation(heads, batch):
    from vivace.ops import reference

    num_heads, kv_heads, head_dim = heads
    T, K = 19, 36
    x, w = randn(batch * T, K, seed=0), randn((num_heads + 2 * kv_heads) * head_dim, K, seed=1)
    cos, sin = randn(1, T, head_dim // 2, seed=2), randn(1, T, head_dim // 2, seed=3)
    packed = (x @ w.T).view(batch, T, -1, head_dim)
    q, k, v = packed.split([num_heads, kv_heads, kv_heads], dim=2)
    wanted = [reference.rotate(q, (cos, sin)), reference.rotate(k, (cos, sin)), v]
    # keys and values go into the rows of a wider cache
    cache = poisoned(2, batch * T, kv_heads * head_dim + 8)
    k_out, v_out = cache[0, :, : kv_heads * head_dim], cache[1, :, : kv_heads * head_dim]
    q_out = poisoned(batch * T, num_heads * head_dim) if num_heads else k_out
    rotation = Rotation(k=k_out, v=v_out, cos=cos[0], sin=sin[0], heads=heads)
    for tile in (SMALL, WALKING):
        cache.fill_(float("nan"))
        gemm(x, w, q_out, tile=tile, epilogue="qkv_rope", rotation=rotation, processors=2)
        got = [q_out, k_out, v_out] if num_heads else [k_out, v_out]
        for mine, want in zip(got, wanted if num_heads else wanted[1:], strict=True):
            torch.testing.assert_close(mine.reshape(want.shape), want, **TIGHT)
        own = randn(batch * T, 1, seed=4).abs()
        gemm(x, w, q_out, tile=tile, epilogue="qkv_rope", rotation=rotation, row_scale=own, processors=2)
        for mine, want in zip(got, wanted if num_heads else wanted[1:], strict=True):
            each = want * own.view(batch, T, 1, 1)
            torch.testing.assert_close(mine.reshape(want.shape), each, **TIGHT)
        assert cache[:, :, kv_heads * head_dim :].isnan().all(), "wrote outside its columns"
    cache.fill_(float("nan"))
    scale = randn(w.shape[0], seed=4).abs() + 0.5
    prefill_pointwise.rope_split(
        (x @ w.T) / scale, q_out if num_heads else None, k_out, v_out,
        tables=(cos[0], sin[0]), heads=heads, channel_scale=scale,
    )  # fmt: skip
    for mine, want in zip(got, wanted if num_heads else wanted[1:], strict=True):
        torch.testing.assert_close(mine.reshape(want.shape), want, **TIGHT)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "mask"])
def test_attention(kv_heads, masked):
    from vivace.ops import reference

    B, T, N, head_dim = 2, 21, 4, 16
    q, k, v = (
        randn(B, T, N, head_dim, seed=0),
        randn(B, T, kv_heads, head_dim, seed=1),
        randn(B, T, kv_heads, head_dim, seed=2),
    )
    mask = None
    if masked:
        mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)).to(DEVICE) > 0.4
        mask[0, :17] = False  # a whole first block without a valid key
    wanted = reference.attention(q, k, v, mask, None, KEEP)
    out = prefill_attention.attention(
        q, k, v, poisoned(B, T, N * head_dim), tile=AttentionTile(16, 16, warps=4, stages=2), mask=mask
    )
    torch.testing.assert_close(out, wanted, **TIGHT)
    if masked:
        unmasked = reference.attention(q, k, v, None, None, KEEP)
        assert (unmasked - wanted).abs().max() > 0.05, "the mask changes nothing: the test would not see a lost mask"


@pytest.mark.parametrize("head_dim", [24, 20, 32])
def test_vision_attention_of_odd_head_dims(head_dim):
    from vivace.ops import reference

    V, T, heads = 2, 21, 3
    qkv = randn(V, T, 3 * heads * head_dim, seed=0)
    out = prefill_attention.vision_attention(
        qkv, poisoned(V, T, heads * head_dim), heads=heads, tile=AttentionTile(16, 16, warps=4, stages=2)
    )
    torch.testing.assert_close(out, reference.vision_attention(qkv, heads, KEEP), **TIGHT)


@pytest.mark.parametrize("tokens", [1, 4, 16, 17])
def test_few_keys_take_two_turns(tokens):
    from vivace.ops import reference

    tile = AttentionTile(16, 32, warps=4, stages=2)
    qkv = randn(3, tokens, 3 * 2 * 24, seed=0)
    out = prefill_attention.vision_attention(qkv, poisoned(3, tokens, 48), heads=2, tile=tile)
    torch.testing.assert_close(out, reference.vision_attention(qkv, 2, KEEP), **TIGHT)
    q, k, v = (randn(2, tokens, n, 16, seed=n) for n in (4, 1, 1))
    out = prefill_attention.attention(q, k, v, poisoned(2, tokens, 64), tile=tile)
    torch.testing.assert_close(out, reference.attention(q, k, v, None, None, KEEP), **TIGHT)


@pytest.fixture
def both_ways(monkeypatch):
    """Run a call with blocks through descriptors and by their addresses -> the two results."""

    def run(call):
        results = []
        for bulk in (True, False):
            monkeypatch.setattr(blocks, "bulk_copies", lambda device, bulk=bulk: bulk)
            results.append(call())
        return results

    return run


@pytest.mark.parametrize("shape", [(37, 40, 52), (32, 32, 32), (1, 16, 16)])
@pytest.mark.parametrize("epilogue", ["plain", "split", "geglu"])
def test_products_that_read_by_address_are_the_same_bits(both_ways, shape, epilogue):
    M, N, K = shape
    x, w = randn(M + 1, K, seed=0)[:M], randn((2 * N if epilogue == "geglu" else N) + 16, K, seed=1)[:-16]
    cut = Tile(16, 16, 16, warps=4, stages=2, split_k=3) if epilogue == "split" else BULK
    name, room = "geglu" if epilogue == "geglu" else "plain", (3, M, N) if epilogue == "split" else (M, N)
    described, addressed = both_ways(lambda: gemm(x, w, poisoned(*room), tile=cut, epilogue=name, processors=3))
    assert torch.isfinite(addressed).all(), "what lies outside a matrix is zero, and never read"
    assert torch.equal(described, addressed)


def test_rows_of_any_stride_are_read_by_address(both_ways):
    x, w = randn(37, 96, seed=0)[:, :52], randn(40, 64, seed=1)[:, :52]
    described, addressed = both_ways(lambda: gemm(x, w, poisoned(37, 40), tile=SMALL))
    assert torch.equal(described, addressed)
    torch.testing.assert_close(addressed, x @ w.T, **TIGHT)


def test_rotated_products_and_tails_by_address(both_ways, monkeypatch):
    """A tail is for the bulk copy engine: without it every row has its own tile."""
    x, w, cos, sin = randn(19, 36, seed=0), randn(192, 36, seed=1), randn(19, 16, seed=2), randn(19, 16, seed=3)

    def rotate():
        q, cache = poisoned(19, 128), poisoned(2, 19, 40)
        rotation = Rotation(k=cache[0, :, :32], v=cache[1, :, :32], cos=cos, sin=sin, heads=(4, 1, 32))
        gemm(x, w, q, tile=SMALL, epilogue="qkv_rope", rotation=rotation)
        return torch.cat([q, cache[0, :, :32], cache[1, :, :32]], dim=1)

    described, addressed = both_ways(rotate)
    assert torch.equal(described, addressed)
    x, w = randn(257, 36, seed=4), randn(96, 36, seed=5)
    described, addressed = both_ways(lambda: prefill_tail.gated(x, w, poisoned(257, 48), tile=carrying(16)))
    torch.testing.assert_close(described, addressed, **TIGHT)
    monkeypatch.setattr(prefill_tail, "_gated_tail_kernel", None)
    assert torch.equal(prefill_tail.gated(x, w, poisoned(257, 48), tile=carrying(16)), addressed), (
        "the last of both ways"
    )


@pytest.mark.parametrize("tokens", [21, 4])
def test_attention_that_reads_by_address_is_the_same_bits(both_ways, tokens):
    tile, mask = AttentionTile(16, 16, warps=4, stages=2), torch.arange(tokens, device=DEVICE).expand(2, tokens) != 2
    q, k = randn(2, tokens, 4, 16, seed=0), randn(2, 30, 1, 40, seed=1)[:, :tokens, :, :16]
    v = randn(2, 26, 1, 64, seed=3)[:, :tokens, :, 16:32]
    described, addressed = both_ways(
        lambda: prefill_attention.attention(q, k, v, poisoned(2, tokens, 64), tile=tile, mask=mask.contiguous())
    )
    assert torch.equal(described, addressed)
    qkv = randn(3, tokens, 3 * 2 * 24, seed=2)
    described, addressed = both_ways(
        lambda: prefill_attention.vision_attention(qkv, poisoned(3, tokens, 48), heads=2, tile=tile)
    )
    assert torch.equal(described, addressed)


def test_keys_inside_a_wider_cache_are_read_in_place():
    from vivace.ops import reference

    B, T, N, head_dim = 2, 21, 4, 16
    q, room = randn(B, T, N, head_dim, seed=0), randn(2, B, 30, 1, 40, seed=1)
    k, v = room[0, :, :T, :, :head_dim], room[1, :, :T, :, :head_dim]
    tile = AttentionTile(16, 16, warps=4, stages=2)
    out = prefill_attention.attention(q, k, v, poisoned(B, T, N * head_dim), tile=tile)
    torch.testing.assert_close(out, reference.attention(q, k, v, None, None, KEEP), **TIGHT)
    with pytest.raises(ShapeError, match="as rows"):
        prefill_attention.attention(q, k.transpose(1, 3), v, out, tile=tile)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_pixels_to_tokens(kind):
    from vivace.ops import reference

    V, side, patch, width = 2, 28, 7, 24
    images = torch.randint(0, 256, (V, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = images.to(DEVICE) if kind == "uint8" else reference.to_unit_range(images).to(DEVICE)
    weight, bias, position = randn(width, 3 * patch**2, seed=1) * 0.1, randn(width, seed=2), randn(16, width, seed=3)
    wanted = reference.patches(reference.to_unit_range(images).double(), patch) @ weight.double().T + bias + position
    made = prefill_patches.patch_weights(
        weight, bias, position, uint8=kind == "uint8", dtype=torch.bfloat16 if GPU else torch.float32
    )
    got = prefill_patches.patch_embed(images, made, dtype=torch.float32, tile=SMALL)
    # one missing part of the pixels or the weights would show as 4e-3 or 1.5e-5; a matrix unit's sums are worth 5e-6
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_three_parts_hold_a_float32():
    x = randn(1000, seed=0).double()
    high, middle, low = prefill_patches.three_parts(x)
    assert float(((high + middle + low - x) / x).abs().max()) < 2**-23
    assert float(((high - x) / x).abs().max()) > 2**-11


def test_head_dim_72_is_cut_into_64_and_16():
    assert prefill_attention.split_head_dim(72) == (64, 16)


@pytest.mark.parametrize("width", [16, 40])
def test_norms(width):
    x, gain, shift = randn(5, width, seed=0) * 3 + 1, randn(width, seed=1), randn(width, seed=2)
    for offset in (None, shift):
        got = prefill_pointwise.residual_norm(x, gain, poisoned(5, width), shift=offset)
        torch.testing.assert_close(got, norm_of(x, gain, offset), **TIGHT)
    inverse = torch.full((1,), 300.0, device=DEVICE)
    got = prefill_pointwise.residual_norm(x, gain, poisoned(5, width), out_inverse=inverse)
    torch.testing.assert_close(got, (norm_of(x, gain, None) * 300).clamp(-448, 448), rtol=2e-5, atol=1e-3)


def test_geglu_of_a_packed_product():
    x, scale = randn(5, 40, seed=0), randn(40, seed=1).abs()
    gate, up = (x * scale).chunk(2, dim=-1)
    got = prefill_pointwise.geglu(x, poisoned(5, 20), channel_scale=scale)
    torch.testing.assert_close(got, functional.gelu(gate, approximate="tanh") * up, **TIGHT)
