"""Input scales of each row and of each denoise step: what they compute, which plans may have them, and who refuses them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends import base, eager
from vivace.backends.loop import run_flow
from vivace.backends.tensorrt import skeleton
from vivace.check import hopper_rows
from vivace.config import EngineConfig
from vivace.errors import ConfigError, Unsupported
from vivace.model import flow
from vivace.ops import prefill_limits, reference
from vivace.ops.layers import Fp8Linear, Linear, RowFp8Linear
from vivace.precision import calibrate, fit, plan, quantize, sensitivity
from vivace.precision.coverage import Coverage, fallbacks, rows
from vivace.precision.plan import PrecisionPlan, Rule
from vivace.types import ModelInputs, PreviousChunk

STEPS = 3
DOWN = "expert.layers.0.mlp.down"


def layer(out: int, inside: int, *, name: str = "prefix.layers.0.mlp.down", bias: bool = False) -> Linear:
    made = Linear(inside, out, name=name, bias=bias).requires_grad_(False)
    g = torch.Generator().manual_seed(out + inside)
    made.weight.data = torch.randn(out, inside, generator=g)
    if bias:
        made.bias.data = torch.randn(out, generator=g)
    return made


# --- row by row -------------------------------------------------------------------------------------------------------


def uneven_rows() -> np.ndarray:
    """Rows from 1e-5 to 1e5, one of zeros, one with a value far beyond the others."""
    x = np.random.default_rng(0).normal(0, 1, (13, 48)).astype(np.float32) * np.logspace(-5, 5, 13)[:, None]
    x[4], x[7, 5] = 0.0, 3e4
    return x.astype(np.float32)


def oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 and scales, in numpy with another implementation of the format."""
    scale = np.maximum(np.abs(x).max(1, keepdims=True) / np.float32(448), np.float32(1e-12))
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def test_every_row_has_its_own_scale():
    x = uneven_rows()
    codes, scales = reference.rows_to_e4m3(torch.from_numpy(x))
    wanted, wanted_scales = oracle(x)
    assert np.array_equal(scales.numpy(), wanted_scales)
    assert np.array_equal(codes.view(torch.uint8).numpy(), wanted)
    wrong, _ = oracle(x * np.float32(1.07))  # control: the codes of other numbers
    assert (wanted == wrong).mean() > 0.9, "a row's codes do not depend on its size"
    assert (oracle(x[:, ::-1])[0] != wanted).mean() > 0.5


