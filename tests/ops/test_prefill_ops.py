"""The whole table on a tiny network against the reference operations: same calls, same results, nothing silent.

On a CPU the kernels run in Triton's interpreter, in float32.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's first import: its own library is decorated then
pytest.importorskip("triton", reason="Triton is not installed")

from vivace.config import GemmaConfig, ModelConfig, VisionConfig  # noqa: E402
from vivace.errors import ShapeError, Unsupported  # noqa: E402
from vivace.model.pi import Pi  # noqa: E402
from vivace.ops import denoise, launch, prefill, prefill_ahead, prefill_limits, prefill_tail, reference, row_scales  # noqa: E402
from vivace.ops.layers import Fp8Linear, Linear, RmsNorm, RowFp8Linear  # noqa: E402
from vivace.ops.prefill_operand import Operand  # noqa: E402
from vivace.ops.prefill_tuning import TUNED, Choice, Key, Tile, Tuning, tuning_for  # noqa: E402
from vivace.ops.table import reference_ops  # noqa: E402
from vivace.precision import fit, quantize  # noqa: E402
from vivace.precision.plan import PrecisionPlan, Rule  # noqa: E402
from vivace.precision.quantize import quantise_layer  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
CONFIG = ModelConfig(
    vision=VisionConfig(width=48, layers=2, mlp_width=40, num_heads=2, patch_size=14, image_size=28),
    prefix=GemmaConfig(width=32, layers=3, mlp_width=48, num_heads=8, num_kv_heads=1, head_dim=16),
    expert=GemmaConfig(width=16, layers=3, mlp_width=28, num_heads=8, num_kv_heads=1, head_dim=16),
    vocab_size=64,
)
SMALL = Choice(Tile(16, 16, 16, warps=4, stages=2))


class EverythingTriton(Tuning):
    """No product goes to cuBLAS; the heads of the tiny network have 8 columns a half."""

    def choose(self, epilogue, *, rows, shape, fp8):
        if epilogue == "parts":
            return Choice(Tile(16, 16, 16, warps=4, stages=2, split_k=2))
        return Choice(None) if epilogue == "qkv_rope" else SMALL


class EverythingBlas(Tuning):
    """Products of the BLAS wherever that exists."""

    def choose(self, epilogue, *, rows, shape, fp8):
        return SMALL if epilogue == "gelu" else Choice(None)


class RotationToo(EverythingTriton):
    """Half a head is half a tile."""

    def choose(self, epilogue, *, rows, shape, fp8):
        return SMALL if epilogue == "qkv_rope" else super().choose(epilogue, rows=rows, shape=shape, fp8=fp8)


@pytest.fixture(scope="module")
def model():
    return made_at_random()


def made_at_random(config=CONFIG):
    torch.manual_seed(0)
    made = Pi(config).to(DEVICE).requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    return made


def table(model, tuning, **options):
    ones = torch.ones(256, 1, device=DEVICE)
    kept = torch.bfloat16 if GPU else torch.float32
    return prefill.Prefill(prefill.constants_of(model), ones, tuning=tuning, patch_parts=kept, **options)


def run(model, ops, mask):
    model.ops = ops
    images = torch.randn(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    views = model.embed_views(images)
    prompt = model.embed_prompt(torch.arange(5, device=DEVICE)[None])
    cache = model.prefill(torch.cat([views, prompt], dim=1), mask)
    return views, cache


@pytest.mark.parametrize("tuning", [EverythingTriton(), EverythingBlas()], ids=["triton", "blas"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "mask"])
def test_vision_and_prefix_equal_the_reference(model, tuning, masked):
    mask = None
    if masked:
        mask = torch.ones(1, 13, dtype=torch.bool, device=DEVICE)
        mask[:, 6:9] = False
    launched = set()
    ops = prefill.table_of(table(model, tuning, record=lambda *row: launched.add(row)))
    views, cache = run(model, ops, mask)
    wanted_views, wanted = run(model, reference_ops(), mask)
    torch.testing.assert_close(views, wanted_views, rtol=1e-4, atol=1e-4)
    for mine, want in zip((*cache.k, *cache.v), (*wanted.k, *wanted.v), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)
    layers = {layer for layer, _, _ in launched}
    assert {"prefix.layers.0.attn.o", "prefix.layers.1.mlp.gate_up", "prefix.layers.2.attn.qkv"} <= layers, launched


@pytest.mark.skipif(GPU, reason="float32 is the interpreter's; on a GPU see test_prefill_gpu.py, fp8-rows")
@pytest.mark.parametrize("tuning", [RotationToo(), EverythingBlas()], ids=["triton", "blas"])
def test_row_scales_of_every_product_equal_the_reference(monkeypatch, tuning):
    """E4M3 numbers are held in float32: the interpreter rounds some codes wrongly and multiplies raw ones."""
    model = made_at_random()
    # a plain linear in float32 is torch's own: of vision's qkv that is all there is here
    rules = (Rule("vision.layers.*.attn.qkv", "keep"), Rule("[pv]*.layers.*", input_scale="row"))
    names = quantize.apply(model, PrecisionPlan("rows", rules))
    wanted_views, wanted = run(model, reference_ops(), None)
    monkeypatch.setattr(row_scales, "quantise", numbers_of_rows)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
    for layer in model.modules():
        if isinstance(layer, RowFp8Linear):
            layer.weight.data = layer.weight.data.float()
    launched = set()
    ops = prefill.table_of(table(model, tuning, record=lambda *row: launched.add(row)))
    views, cache = run(model, ops, None)
    torch.testing.assert_close(views, wanted_views, rtol=1e-4, atol=1e-4)
    for mine, want in zip((*cache.k, *cache.v), (*wanted.k, *wanted.v), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)
    in_rows = {layer for layer, _, kernel in launched if kernel == row_scales.KERNEL}
    assert in_rows == set(names)
    assert {"vision.layers.1.mlp.fc1", "prefix.layers.1.mlp.down", "prefix.layers.2.attn.qkv"} <= in_rows


@pytest.mark.skipif(GPU, reason="float32 is the interpreter's; on a GPU see test_prefill_gpu.py, int8")
def test_int8_of_every_product_equals_the_reference():
    """A value that lies between two codes may go to either, so the measure is of all values together."""
    model = made_at_random(replace(CONFIG, vision=replace(CONFIG.vision, mlp_width=48)))
    plain_views, plain = run(model, reference_ops(), None)
    # a plain linear in float32 is torch's own: of vision's qkv that is all there is here
    rules = (Rule("vision.layers.*.attn.qkv", "keep"), Rule("[pv]*.layers.*", "int8"))
    chosen = PrecisionPlan("whole", rules)
    named = [name for name in fit.all_layers(model) if chosen.quantises(name)]
    assert {"vision.layers.1.mlp.fc2", "prefix.layers.1.mlp.down", "prefix.layers.2.attn.qkv"} <= set(named)
    assert set(quantize.apply(model, replace(chosen, amax=dict.fromkeys(named, 4.0)))) == set(named)
    wanted_views, wanted = run(model, reference_ops(), None)
    launched = set()
    ops = prefill.table_of(table(model, Tuning(), record=lambda *row: launched.add(row)))
    views, cache = run(model, ops, None)
    for mine, want, far in zip(
        (views, *cache.k, *cache.v),
        (wanted_views, *wanted.k, *wanted.v),
        (plain_views, *plain.k, *plain.v),
        strict=True,
    ):
        error, rounding = ((one - want).norm() / want.norm() for one in (mine, far))
        assert rounding > 5e-3, "INT8 changes something"
        assert error < 0.1 * rounding
    products = {
        (layer, kernel) for layer, operation, kernel in launched if layer in named and "attention" not in operation
    }
    assert products == {(layer, "triton, untuned") for layer in named}


def numbers_of_rows(x, *, pdl):
    codes, scales = reference.rows_to_e4m3(x)
    return codes.float(), scales


def scaled_product(x, weight, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
    """What torch._scaled_mm computes, in float32; scales of rows and channels, or one of each."""
    out = x.float() @ weight.float() * scale_a * scale_b
    return (out if bias is None else out + bias).to(out_dtype)


def test_keys_and_values_go_into_the_buffers_of_their_layer(model):
    room = torch.full((2, 16, 24), float("nan"), device=DEVICE)
    k, v = room[0, :13, :16], room[1, :13, :16]
    ops = prefill.table_of(table(model, EverythingBlas(), kv_buffers={"prefix.layers.1.attn.qkv": (k, v)}))
    _, cache = run(model, ops, None)
    assert cache.k[1].data_ptr() == k.data_ptr()
    _, wanted = run(model, reference_ops(), None)
    torch.testing.assert_close(k, wanted.k[1][0, :, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v, wanted.v[1][0, :, 0], rtol=1e-4, atol=1e-4)
    assert room[:, 13:].isnan().all()
    assert room[:, :, 16:].isnan().all()


def test_what_cannot_run_is_named(model):
    ops = table(model, EverythingBlas())
    norm, layer = RmsNorm(32, name="n"), Linear(32, 32, name="l")
    x = torch.zeros(1, 2, 32, device=DEVICE)
    with pytest.raises(Unsupported, match="modulation"):
        ops.rms_norm(x, norm, torch.zeros(1, 96, device=DEVICE), layer)
    with pytest.raises(ShapeError, match="another format"):
        ops.geglu(x.to(torch.float8_e4m3fn), layer, layer)
    q = torch.zeros(1, 2, 1, 24, device=DEVICE)
    with pytest.raises(Unsupported, match="head size 24"):
        ops.attention(q, q, q, None, None, layer)


class Blas(Tuning):
    def choose(self, epilogue, *, rows, shape, fp8):
        return Choice(None)


@pytest.mark.parametrize("finished", [True, False], ids=["linear", "left to a kernel"])
def test_cublas_gets_the_scales_of_rows_and_channels(monkeypatch, finished):
    """Also where one scale for all rows would be left to the next kernel: that kernel knows no rows."""
    handed = []

    def product(x, weight, **given):
        handed.append(given)
        return torch.zeros(x.shape[0], weight.shape[1], dtype=given["out_dtype"], device=x.device)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    plain = Linear(32, 48, name="projector", bias=True).to(DEVICE).bfloat16()
    torch.nn.init.normal_(plain.weight)
    layer = quantise_layer(plain, amax=None)
    ops = prefill.Prefill(prefill.constants_of(layer), torch.ones(256, 1, device=DEVICE), tuning=Blas())
    x = torch.logspace(-3, 3, 5, device=DEVICE)[:, None].expand(1, 5, 32).bfloat16()
    if finished:
        ops.linear(x, layer)
    else:
        assert ops._blas(ops._operand(x, layer, "geglu"), layer)[1] is None
    assert torch.equal(handed[0]["scale_a"], x[0, :, :1].float() / 448)
    assert torch.equal(handed[0]["scale_b"], layer.weight_scale[None])
    assert (handed[0]["bias"] is layer.bias) == finished


@pytest.mark.parametrize("format", ["e4m3", "int8"])
def test_gelu_into_8_bits_does_not_go_to_cublas(model, monkeypatch, format):
    """Its epilogue gives bfloat16, which the next product would take for codes."""
    monkeypatch.setattr(torch, "_addmm_activation", lambda *_, **__: pytest.fail("cuBLAS stores no 8 bits"))
    launched = []
    layer, into = Linear(32, 48, name="fc1", bias=True).to(DEVICE), Linear(48, 32, name="fc2").to(DEVICE)
    for parameter in (layer.weight, layer.bias, into.weight):
        torch.nn.init.normal_(parameter)
    into = quantise_layer(into, amax=4.0, format=format)
    ops = prefill.Prefill(
        prefill.constants_of(into), torch.ones(256, 1), tuning=Blas(), record=lambda *r: launched.append(r)
    )
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert ops.linear_gelu(x, layer, into).dtype == into.stored
    assert launched == [("fc1", "linear_gelu", "triton, untuned")]


def test_gelu_without_bias_does_not_go_to_cublas(model):
    launched = []
    ops = table(model, Blas(), record=lambda *row: launched.append(row))
    layer = Linear(32, 48, name="no bias").to(DEVICE)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = reference_ops().linear_gelu(x, layer, layer)
    torch.testing.assert_close(ops.linear_gelu(x, layer, layer), wanted, rtol=1e-4, atol=1e-4)
    assert launched == [("no bias", "linear_gelu", "triton, untuned")]


@pytest.mark.parametrize("rows", [256, 257])
def test_row_scales_grow_with_the_product(model, monkeypatch, rows):
    """More rows than were prepared for are no less right: cuBLAS is handed one scale for each."""
    handed = []

    def product(x, weight, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        handed.append(scale_a)
        return torch.zeros(x.shape[0], weight.shape[1], dtype=out_dtype, device=x.device)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    layer = quantise_layer(Linear(32, 48, name="projector").to(DEVICE).bfloat16(), amax=1.0)
    ops = prefill.Prefill(prefill.constants_of(layer), torch.ones(256, 1, device=DEVICE), tuning=Blas())
    x = torch.zeros(1, rows, 32, dtype=torch.float8_e4m3fn, device=DEVICE)
    assert ops.linear(x, layer).shape == (1, rows, 48)
    assert [scale.shape for scale in handed] == [(rows, 1)]
    assert bool((handed[0] == 1.0).all())


def test_strided_activations_are_read_as_what_they_are(model):
    ops, layer, norm = (
        table(model, EverythingTriton()),
        Linear(32, 32, name="l").to(DEVICE),
        RmsNorm(32, name="n").to(DEVICE),
    )
    for parameter in (layer.weight, norm.weight):
        torch.nn.init.normal_(parameter, std=0.2)
    x, old = (
        torch.randn(1, 32, 5, generator=torch.Generator().manual_seed(seed)).to(DEVICE).transpose(1, 2)
        for seed in (0, 1)
    )
    wanted = reference_ops().linear_residual_norm(x, layer, old, None, norm, None, layer)
    got = ops.linear_residual_norm(x, layer, old, None, norm, None, layer)
    for mine, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


def test_only_hopper_has_measured_rows():
    assert tuning_for((9, 0), shared_bytes=232_448) is TUNED
    for capability, room, taken in (((8, 0), 166_912, 102_432), ((8, 9), 101_376, 69_656), ((12, 0), 101_376, 69_656)):
        other = tuning_for(capability, shared_bytes=room)
        assert other.products == {}
        cut = other.attention_tile(rows=968 * 8)
        # q, keys and values of the loop, and the weights of one block, in bfloat16: head size 256
        loop = (cut.block_m + 2 * (cut.stages - 1) * cut.block_n) * 512 + 2 * cut.block_m * cut.block_n
        assert loop <= taken <= room
        for fp8 in (False, True):
            ways = {
                epilogue: other.choose(epilogue, rows=968, shape=(2048, 2048), fp8=fp8)
                for epilogue in ("plain", "parts", "gelu", "geglu", "qkv_rope")
            }
            assert not any(way.measured for way in ways.values())
            own = {epilogue for epilogue, way in ways.items() if way.tile is not None}
            assert own == ({"plain", "gelu"} if fp8 else set()), "torch finishes E4M3 products on few GPUs"


def test_large_tiles_of_int8_are_for_products_that_fill_the_chip():
    found = {
        (rows, shape): TUNED.choose_int8(epilogue, rows=rows, shape=shape, processors=108).tile
        for epilogue, rows, shape in (
            ("geglu", 968, (32768, 2048)), ("parts", 968, (2048, 16384)), ("plain", 256, (3456, 1152)),
            ("qkv_rope", 304, (2560, 2048)),
        )
    }  # fmt: skip
    assert [(tile.block_m, tile.block_n) for tile in found.values()] == [(128, 64), (128, 128), (64, 64), (64, 32)]
    assert {tile.split_k for tile in found.values()} == {1}


def test_stages_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(launch, "shared_bytes", lambda device: 101_376)
    fit = [launch.stages_that_fit(stages, bytes_each=49_152, device=DEVICE) for stages in (2, 3, 4, 8)]
    assert fit == [2, 3, 3, 3]
    assert launch.stages_that_fit(4, bytes_each=200_000, device=DEVICE) == 1
    monkeypatch.setattr(launch, "shared_bytes", lambda device: 232_448)
    for (rows, fp8), tiles in denoise.TILES.items():
        for name in ("qkv", "o", "gate_up", "down"):
            tile, pairs = getattr(tiles, name), 2 if name in ("qkv", "gate_up") else 1
            most = (min(rows, 64) + pairs * tile.block_n) * tile.block_k * (1 if fp8 else 2)
            assert launch.stages_that_fit(tile.stages, bytes_each=most, device=DEVICE) == tile.stages, (
                "chosen on Hopper"
            )
    monkeypatch.setattr(launch, "shared_bytes", lambda device: None)
    assert launch.stages_that_fit(4, bytes_each=200_000, device=DEVICE) == 4


def test_why_not_names_a_gpu_with_less_shared_memory_than_any_tile(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, room, fits in (((8, 6), 101_376, True), ((12, 0), 101_376, True), ((8, 6), 65_536, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(launch, "shared_bytes", lambda device, room=room: room)
        assert (prefill_limits.why_not(device="cuda") is None) == fits
    assert "101376 bytes of shared memory, this GPU has 65536" in prefill_limits.why_not(device="cuda")


def test_a_rule_of_thumb_is_no_measurement(model):
    launched = []
    layer = Linear(32, 64, name="odd").to(DEVICE)
    ops = table(model, Tuning(), record=lambda *row: launched.append(row))
    given = Operand(torch.zeros(5, 32, device=DEVICE), None, None)
    ops._choose("plain", layer, given, "linear_residual_norm")
    ops._choose("geglu", layer, given, "geglu")
    assert [row[2] for row in launched] == ["cublas, untuned", "triton, untuned"]
    assert TUNED.choose("geglu", rows=304, shape=(32768, 2048), fp8=True).measured


def test_why_not_names_device_alignment_and_capability():
    assert "NVIDIA" in prefill_limits.why_not(device="cpu")
    odd = Linear(36, 40, name="odd").bfloat16()
    assert "multiple of 8" in prefill_limits.why_not_layer(odd, capability=(9, 0))
    assert prefill_limits.why_not_layer(Linear(48, 40, name="even").bfloat16(), capability=(8, 0)) is None
    fp8 = quantise_layer(Linear(48, 48, name="f").bfloat16(), amax=1.0)
    assert isinstance(fp8, Fp8Linear)
    assert "8.9" in prefill_limits.why_not_layer(fp8, capability=(8, 6))
    assert prefill_limits.why_not_layer(fp8, capability=(9, 0)) is None
    assert "vivace calibrate --preset int8-full" in prefill_limits.why_not_layer(fp8, capability=(8, 6))
    by_row = quantise_layer(Linear(48, 48, name="r").bfloat16(), amax=None)
    assert prefill_limits.why_not_layer(by_row, capability=(9, 0)) is None
    for elsewhere in ((8, 9), (12, 0)):
        assert "row-wise input scales run on Hopper" in prefill_limits.why_not_layer(by_row, capability=elsewhere)
    int8 = quantise_layer(Linear(48, 48, name="i").bfloat16(), amax=1.0, format="int8")
    assert prefill_limits.why_not_layer(int8, capability=(8, 0)) is None
    wide = quantise_layer(Linear(48, 48, name="i"), amax=1.0, format="int8")
    assert "bfloat16, not torch.float32" in prefill_limits.why_not_layer(wide, capability=(8, 0))
    odd = quantise_layer(Linear(48, 40, name="i").bfloat16(), amax=1.0, format="int8")
    assert "multiple of 16" in prefill_limits.why_not_layer(odd, capability=(8, 0))
    assert prefill_limits.why_not_layer(Linear(3, 5, name="time_in"), capability=(8, 0)) is None
    assert "float32" in prefill_limits.why_not_layer(Linear(8, 8, name="vision.layers.0.attn.qkv"), capability=(9, 0))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("rows", [256, 272, 304, 456, 512, 528, 560, 640, 712, 784, 968])
def test_committed_rows_give_every_gated_product_a_way_to_run(rows, fp8):
    choice = TUNED.choose("geglu", rows=rows, shape=(32768, 2048), fp8=fp8)
    assert choice.tile is None or choice.tile.split_k == 1
    if fp8 and rows in (304, 560):  # the rows that a tail was measured for: no tile of zeros more
        assert choice.tile is not None
        assert 0 < prefill_tail.carriers(rows, choice.tile) <= 2


def test_weights_are_fetched_ahead_up_to_a_size():
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    assert prefill_ahead.worth(weight, 4096) is weight
    assert prefill_ahead.worth(weight, 4095) is None
    assert prefill_ahead.worth(torch.zeros(64, 32).t(), 1 << 20) is None, "words of a strided weight are not in a row"
    assert prefill_ahead.ahead_options(weight, programs=4, warps=4)["AHEAD_LINES"] == 0, (
        "a CPU has nothing to fetch with"
    )


def test_tuning_picks_the_first_row_that_is_large_enough():
    small, large = Choice(Tile(64, 64, 64, 4, 3)), Choice(None)
    tuning = Tuning(products={Key("geglu", 64, 32, False): ((300, small), (1000, large))})
    assert tuning.choose("geglu", rows=300, shape=(64, 32), fp8=False) is small
    assert tuning.choose("geglu", rows=301, shape=(64, 32), fp8=False) is large
    assert tuning.choose("geglu", rows=5000, shape=(64, 32), fp8=False) is large
    assert tuning.choose("geglu", rows=300, shape=(64, 32), fp8=True) is not small
