"""The denoise table's own words, without a GPU: what it refuses, and which kernel it says has run."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from vivace.config import ModelConfig, VisionConfig
from vivace.errors import ShapeError, Unsupported
from vivace.ops import (
    denoise,
    denoise_ahead,
    denoise_attention,
    denoise_gemm,
    denoise_norm,
    launch,
    prefill,
    prefill_limits,
)
from vivace.ops.denoise_ahead import AHEAD_TILES
from vivace.ops.layers import Linear, RmsNorm
from vivace.ops.table import reference_ops
from vivace.precision.quantize import quantise_layer

CPU = torch.device("cpu")


def test_why_not_judges_heads_and_rows():
    assert denoise.why_not(head_dim=16, device=CPU) is None
    assert denoise.why_not(head_dim=256, device=CPU, rows=128) is None
    for head_dim in (8, 24, 512):
        assert "power of two from 16 to 256" in denoise.why_not(head_dim=head_dim, device=CPU)
    assert "150 action rows" in denoise.why_not(head_dim=256, device=CPU, rows=150)


def test_too_many_rows_are_refused_in_words():
    denoise.check_rows(batch=2, horizon=64)
    with pytest.raises(Unsupported) as caught:
        denoise.check_rows(batch=3, horizon=50)
    error = caught.value
    assert (error.got, error.wanted) == (
        "batch 3 x horizon 50 = 150 action rows", "at most 128 action rows (batch x horizon)"
    )  # fmt: skip
    assert "smaller batches" in error.do
    assert "eager or compiled" in error.do


def test_a_call_with_too_many_rows_says_the_same():
    """Three chunks of 50 pass the denoise kernels by and reach the prefill's, which have no modulation."""
    table = denoise.denoise_ops(prefill.table_of(prefill.Prefill({}, torch.ones(1, 1))))
    norm, layer, x = RmsNorm(32, name="expert.n", modulated=True), Linear(32, 64, name="l"), torch.zeros(3, 50, 32)
    modulation = torch.zeros(1, 96)
    calls = [
        lambda: table.rms_norm(x, norm, modulation, layer),
        lambda: table.linear_residual_norm(x, Linear(32, 32, name="o"), x, None, norm, modulation, layer),
    ]
    for run in calls:
        with pytest.raises(Unsupported, match="150 rows") as caught:
            run()
        assert caught.value.wanted == "at most 128 action rows (batch x horizon)"
        assert "smaller batches" in caught.value.do


def test_gate_and_modulation_of_other_tokens_are_refused():
    residual, norm = torch.zeros(4, 32), RmsNorm(32, name="n", modulated=True)
    with pytest.raises(ShapeError, match="1 and 4 rows"):
        denoise_norm.sum_norm(
            torch.zeros(1, 4, 32), residual, torch.zeros(1, 32), norm, torch.zeros(4, 96), Linear(32, 8, name="l")
        )


@pytest.fixture
def launched(monkeypatch):
    """Kernels that launch nothing: only the choice between them is looked at."""
    for module in (denoise_ahead, denoise_gemm):
        monkeypatch.setattr(module, "parts", lambda x, layer, *_: torch.zeros(1, x.shape[0], layer.weight.shape[0]))
        monkeypatch.setattr(module, "geglu", lambda x, layer, *_: torch.zeros(x.shape[0], layer.weight.shape[0] // 2))
        monkeypatch.setattr(module, "qkv", lambda x, layer, *_: torch.zeros(x.shape[0], layer.weight.shape[0]))
    monkeypatch.setattr(denoise_norm, "sum_norm", lambda parts, residual, *_, **__: (residual, residual))
    monkeypatch.setattr(denoise_attention, "attention", lambda q, *_: q.flatten(2))
    monkeypatch.setattr(denoise_ahead, "tiles_for", lambda rows, layer: AHEAD_TILES[16, False])
    monkeypatch.setattr(denoise_ahead, "_unavailable", lambda device: None)


def layer(rows, columns, name):
    made = Linear(1, 1, name=name)
    made.weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.bfloat16))
    return made


