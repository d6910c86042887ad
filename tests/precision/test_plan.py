"""A plan chooses layers by name, survives its file, and changes the policy by what E4M3 rounding explains and no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends import eager
from vivace.config import EngineConfig
from vivace.errors import ConfigError
from vivace.ops.layers import Fp8Linear
from vivace.precision import calibrate, plan, quantize
from vivace.types import ModelInputs


def inputs(config, seed=3):
    g = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    images = torch.rand(1, 2, 3, size, size, generator=g) * 2 - 1
    return ModelInputs(images, torch.randint(0, config.vocab_size, (1, 5), generator=g)), torch.randn(
        1, config.horizon, 32, generator=g
    )


def calibrated(model, name, config):
    backend = eager.create(model, EngineConfig(num_denoise_steps=3))
    with calibrate.watch(model) as ranges:
        observation, noise = inputs(config)
        actions = backend.denoise(backend.prefill(observation), noise)
    return calibrate.with_ranges(plan.preset(name), ranges, data="synthetic: test"), backend, actions


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("bf16", "", 0),
        ("fp8-mlp", "prefix.layers.0.mlp.gate_up", 4),
        ("fp8-full", "prefix.layers.0.attn.qkv", 9),
        ("fp8-prefix+vision", "vision.layers.0.attn.qkv", 17),
        ("fp8-all", "vision.layers.0.attn.qkv", 29),
    ],
)
def test_presets_name_exactly_their_layers(name, first, count):
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    chosen, *_ = calibrated(model, name, config)
    names = quantize.apply(model, chosen)
    assert len(names) == count
    assert first in (*names, "")
    holders = {m.name for m in model.modules() if isinstance(m, Fp8Linear)}
    assert holders == set(names)


def test_quantised_policy_differs_by_rounding_only():
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    chosen, backend, before = calibrated(model, "fp8-all", config)
    quantize.apply(model, chosen)
    observation, noise = inputs(config)
    after = backend.denoise(backend.prefill(observation), noise)
    error = ((after - before).norm() / before.norm()).item()
    assert 1e-4 < error < 0.1, (
        error
    )  # E4M3 carries 2^-4 relative error per product; none at all would mean "not applied"
    wrong = {name: value / 50 for name, value in chosen.amax.items()}  # control: saturating ranges must be visible
    model = build(config, random_tensors(config))
    quantize.apply(model, plan.PrecisionPlan("wrong", chosen.rules, wrong))
    backend = eager.create(model, EngineConfig(num_denoise_steps=3))
    assert (backend.denoise(backend.prefill(observation), noise) - before).norm() / before.norm() > 3 * error


def test_a_plan_survives_its_file(tmp_path):
    config = tiny_config("pi05")
    chosen, *_ = calibrated(build(config, random_tensors(config)), "fp8-mlp", config)
    (tmp_path / "plan.json").write_text(chosen.to_json())
    assert plan.read(tmp_path / "plan.json") == chosen


def test_bad_plans_are_refused(tmp_path):
    config = tiny_config("pi05")
    with pytest.raises(ConfigError, match="no activation range for 4 layers"):
        quantize.apply(build(config, random_tensors(config)), plan.preset("fp8-mlp"))
    with pytest.raises(ConfigError, match="unknown precision plan"):
        plan.preset("fp8-everything")
    for pattern in (5, None, ["prefix.*"]):
        rule = {"pattern": pattern, "format": "e4m3", "weight_scale": "channel"}
        (tmp_path / "plan.json").write_text(json.dumps({"version": 1, "name": "x", "rules": [rule]}))
        with pytest.raises(ConfigError, match="the pattern"):
            plan.read(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a precision plan"):
        plan.read(tmp_path / "plan.json")


def test_weights_use_the_whole_range_of_every_channel():
    weight = torch.randn(6, 32) * torch.logspace(-3, 3, 6)[:, None]
    values, scale = quantize.quantise_weight(weight, "channel")
    assert torch.equal(values.float().abs().amax(1), torch.full((6,), 448.0))
    assert ((values.float() * scale[:, None] - weight).abs() <= weight.abs() * 2**-4 + scale[:, None] * 2**-9).all()