def test_a_product_is_that_of_the_dequantised_rows():
    x, plain = torch.from_numpy(uneven_rows()), layer(24, 48, bias=True)
    small = quantize.quantise_layer(plain, amax=None)
    assert isinstance(small, RowFp8Linear)
    assert torch.equal(reference.hand_over(x.double(), small), x), "it is handed rows in its dtype"
    codes, scales = oracle(x.numpy())
    w_scale = np.abs(plain.weight.numpy()).max(1, keepdims=True) / np.float32(448)
    w8 = (plain.weight.numpy() / w_scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * w_scale
    wanted = (codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales) @ w8.T + plain.bias.double().numpy()
    got = reference.linear(x, small).double().numpy()
    assert np.abs(got - wanted).max(1) == pytest.approx(0, abs=1e-5 * np.abs(wanted).max())
    assert (np.abs(got - wanted).max(1) <= 1e-5 * np.abs(wanted).max(1)).all()


def test_small_rows_keep_what_one_scale_for_all_flushes():
    x = torch.from_numpy(uneven_rows())[[0, 1, 12]]
    plain = layer(24, 48)
    exact = reference.linear(x, plain)
    for amax, lost in ((None, False), (float(x.abs().max()), True)):
        got = reference.linear(x, quantize.quantise_layer(plain, amax=amax))
        error = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(error[2]) < 0.1
        assert (float(error[0]) == 1.0) == lost


def test_a_broken_row_stays_broken_and_alone():
    x = torch.from_numpy(uneven_rows())
    x[3, 2] = float("nan")
    broken = reference.linear(x, quantize.quantise_layer(layer(24, 48), amax=None)).isnan().any(1)
    assert broken.tolist() == [index == 3 for index in range(13)]


# --- plans ------------------------------------------------------------------------------------------------------------


def observation(config, seed=3):
    g = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    images = torch.rand(1, 2, 3, size, size, generator=g) * 2 - 1
    tokens = torch.randint(0, config.vocab_size, (1, 5), generator=g)
    state = torch.randn(1, 32, generator=g) if config.kind == "pi0" else None
    return ModelInputs(images, tokens, state=state), torch.randn(1, config.horizon, 32, generator=g)


def measured(chosen: PrecisionPlan, kind="pi05", percentile=None) -> PrecisionPlan:
    config = tiny_config(kind)
    model = build(config, random_tensors(config))
    backend = eager.create(model, EngineConfig(num_denoise_steps=STEPS))
    with calibrate.watch(model) as ranges:
        inputs, noise = observation(config)
        ranges.begin_prefill()
        cache = backend.prefill(inputs)
        ranges.begin_denoise()
        backend.denoise(cache, noise)
    return calibrate.with_ranges(chosen, ranges, data="synthetic: test", percentile=percentile)


def quantised(chosen: PrecisionPlan, kind="pi05"):
    config = tiny_config(kind)
    model = build(config, random_tensors(config))
    quantize.apply(model, chosen)
    return model


def answer(model, steps=STEPS):
    backend = eager.create(model, EngineConfig(num_denoise_steps=steps))
    inputs, noise = observation(model.config)
    return backend.denoise(backend.prefill(inputs), noise)


def test_rows_need_no_range_and_steps_need_one_each():
    by_row = plan.preset("fp8-all").with_input_scale("row")
    assert by_row.name == "fp8-all+row"
    assert {layer.name for layer in quantised(by_row).modules() if isinstance(layer, RowFp8Linear)}
    by_step = plan.preset("fp8-all").with_input_scale("step")
    assert [rule.input_scale for rule in by_step.rules] == ["tensor", "tensor", "step"]
    chosen = measured(by_step)
    assert len(chosen.step_amax[DOWN]) == STEPS
    assert max(chosen.step_amax[DOWN]) == chosen.amax[DOWN]
    assert set(chosen.step_amax) == {name for name in chosen.amax if name.startswith("expert.")}
    for lacking in (replace(chosen, step_amax={}), replace(chosen, amax={})):
        with pytest.raises(ConfigError, match="no activation range"):
            quantised(lacking)
        with pytest.raises(ConfigError, match="no activation range"):
            fit.check_fit(lacking, fit.all_layers(quantised(by_row)), checkpoint_hash="")


def test_a_percentile_bounds_every_step():
    chosen = measured(plan.preset("fp8-expert").with_input_scale("step"), percentile=90.0)
    for name, steps in chosen.step_amax.items():
        assert max(steps) <= chosen.amax[name]


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_each_step_runs_under_its_own_scales(kind):
    """One step of the plan is that step of a plan whose only scale is this step's, bit by bit."""
    chosen = uneven_steps(kind)
    model, (inputs, noise) = quantised(chosen, kind), observation(tiny_config(kind))
    embeds, mask = model.embed_prefix(inputs, model.embed_views(inputs.images))
    cache = model.prefill(embeds, mask, state=inputs.state)
    table, context = model.time_table(STEPS), model.suffix_context(cache, noise.shape[1])
    seen = []
    for step, other in enumerate(ones_for_each_step(chosen, kind)):
        wanted = other.denoise_step(noise, other.time_table(STEPS).at(step), cache, context)
        seen.append(model.denoise_step(noise, table.at(step), cache, context))
        assert torch.equal(seen[-1], wanted)
        wrong = replace(table.at(step), step=(step + 1) % STEPS)
        assert not torch.equal(seen[-1], model.denoise_step(noise, wrong, cache, context))
    if kind == "pi0":  # the state token belongs to no step: the whole range
        other = quantised(replace(plan.preset("fp8-expert"), amax=chosen.amax), kind)
        assert torch.equal(cache.k[-1], other.prefill(embeds, mask, state=inputs.state).k[-1])


def test_the_end_of_a_step_hands_over_under_the_scale_of_the_next():
    model, (inputs, noise) = quantised(uneven_steps()), observation(tiny_config("pi05"))
    cache, table = model.prefill(*model.embed_prefix(inputs, model.embed_views(inputs.images))), model.time_table(STEPS)
    context, x = model.suffix_context(cache, noise.shape[1]), noise
    for step in range(STEPS):
        x = torch.add(x, model.denoise_step(x, table.at(step), cache, context), alpha=-1.0 / STEPS)
    assert torch.equal(model.denoise_chunk(noise, table, cache, context), x)


FACTORS = (1.0, 0.3, 0.6)


def uneven_steps(kind="pi05"):
    """A plan whose steps differ, which ranges of random networks hardly do."""
    chosen = measured(plan.preset("fp8-expert").with_input_scale("step"), kind)
    steps = {n: tuple(v * f for v, f in zip(row, FACTORS, strict=True)) for n, row in chosen.step_amax.items()}
    return replace(chosen, step_amax=steps)


def ones_for_each_step(chosen, kind="pi05"):
    """Networks under one static scale each, that of a step."""
    single = plan.preset("fp8-expert")
    return [
        quantised(replace(single, amax={name: row[step] for name, row in chosen.step_amax.items()}), kind)
        for step in range(STEPS)
    ]


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("method", ["trained", "guided"])
def test_each_step_runs_under_its_own_scales_beside_an_older_chunk(kind, method):
    """Real-time chunking: the loop with the network of each step in its turn is what the plan is held against."""
    chosen = uneven_steps(kind)
    model, others = quantised(chosen, kind), ones_for_each_step(chosen, kind)
    inputs, noise = observation(tiny_config(kind))
    horizon = noise.shape[1]
    weights = flow.prefix_weights("linear", delay=2, end=horizon - 1, horizon=horizon) if method == "guided" else None
    previous = PreviousChunk(torch.full_like(noise, 0.3), 2, method, weights)
    backend = eager.create(model, EngineConfig(num_denoise_steps=STEPS))
    cache = backend.prefill(inputs)
    turns = iter(range(STEPS))

    def in_turn(x, condition, cache, context):
        return others[next(turns)].denoise_step(x, replace(condition, step=None), cache, context)

    wanted = run_flow(model, in_turn, model.time_table(STEPS), cache, noise, previous=previous, trace=None)
    assert torch.equal(backend.denoise(cache, noise, previous=previous), wanted)
    assert next(turns, None) is None, "every step ran"


def test_a_backend_that_is_there_already_sees_what_was_exchanged():
    """`precision.sensitivity` measures so: the score must be that of the plan that is written."""
    chosen = uneven_steps()
    wanted = answer(quantised(chosen))
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    backend = eager.create(model, EngineConfig(num_denoise_steps=STEPS))
    inputs, noise = observation(config)
    plain = backend.denoise(backend.prefill(inputs), noise)
    with sensitivity.quantised(model, chosen, list(chosen.step_amax)):
        assert torch.equal(backend.denoise(backend.prefill(inputs), noise), wanted)
    assert torch.equal(backend.denoise(backend.prefill(inputs), noise), plain)


@pytest.mark.parametrize("kind", ["row", "step"])
def test_the_policy_differs_by_rounding_only(kind):
    before = answer(quantised(plan.preset("bf16")))
    after = answer(quantised(measured(plan.preset("fp8-all").with_input_scale(kind))))
    assert 1e-4 < float((after - before).norm() / before.norm()) < 0.1


def test_another_number_of_steps_is_refused():
    model = quantised(measured(plan.preset("fp8-all").with_input_scale("step")))
    with pytest.raises(ConfigError, match="another number of denoise steps"):
        eager.create(model, EngineConfig(num_denoise_steps=STEPS + 1))


def test_a_plan_survives_its_file_and_an_old_one_keeps_its_digest(tmp_path):
    chosen = measured(plan.preset("fp8-all").with_input_scale("step"))
    (tmp_path / "plan.json").write_text(chosen.to_json())
    assert plan.read(tmp_path / "plan.json") == chosen
    old = json.loads(plan.preset("fp8-all").to_json())
    assert "step_amax" not in old
    assert all("input_scale" not in rule for rule in old["rules"])
    assert plan.preset("fp8-all").digest == "1d369677bcee"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rules": [{"pattern": "prefix.*", "input_scale": "column"}]}, "'column' in the rule"),
        ({"rules": [{"pattern": "prefix.*", "format": "int8", "input_scale": "row"}]}, "row-wise scales in INT8"),
        ({"step_amax": {DOWN: [1.0, 0.0]}, "amax": {DOWN: 1.0}}, "not positive"),
        ({"step_amax": {DOWN: [1.0, 2.0]}, "amax": {DOWN: 1.5}}, "beyond the layer's"),
        ({"step_amax": {DOWN: []}}, "not positive"),
        ({"step_amax": {DOWN: 3.0}}, "not a precision plan"),
    ],
)
def test_damaged_plans_are_refused(tmp_path, change, match):
    document = {"version": 1, "name": "x", "rules": [{"pattern": "expert.*"}], **change}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=match):
        plan.read(tmp_path / "plan.json")