def ran(*, early, width=1024, **options):
    """{operation: kernel} of one layer."""
    said = {}
    table = denoise.denoise_ops(
        reference_ops(), record=lambda name, operation, kernel: said.update({operation: kernel}),
        early_weights=early, **options,
    )  # fmt: skip
    x, norm = torch.zeros(1, 10, width, dtype=torch.bfloat16), RmsNorm(width, name="n", modulated=True)
    rope = (torch.zeros(1, 10, 128), torch.zeros(1, 10, 128))
    o = layer(width, 2048, "attn.o")
    q, k, v = table.qkv_rope(x, layer(2560, width, "attn.qkv"), rope, (8, 1, 256))
    table.attention(q, k, v, None, (torch.zeros(1, 16, 1, 256),) * 2, o)
    mixed = torch.zeros(1, 10, 2048, dtype=torch.bfloat16)
    table.linear_residual_norm(mixed, o, x, None, norm, torch.zeros(1, 3 * width), layer(8192, width, "mlp.gate_up"))
    table.geglu(x, layer(8192, width, "mlp.gate_up"), layer(width, 4096, "mlp.down"))
    return said


def in_int8(rows, columns, name):
    return quantise_layer(layer(rows, columns, name), amax=1.0, format="int8")


def test_int8_of_few_rows_is_left_to_the_table_below(launched):
    """A prefix of few tokens: these kernels would read its codes as other numbers, or write none."""
    said, below = [], []
    operations = ("rms_norm", "linear", "linear_residual_norm", "geglu", "qkv_rope", "attention", "step_boundary")
    base = replace(reference_ops(), **{name: lambda *_, name=name: below.append(name) for name in operations})
    table = denoise.denoise_ops(base, record=lambda *row: said.append(row))
    x, norm = torch.zeros(1, 10, 32, dtype=torch.bfloat16), RmsNorm(32, name="n")
    wide, small = layer(32, 32, "wide"), in_int8(32, 32, "small")
    rope, cache = (torch.zeros(1, 10, 16),) * 2, (torch.zeros(1, 16, 1, 32),) * 2
    codes, q = x.to(torch.int8), x[:, :, None]
    table.rms_norm(x, norm, None, small)
    table.linear(codes, small)
    table.linear_residual_norm(codes, small, x, None, norm, None, wide)
    table.linear_residual_norm(x, wide, x, None, norm, None, small)
    table.geglu(codes, in_int8(64, 32, "gate_up"), wide)
    table.geglu(x, layer(64, 32, "gate_up"), small)
    table.qkv_rope(codes, in_int8(96, 32, "qkv"), rope, (1, 1, 32))
    table.attention(q, q, q, None, cache, small)
    table.step_boundary(x, layer(32, 32, "out"), x, -0.1, layer(32, 32, "in"), norm, None, small)
    assert said == []
    assert below == [
        "rms_norm", "linear", "linear_residual_norm", "linear_residual_norm", "geglu", "geglu", "qkv_rope", "attention",
        "step_boundary",
    ]  # fmt: skip


def test_the_recorder_names_the_kernel_of_each_product(launched):
    assert set(ran(early=False).values()) == {"triton"}
    early = "gluon early weights"
    assert ran(early=True) == {
        "qkv_rope": early, "attention": "triton", "linear_residual_norm": early, "geglu": early
    }  # fmt: skip


def test_a_product_that_cannot_bring_its_weights_early_is_not_said_to(launched, monkeypatch):
    real = denoise_ahead.why_not

    def refuses(made, *arguments, **more):
        return "no room" if made.name == "attn.o" else real(made, *arguments, **more)

    monkeypatch.setattr(denoise_ahead, "why_not", refuses)
    said = ran(early=True)
    assert said["linear_residual_norm"] == "triton"
    assert said["geglu"] == "gluon early weights"


