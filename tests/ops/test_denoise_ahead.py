"""Products with early weights without a GPU: they compile for Hopper at the model's shapes, and refuse the rest."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from vivace.ops import denoise_ahead
from vivace.ops.denoise_ahead import AHEAD_TILES, AheadTile
from vivace.ops.layers import Fp8Linear, Linear

CHILD = Path(__file__).with_name("compiled_ahead.py")
WIDTHS = {"qkv": (2560, 1024), "o": (1024, 2048), "gate_up": (8192, 1024), "down": (1024, 4096)}


def test_compiles_for_hopper(compiled_alone):
    assert "checked 33 kernels" in compiled_alone(CHILD)


class OnHopper(torch.Tensor):
    """A weight without storage that says it is on a GPU."""

    device = torch.device("cuda")


def layer(name, *, fp8=False, dtype=torch.bfloat16):
    shape = WIDTHS[name]
    weight = torch.empty(shape, dtype=torch.float8_e4m3fn if fp8 else dtype, device="meta").as_subclass(OnHopper)
    if fp8:
        made = Fp8Linear(name, torch.empty(0), weight_scale=torch.ones(1), input_scale=torch.ones(1), bias=None)
    else:
        made = Linear(1, 1, name=name)
    del made.weight
    made.weight = weight
    return made


def refusal(tile, name="down", *, rows=10, pairs=1, **kind):
    return denoise_ahead.why_not(layer(name, **kind), tile, rows=rows, pairs=pairs)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_every_cut_of_the_table_fits(hopper):
    for (rows, fp8), tiles in AHEAD_TILES.items():
        for name in WIDTHS:
            pairs = 2 if name in ("qkv", "gate_up") else 1
            assert refusal(getattr(tiles, name), name, rows=rows, pairs=pairs, fp8=fp8) is None


def test_tiles_for(hopper):
    assert denoise_ahead.tiles_for(16, layer("o")) is AHEAD_TILES[16, False]
    assert denoise_ahead.tiles_for(17, layer("o", fp8=True)) is AHEAD_TILES[64, True]
    assert denoise_ahead.tiles_for(65, layer("o")) is None


def test_refusals(hopper):
    tile = AheadTile(32, 4)
    assert refusal(tile) is None
    assert "65 rows" in refusal(tile, rows=65)
    assert "multiple" in refusal(AheadTile(48, 4))
    assert "multiple" in refusal(AheadTile(32, 3))
    assert "multiple" in refusal(AheadTile(32, 4, warps=16, bars=3))
    assert "shared memory" in refusal(AheadTile(64), "gate_up", pairs=2)
    assert "shared memory" in refusal(AheadTile(32, slots=8), "gate_up", rows=50, pairs=2)
    assert "ring" in refusal(AheadTile(32, 4, slots=1), rows=50)
    assert "neither" in refusal(tile, dtype=torch.float32)
    assert "neither" in refusal(tile, dtype=torch.float16)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_only_on_hopper(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert "Hopper" in refusal(AheadTile(32, 4))
    cpu = Linear(4096, 1024, name="down")
    assert "Hopper" in denoise_ahead.why_not(cpu, AheadTile(32, 4), rows=10, pairs=1)
    assert denoise_ahead.tiles_for(10, cpu) is None
    assert denoise_ahead.tiles_for(10, layer("down")) is None


def test_without_gluon(monkeypatch, hopper):
    monkeypatch.setattr(denoise_ahead, "gl", None)
    assert "Gluon" in refusal(AheadTile(32, 4))


def test_settings_are_described():
    described = denoise_ahead.AheadTile.__doc__
    assert all(f"\n    {field.name} " in described for field in fields(AheadTile))