def test_a_wish_replaces_the_one_before_where_rules_can_have_it():
    both = PrecisionPlan("m", (Rule("vision.*", "int8"), Rule("prefix.*"), Rule("expert.layers.*")))
    by_row = both.with_input_scale("row")
    assert [rule.input_scale for rule in by_row.rules] == ["tensor", "row", "row"]
    assert [rule.input_scale for rule in both.with_input_scale("step").rules] == ["tensor", "tensor", "step"]
    assert by_row.with_input_scale("row").name == "m+row"
    assert by_row.with_input_scale("tensor") == both


@pytest.mark.parametrize("rule", [Rule(DOWN, "int8", input_scale="row"), Rule("prefix.*", input_scale="step")])
def test_scales_that_a_layer_cannot_have_are_refused_when_they_are_applied(rule):
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    names = fit.all_layers(model)
    steps = dict.fromkeys(names, (1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match="cannot be applied"):
        quantize.apply(model, PrecisionPlan("odd", (rule,), dict.fromkeys(names, 1.0), step_amax=steps))


@pytest.mark.parametrize(("preset", "kind"), [("fp8-mlp", "step"), ("int8-mlp", "row"), ("bf16", "row")])
def test_presets_that_cannot_have_them_say_so(preset, kind):
    with pytest.raises(ConfigError, match="no rule of"):
        plan.preset(preset).with_input_scale(kind)


def test_steps_exist_in_the_expert_alone():
    config = tiny_config("pi05")
    names = fit.all_layers(build(config, random_tensors(config)))
    odd = PrecisionPlan("odd", (Rule("prefix.layers.*", input_scale="step"),))
    with pytest.raises(ConfigError, match="cannot have"):
        fit.check_fit(odd, names, checkpoint_hash="")
    fit.check_fit(plan.preset("fp8-full").with_input_scale("row"), names, checkpoint_hash="")
    unknown = replace(
        measured(plan.preset("fp8-expert").with_input_scale("step")), step_amax={"expert.layers.9": (1.0,)}
    )
    with pytest.raises(ConfigError):
        fit.check_fit(unknown, names, checkpoint_hash="")


# --- everything that looks at layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["row", "step"])
def test_coverage_formats_and_shares_see_them_as_e4m3(kind):
    chosen = measured(plan.preset("fp8-expert").with_input_scale(kind))
    model = quantised(chosen)
    names = fit.all_layers(model)
    holders = [one for one in model.expert.modules() if isinstance(one, Fp8Linear | RowFp8Linear)]
    assert {quantize.format_of(one) for one in holders} == {"e4m3"}
    assert {one.name for one in holders} <= {one.name for one in hopper_rows._products(model.expert)}
    seen = Coverage(kernel="eager")
    model.ops = seen.wrap(model.ops)
    answer(model)
    table = rows(seen, steps=STEPS, plan=chosen, layers=names)
    assert fallbacks(table) == []
    assert {row.layer for row in table if row.precision == "e4m3"} == {one.name for one in holders}


@pytest.mark.parametrize("kind", ["row", "step"])
def test_layers_alone_and_mixed_plans_keep_their_kind(kind):
    chosen = measured(plan.preset("fp8-expert").with_input_scale(kind))
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    with sensitivity.quantised(model, chosen, [DOWN]):
        small = model.expert.block(0).down
        assert isinstance(small, RowFp8Linear) if kind == "row" else small.steps == STEPS
    found = sensitivity.most_fp8(
        model, chosen, [sensitivity.Alone(DOWN, 1.0, sensitivity.Score(0.0, 1.0))], bound=1.0,
        measure=lambda: sensitivity.Score(0.0, 1.0), progress=lambda text: None,
    )  # fmt: skip
    assert found.plan.input_scale_of(DOWN) == kind
    assert set(found.plan.step_amax) == ({DOWN} if kind == "step" else set())
    quantize.apply(model, found.plan)


def test_backends_that_cannot_run_them_say_so():
    by_row = quantised(plan.preset("fp8-expert").with_input_scale("row"))
    by_step = quantised(measured(plan.preset("fp8-expert").with_input_scale("step")))
    static = quantised(measured(plan.preset("fp8-expert")))
    assert "row-wise" in skeleton.why_not_scales(by_row)
    assert "per denoise step" in skeleton.why_not_scales(by_step)
    assert skeleton.why_not_scales(static) is None
    from vivace.backends import compiled

    assert "per denoise step" in compiled.why_not_model(by_step)
    assert compiled.why_not_model(by_row) is None
    inputs, noise = observation(by_row.config)
    cache = eager.create(by_row, EngineConfig(num_denoise_steps=STEPS)).prefill(inputs)
    context = by_row.suffix_context(cache, noise.shape[1])
    step = torch.compile(by_row.denoise_step, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        condition = by_row.time_table(STEPS).at(1)
        assert torch.equal(
            step(noise, condition, cache, context), by_row.denoise_step(noise, condition, cache, context)
        )
    assert compiled.why_not_model(static) is None
    assert base.BACKENDS["compiled"].judges_model
    assert base.why_not("eager", device="cpu", model=by_step) is None


def test_the_prefill_kernels_judge_and_refuse():
    wide = quantize.quantise_layer(layer(48, 48).bfloat16(), amax=None)
    assert prefill_limits.why_not_layer(wide, capability=(9, 0)) is None
    assert "8.9" in prefill_limits.why_not_layer(wide, capability=(8, 6))
    per_step = quantize.quantise_layer(layer(48, 48, name=DOWN).bfloat16(), amax=1.0, step_amax=(1.0, 0.5))
    prefill_limits.refuse_step(per_step, torch.zeros(2, 48))
    with pytest.raises(Unsupported, match="per denoise step"):
        prefill_limits.refuse_step(per_step.at_step(1), torch.zeros(200, 48))