def test_a_shape_that_nobody_measured_is_called_untuned(launched):
    said = ran(early=False, width=512)
    assert said["geglu"] == said["qkv_rope"] == said["linear_residual_norm"] == "triton, untuned"
    chosen = ran(early=False, width=512, tiles=denoise.TILES[16, False])  # the caller's own cuts
    assert chosen["geglu"] == "triton"


def test_what_passes_the_denoise_kernels_by_is_reported_by_the_prefill():
    said = []
    note = lambda *what: said.append(what)  # noqa: E731
    table = denoise.denoise_ops(prefill.table_of(prefill.Prefill({}, torch.ones(1, 1), record=note)), record=note)
    leave, enter = Linear(32, 65, name="action_out", bias=True), Linear(65, 32, name="action_in", bias=True)
    for made in (leave, enter):
        for parameter in made.parameters():
            torch.nn.init.zeros_(parameter)
    n, x = torch.zeros(1, 4, 32), torch.zeros(1, 4, 65)  # wider than the kernel takes
    plain = RmsNorm(32, name="n")
    torch.nn.init.zeros_(plain.weight)
    table.step_boundary(n, leave, x, -0.1, enter, plain, None, Linear(32, 8, name="qkv"))
    table.linear(torch.zeros(1, 100), Linear(100, 100, name="time_in"))
    assert said == [("action_out", "step_boundary", "torch"), ("time_in", "linear", "torch")]


def test_a_driver_that_refuses_a_division_is_named_once(monkeypatch, caplog):
    class Driver:
        status, calls = 1, 0

        def cuFuncSetAttribute(self, *arguments):  # noqa: N802
            self.calls += 1
            return self.status

    class Launched:
        function = 7

    driver = Driver()
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    launch._refused.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            launch.share(Launched(), launch.MOST)
        launch.share(None, launch.MOST)  # the interpreter
    assert driver.calls == 3
    assert [record.getMessage().count("CUDA error 1") for record in caplog.records] == [1]
    caplog.clear()
    driver.status = 0
    launch.share(Launched(), launch.MOST)
    assert not caplog.records


def test_heads_are_judged_with_the_model():
    assert prefill_limits.why_not_vision_head(1152, 16) is None
    for width, heads in ((128, 16), (128, 8), (100, 3), (160, 8), (2400, 8)):  # 8, 16, no whole number, 20, 300 columns
        assert "24 to 256" in prefill_limits.why_not_vision_head(width, heads), (width, heads)
    assert prefill_limits.why_not_vision_head(48, 2) is None
    assert prefill_limits.why_not_head(256) is None
    assert "head size 96" in prefill_limits.why_not_head(96)


def test_why_not_looks_at_the_heads_of_the_network(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    room = {"bytes": 232_448}
    monkeypatch.setattr(launch, "shared_bytes", lambda device: room["bytes"])
    network = torch.nn.Module()
    network.config = ModelConfig()
    assert prefill_limits.why_not(device="cuda", model=network) is None
    network.config = replace(ModelConfig(), vision=replace(VisionConfig(), num_heads=144))
    assert prefill_limits.why_not(device="cuda", model=network).startswith("vision: 144 heads in 1152 columns")
    network.config = replace(ModelConfig(), prefix=replace(ModelConfig().prefix, head_dim=512))
    assert prefill_limits.why_not(device="cuda", model=network).startswith("prefix: head size 512")
    room["bytes"] = 101_376  # RTX 50
    assert "this GPU has 101376" in prefill_limits.why_not(device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert prefill_limits.why_not(device="cuda") is None


def test_little_shared_memory_keeps_the_middle_attention_for_long_caches():
    tiles = denoise.TILES[denoise.MAX_ROWS, False]
    for room, wanted in ((None, tiles.attention), (232_448, tiles.attention), (101_376, tiles.attention_mid)):
        assert denoise._attention_tile(tiles, 968, room) is wanted
        assert denoise._attention_tile(tiles, 560, room) is tiles.attention_mid
        assert denoise._attention_tile(tiles, 304, room) is tiles.attention_short
