"""Loading is all or nothing, and every tensor lands in its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny import InMemory, build, random_tensors, tiny_config

from vivace.errors import CheckpointError
from vivace.model import weights
from vivace.precision.flavours import parameter_dtype


def load(config, tensors):
    return weights.load(
        config,
        {n: InMemory(v) for n, v in tensors.items()},
        device=torch.device("cpu"),
        dtype_of=lambda n: torch.float32,
    )


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_every_element_of_every_parameter_is_written(kind):
    config = tiny_config(kind)
    tensors = {name: torch.full_like(value, 3.0) for name, value in random_tensors(config).items()}
    for name, parameter in build(config, tensors).named_parameters():
        assert bool((parameter == 3.0).all()), name


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_packed_rows_are_the_parts_in_order(kind):
    config = tiny_config(kind)
    tensors = random_tensors(config)
    block = build(config, tensors).expert.block(1)
    p = "expert.layers.1"
    assert torch.equal(block.qkv.weight, torch.cat([tensors[f"{p}.attn.{x}.weight"] for x in "qkv"]))
    assert torch.equal(block.gate_up.weight, torch.cat([tensors[f"{p}.mlp.{x}.weight"] for x in ("gate", "up")]))


def test_missing_unknown_and_misshaped_tensors_are_all_listed():
    config = tiny_config("pi05")
    tensors = random_tensors(config)
    del tensors["projector.bias"]
    tensors["expert.layers.9.attn.q.weight"] = torch.zeros(1)
    tensors["prefix.layers.0.attn.o.weight"] = tensors["prefix.layers.0.attn.o.weight"][:, :-1]
    with pytest.raises(CheckpointError) as caught:
        load(config, tensors)
    for name in ("projector.bias", "expert.layers.9.attn.q.weight", "prefix.layers.0.attn.o.weight"):
        assert name in str(caught.value)


def test_a_transposed_square_is_the_callers_business_but_a_transposed_rectangle_is_refused():
    config = tiny_config("pi0")
    tensors = random_tensors(config)
    tensors["action_in.weight"] = tensors["action_in.weight"].T.contiguous()
    with pytest.raises(CheckpointError, match=r"action_in\.weight"):
        load(config, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_number_is_refused_with_its_tensor(value):
    config = tiny_config("pi05")
    tensors = random_tensors(config)
    tensors["vision.layers.1.mlp.fc1.weight"][3, 5] = value
    with pytest.raises(CheckpointError, match=r"vision\.layers\.1\.mlp\.fc1\.weight"):
        load(config, tensors)


def test_the_files_own_name_of_a_damaged_tensor_is_told():
    config = tiny_config("pi05")
    tensors = random_tensors(config)
    tensors["action_in.bias"][0] = float("nan")
    sources = {name: InMemory(value, key=f"file/{name}") for name, value in tensors.items()}
    with pytest.raises(CheckpointError, match=r"action_in\.bias \(in the file: file/action_in\.bias\)"):
        weights.load(config, sources, device=torch.device("cpu"), dtype_of=lambda n: torch.float32)


def test_bfloat16_flavours_keep_what_the_originals_keep():
    for name, openpi, lerobot in [
        ("vision.patch.weight", "float32", "float32"),
        ("vision.layers.3.attn.q.weight", "bfloat16", "float32"),
        ("projector.weight", "bfloat16", "float32"),
        ("embedding.weight", "bfloat16", "bfloat16"),
        ("prefix.layers.0.norm1.weight", "float32", "float32"),
        ("prefix.layers.0.attn.q.weight", "bfloat16", "bfloat16"),
        ("expert.layers.0.norm2.modulation.weight", "float32", "float32"),
        ("expert.norm.weight", "float32", "float32"),
        ("expert.layers.0.mlp.down.weight", "bfloat16", "bfloat16"),
        ("action_in.weight", "float32", "float32"),
        ("time_out.bias", "float32", "float32"),
    ]:
        for flavour, wanted in (("openpi_torch", openpi), ("lerobot", lerobot)):
            got = parameter_dtype(name, precision="bfloat16", flavour=flavour)
            assert str(got) == f"torch.{wanted}", (name, flavour)
            with_vision = parameter_dtype(name, precision="bfloat16+vision", flavour=flavour)
            assert str(with_vision) == f"torch.{openpi}", (name, flavour)
        assert parameter_dtype(name, precision="float32", flavour="lerobot") is torch.float32
