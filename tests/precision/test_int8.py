"""INT8 as the reference operations compute it, against numpy; and its plans, which are those of FP8 in another format."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))

from tiny import build, random_tensors, tiny_config

from vivace.backends import cuda_graph, eager
from vivace.config import EngineConfig
from vivace.errors import ConfigError
from vivace.ops import reference
from vivace.ops.layers import Fp8Linear, Int8Linear, Linear
from vivace.precision import calibrate, coverage, fit, plan, quantize, sensitivity
from vivace.types import ModelInputs

RANGE = 6.0


def oracle(x: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """Codes int8: divide in float32, round to nearest even, clamp."""
    return np.clip(np.rint(x / scale), -128, 127).astype(np.int8)


def layer(weight: torch.Tensor, bias: torch.Tensor | None = None, *, granularity="channel", amax=RANGE) -> Int8Linear:
    plain = Linear(weight.shape[1], weight.shape[0], name="prefix.layers.0.mlp.down", bias=bias is not None)
    plain.weight.data = weight
    if bias is not None:
        plain.bias.data = bias
    return quantize.quantise_layer(plain, amax=amax, format="int8", granularity=granularity)


def test_inputs_are_rounded_and_clamped():
    scale = np.float32(RANGE / 127)
    ties = (np.arange(-128, 127, dtype=np.float32) + np.float32(0.5)) * scale
    outside = np.array([RANGE, -RANGE, 1.001 * RANGE, -50 * RANGE, 1e30, -1e30, 1e-30, 0.0, -0.0], np.float32)
    x = np.concatenate([np.random.default_rng(0).normal(0, 2, 4000).astype(np.float32), ties, outside])
    small = layer(torch.randn(4, 8))
    got = reference.hand_over(torch.from_numpy(x), small)
    assert got.dtype == torch.int8
    assert np.array_equal(got.numpy(), oracle(x, small.input_scale.numpy()[0]))
    assert (got.min(), got.max()) == (-128, 127)
    assert reference.hand_over(got, small) is got, "codes stay as they are"
    wrong = oracle(x, small.input_scale.numpy()[0] * np.float32(1.1))
    assert (got.numpy() != wrong).mean() > 0.5


def test_half_a_step_goes_to_the_even_number():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert reference.round_to(values, torch.int8).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_weights_are_the_codes_of_the_oracle(granularity):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 16)[:, None]
    small = layer(weight, granularity=granularity)
    largest = np.abs(weight.numpy()).max(
        axis=1 if granularity == "channel" else None, keepdims=granularity == "channel"
    )
    scale = np.broadcast_to((largest / np.float32(127)).astype(np.float32), (16, 1))
    assert np.array_equal(small.weight_scale.numpy(), scale[:, 0])
    assert np.array_equal(small.weight.numpy(), oracle(weight.numpy(), scale))
    assert small.weight.abs().max() == 127, "symmetric: -128 is never a weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_dequantised_codes(dtype):
    g = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(24, 96, generator=g).to(dtype), torch.randn(24, generator=g).to(dtype)
    x = (2 * torch.randn(5, 96, generator=g)).to(dtype)
    got = reference.linear(x, layer(weight, bias))
    assert got.dtype == dtype
    s = np.float32(RANGE) / np.float32(127)
    scale = np.abs(weight.float().numpy()).max(1, keepdims=True) / np.float32(127)
    x8 = oracle(x.float().numpy(), s).astype(np.float64) * s
    w8 = oracle(weight.float().numpy(), scale).astype(np.float64) * scale
    wanted = x8 @ w8.T + bias.double().numpy()
    error = np.abs(got.double().numpy() - wanted).max() / np.abs(wanted).max()
    assert error <= (1e-6 if dtype == torch.float32 else 2**-8), error
    exact = x.double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    assert np.linalg.norm(got.double().numpy() - exact) / np.linalg.norm(exact) > 2e-3, "nothing was quantised"


def test_a_wrong_scale_is_seen():
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(24, 96, generator=g), torch.randn(5, 96, generator=g)
    exact, small = x @ weight.T, layer(weight)

    def error(of: Int8Linear) -> float:
        return ((reference.linear(x, of) - exact).norm() / exact.norm()).item()

    right = error(small)
    assert right < 0.025
    assert error(layer(weight, amax=0.5)) > 4 * right, "most inputs saturate"
    small.weight_scale.data *= 1.25
    assert error(small) > 4 * right
    small.weight_scale.data = small.weight_scale.data.flip(0) / 1.25
    assert error(small) > 4 * right, "scales of other channels"


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["mlp", "full"])
def test_presets_name_the_layers_of_their_fp8_namesakes(which):
    names = fit.all_layers(build(tiny_config("pi05"), random_tensors(tiny_config("pi05"))))
    small, eight = plan.preset(f"int8-{which}").formats(names), plan.preset(f"fp8-{which}").formats(names)
    assert small == dict.fromkeys(eight, "int8")
    assert set(eight.values()) == {"e4m3"}


def prepared(name="int8-mlp"):
    """(model in INT8, plan): ranges of 4 everywhere."""
    config = tiny_config("pi05")
    model = build(config, random_tensors(config), dtype_of=lambda name: torch.bfloat16)
    names = [one for one in fit.all_layers(model) if plan.preset(name).quantises(one)]
    chosen = replace(plan.preset(name), amax=dict.fromkeys(names, 4.0), data="a test")
    assert quantize.apply(model, chosen) == tuple(names)
    return model, chosen


def test_applied_where_the_plan_says():
    model, chosen = prepared("int8-full")
    found = {one.name for one in model.modules() if isinstance(one, Int8Linear)}
    assert found == set(chosen.amax)
    assert not any(isinstance(one, Fp8Linear) for one in model.modules())


def test_formats_may_be_mixed():
    config = tiny_config("pi05")
    model, name = build(config, random_tensors(config)), "prefix.layers.0.mlp.down"
    rules = (plan.Rule(name, "int8", "tensor"), plan.Rule("prefix.layers.0.mlp.*"))
    chosen = plan.PrecisionPlan("mixed", rules, {name: 1.0, "prefix.layers.0.mlp.gate_up": 1.0})
    quantize.apply(model, chosen)
    found = {
        one.name: quantize.format_of(one) for one in model.prefix.modules() if isinstance(one, Fp8Linear | Int8Linear)
    }
    assert found == {name: "int8", "prefix.layers.0.mlp.gate_up": "e4m3"}


def test_json_round_trip_and_damage(tmp_path):
    _, chosen = prepared()
    path = tmp_path / "plan.json"
    path.write_text(chosen.to_json())
    assert plan.read(path) == chosen
    document = json.loads(chosen.to_json())
    document["rules"][0]["format"] = "int4"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"'int4' in the rule.*int8"):
        plan.read(path)


def test_what_becomes_zero_is_that_of_the_format():
    ranges, x = calibrate.Ranges(), torch.tensor([[[1.0, 0.003, 0.004, 1e-6]]])
    names = "e4m3", "int8"
    for name in names:
        ranges.see(Linear(4, 4, name=name), x)
    found = ranges.measured(format_of=lambda name: name)
    assert [found[name].flushed for name in names] == [1, 2], "below 2^-10/448 of the range, below 0.5/127"


def test_coverage_names_a_layer_that_ran_otherwise():
    _, chosen = prepared()
    seen = coverage.Coverage(kernel="x")
    seen.seen["prefix.layers.0.mlp.down", "linear_residual_norm"] = coverage.Seen({"x"}, {"e4m3"}, 1, 1.0, 1.0)
    seen.seen["prefix.layers.0.mlp.gate_up", "geglu"] = coverage.Seen({"x"}, {"int8"}, 1, 1.0, 1.0)
    table = coverage.rows(seen, steps=1, plan=chosen, layers=[*list(chosen.amax)[:2], "prefix.layers.9.mlp.down"])
    assert [row.fallback for row in table] == [
        "the plan says int8, it ran in e4m3", "", "the plan says int8, it never ran",
    ]  # fmt: skip


def test_sensitivity_keeps_the_format():
    config = tiny_config("pi05")
    model, (_, chosen) = build(config, random_tensors(config)), prepared()
    with sensitivity.quantised(model, chosen, chosen.amax):
        assert {one.name for one in model.modules() if isinstance(one, Int8Linear)} == set(chosen.amax)
    score = sensitivity.Score(0.0, 1.0)
    rows = [sensitivity.Alone(name, 1.0, score) for name in chosen.amax]
    mixed = sensitivity.most_fp8(model, chosen, rows, bound=0.1, measure=lambda: score, progress=lambda text: None)
    assert {rule.format for rule in mixed.plan.rules} == {"int8"}


def test_the_graph_backend_refuses_int8_in_the_action_expert_alone():
    """No kernel of the denoise loop computes it; the prefix passes this judgement, whatever else the machine lacks."""
    model, _ = prepared("int8-full")
    assert "INT8" not in str(cuda_graph.why_not_model(model))
    name = "expert.layers.1.mlp.down"
    quantize.apply(model, plan.PrecisionPlan("one", (plan.Rule(name, "int8"),), {name: 1.0}))
    assert cuda_graph.why_not_model(model) == (
        f"{name} is INT8, which the kernels of the action expert do not take; --backend tensorrt does"
    )
    config = tiny_config("pi05")
    plain = build(config, random_tensors(config), dtype_of=lambda name: torch.bfloat16)
    assert "INT8" not in str(cuda_graph.why_not_model(plain))


@pytest.mark.parametrize(("name", "shows"), [("fp8-full", True), ("int8-mlp", True), ("int8-full", False)])
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_whether_a_broken_activation_shows_in_the_actions(kind, name, shows):
    """Decision 0010: codes hold no NaN, and under int8-full nothing but codes leads from the prefix to the actions."""
    config = tiny_config(kind)
    model = build(config, random_tensors(config))
    names = [one for one in fit.all_layers(model) if plan.preset(name).quantises(one)]
    quantize.apply(model, replace(plan.preset(name), amax=dict.fromkeys(names, 4.0)))
    model.projector.bias.data.fill_(float("nan"))
    backend = eager.create(model, EngineConfig(num_denoise_steps=2))
    g = torch.Generator().manual_seed(1)
    size = config.vision.image_size
    images = torch.randint(0, 256, (1, 2, 3, size, size), dtype=torch.uint8, generator=g)
    state = torch.randn(1, 32, generator=g) if kind == "pi0" else None
    inputs = ModelInputs(images, torch.randint(0, config.vocab_size, (1, 5), generator=g), state=state)
    actions = backend.infer(inputs, torch.randn(1, config.horizon, 32, generator=g))
    assert bool(torch.isfinite(actions).all()) != shows
