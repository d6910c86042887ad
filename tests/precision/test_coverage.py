"""Coverage: counts equal first principles, precision is what operations were handed, nothing falls back unseen."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends import eager
from vivace.backends.loop import run_flow
from vivace.check.roofline import Workload, stage_costs
from vivace.config import EngineConfig
from vivace.ops.layers import Fp8Linear, Linear
from vivace.ops.table import reference_ops
from vivace.precision import calibrate, fit, plan, quantize
from vivace.precision.coverage import Coverage, as_json, fallbacks, grouped, layer_flops, rows, summary
from vivace.types import ModelInputs

STEPS = 3


def inputs(config):
    g = torch.Generator().manual_seed(3)
    size = config.vision.image_size
    images = torch.rand(1, 2, 3, size, size, generator=g) * 2 - 1
    noise = torch.randn(1, config.horizon, config.action_width, generator=g)
    return ModelInputs(images, torch.randint(0, config.vocab_size, (1, 5), generator=g)), noise


def run(model, config):
    backend = eager.create(model, EngineConfig(num_denoise_steps=STEPS))
    observation, noise = inputs(config)
    backend.denoise(backend.prefill(observation), noise)


def watched(model, config) -> Coverage:
    seen, before = Coverage(kernel="eager"), model.ops
    backend = eager.create(model, EngineConfig(num_denoise_steps=STEPS))  # its time table is made before anyone looks
    observation, noise = inputs(config)
    model.ops = seen.wrap(before)
    backend.denoise(backend.prefill(observation), noise)
    model.ops = before
    return seen


@pytest.fixture
def quantised():
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    with calibrate.watch(model) as ranges:
        run(model, config)
    chosen = calibrate.with_ranges(plan.preset("fp8-full"), ranges, data="synthetic: test")
    names = fit.all_layers(model)
    return config, model, chosen, names


def test_operations_equal_the_roofline_count():
    config = tiny_config("pi05")
    seen = watched(build(config, random_tensors(config)), config)
    got = sum(e.flops * (STEPS if k[0].startswith(("expert.", "action_")) else 1) for k, e in seen.seen.items())
    work = Workload(views=2, prompt_tokens=5, horizon=config.horizon, steps=STEPS)
    assert got == sum(cost.flops for cost in stage_costs(config, work))
    table = rows(seen, steps=STEPS)
    assert sum(row.flops_share for row in table) == pytest.approx(1.0)
    assert sum(row.bytes_share for row in table) == pytest.approx(1.0)


def test_joined_steps_have_the_same_work_as_separate_ones():
    """The boundary of two steps is one operation in graphs: action_in and action_out still count once per step."""
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    apart, joined, before = watched(model, config), Coverage(kernel="torch"), model.ops
    observation, noise = inputs(config)
    cache, table = (
        eager.create(model, EngineConfig(num_denoise_steps=STEPS)).prefill(observation),
        model.time_table(STEPS),
    )
    model.ops = joined.wrap(before)
    run_flow(model, None, table, cache, noise, previous=None, trace=None)
    model.ops = before
    assert ("action_out", "step_boundary") in joined.seen

    def heads(seen):
        return sum(flops for layer, flops in layer_flops(seen, steps=STEPS).items() if layer.startswith("action_"))

    product = 2 * config.horizon * config.action_width * config.expert.width
    assert heads(joined) == heads(apart) == STEPS * 2 * product
    boundary = next(row for row in rows(joined, steps=STEPS) if row.operation == "step_boundary")
    last = next(row for row in rows(joined, steps=STEPS) if (row.layer, row.operation) == ("action_out", "linear"))
    assert boundary.flops_share == pytest.approx(2 * (STEPS - 1) * last.flops_share)


def test_a_plan_that_ran_shows_every_layer_in_e4m3(quantised):
    config, model, chosen, names = quantised
    done = quantize.apply(model, chosen)
    table = rows(watched(model, config), steps=STEPS, plan=chosen, layers=names)
    small = {row.layer for row in table if row.precision == "e4m3"}
    assert small == set(done)
    assert fallbacks(table) == []
    assert {row.precision for row in table if row.layer.endswith("norm1")} == {"float32", "float32 to e4m3"}
    said = summary(table)
    assert said["flops_by_precision"]["e4m3"] > 0
    assert said["fallbacks"] == []
    assert list(as_json(table)[0]) == [
        "layer", "operation", "kernel", "precision", "flops_share", "bytes_share", "fallback",
    ]  # fmt: skip


def test_a_layer_that_was_skipped_is_a_fallback(quantised):
    config, model, chosen, names = quantised
    kept = model.prefix.block(1).down
    quantize.apply(model, chosen)
    model.prefix.block(1).down = kept
    table = rows(watched(model, config), steps=STEPS, plan=chosen, layers=names)
    assert [(row.layer, row.operation) for row in table if row.fallback] == [
        ("prefix.layers.1.mlp.down", "linear_residual_norm")
    ]
    assert "it ran in float32" in fallbacks(table)[0]
    assert [group["layers"] for group in grouped(table) if group["fallback"]] == [1]


def test_a_layer_that_never_ran_is_a_fallback(quantised):
    config, model, chosen, names = quantised
    quantize.apply(model, chosen)
    seen = watched(model, config)
    del seen.seen["prefix.layers.0.mlp.gate_up", "geglu"]
    found = fallbacks(rows(seen, steps=STEPS, plan=chosen, layers=names))
    assert found == ["prefix.layers.0.mlp.gate_up linear: the plan says e4m3, it never ran"]


def test_one_call_of_many_in_another_format_is_a_fallback(quantised):
    _, _, chosen, _ = quantised
    seen = Coverage(kernel="eager")
    ops = seen.wrap(reference_ops())
    plain = Linear(8, 8, name="prefix.layers.0.attn.o")
    torch.nn.init.normal_(plain.weight)
    small = quantize.quantise_layer(plain, amax=3.0)
    for holder in (small, small, plain):
        ops.linear(torch.ones(1, 2, 8), holder)
    table = rows(seen, steps=STEPS, plan=chosen)
    assert table[0].precision == "e4m3 + float32"
    assert table[0].fallback == "the plan says e4m3, it ran in float32"


def test_kernels_report_themselves_and_the_rest_has_the_default_name():
    seen, layer = Coverage(kernel="torch"), Linear(8, 4, name="a")
    torch.nn.init.normal_(layer.weight)
    real = reference_ops()

    def kernel(x, one):
        seen.record(one.name, "linear", "triton")
        return real.linear(x, one)

    ops = seen.wrap(dataclasses.replace(real, linear=kernel))
    x = torch.ones(1, 3, 8)
    ops.linear(x, layer)
    ops.linear_gelu(x, layer, layer)
    table = rows(seen, steps=STEPS)
    assert [(row.operation, row.kernel) for row in table] == [("linear", "triton"), ("linear_gelu", "torch")]
    assert seen.kernels == {"a linear": "triton"}
    assert layer_flops(seen, steps=STEPS) == {"a": 2 * (2 * 3 * 8 * 4)}, "it ran twice"
    assert seen.seen["a", "linear"].moved_bytes == 4 * (3 * 8 + 8 * 4 + 3 * 4)
    seen.clear()
    assert (rows(seen, steps=STEPS), seen.kernels) == ((), {})


def test_holders_in_a_model_are_what_the_plan_says(quantised):
    _, model, chosen, names = quantised
    quantize.apply(model, chosen)
    assert {m.name for m in model.modules() if isinstance(m, Fp8Linear)} == {n for n in names if chosen.quantises(n)}
