"""What runs is held against the plan, not against what the model holds: when a policy runs, and in `vivace build`."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import build as build_model
from tiny import random_tensors, tiny_config
from wanted import Subject

from vivace.backends import base
from vivace.backends import tensorrt as backend
from vivace.backends.tensorrt import run, skeleton
from vivace.backends.tensorrt.build import Built
from vivace.backends.tensorrt.networks import PARTS, Shapes
from vivace.backends.tensorrt.targets import Target
from vivace.config import EngineConfig, TensorRTConfig
from vivace.errors import NumericsError
from vivace.precision import quantize
from vivace.precision.coverage import Coverage
from vivace.precision.plan import Rule, preset
from vivace.runtime import policy as policies

SHAPES = {
    "vision": Shapes(batch=2),
    "prefix": Shapes(keys=39),
    "step": Shapes(keys=39),
    "loop": Shapes(keys=39, steps=2),
}


class Bound:
    """Stands in for the engine."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, feeds):
        return {}

    def save(self, compiled):
        pass


@pytest.fixture
def runner_of(rtx, monkeypatch, tmp_path):
    """(model, plan) -> the runner of a policy on a GPU; only TensorRT's builder and run time are stand-ins."""
    monkeypatch.setattr(run, "build", lambda *_, **__: Built(b"plan", 0.1))
    monkeypatch.setattr(run, "Engine", Bound)
    monkeypatch.setattr(run, "here", lambda device: Target(89))
    monkeypatch.setenv("VIVACE_CACHE", str(tmp_path))

    def make(model, plan):
        recipe = run.recipe(model, rtx, TensorRTConfig(), base="fp16", plan=plan)
        return run.EngineRunner(recipe, torch.device("cpu"), Coverage(kernel=rtx.name))

    return make


@pytest.fixture(scope="module")
def subject(rtx):
    return Subject(rtx, base="fp16", plan="fp8-all")


def under(subject, name):
    """(the model quantised by the preset `name`, that plan with ranges)."""
    plan = replace(subject.chosen, name=name, rules=preset(name).rules)
    model = copy.deepcopy(subject.model)
    quantize.apply(model, plan)
    return model, plan


@pytest.mark.parametrize("name", ["bf16", "fp8-mlp", "fp8-all"])
def test_its_own_plan_is_kept(subject, runner_of, name):
    model, plan = under(subject, name)
    runner = runner_of(model, plan)
    for part in PARTS:
        runner(part, SHAPES[part], {})
    assert len(runner.engines) == len(PARTS)


@pytest.mark.parametrize(("built", "planned", "part", "says"), [
    ("bf16", "fp8-mlp", "prefix", "prefix.layers.0.mlp.gate_up geglu in float16, planned e4m3"),
    ("fp8-mlp", "fp8-full", "prefix", "prefix.layers.0.attn.qkv qkv_rope in float16, planned e4m3"),
    ("fp8-full", "fp8-mlp", "prefix", "prefix.layers.0.attn.qkv qkv_rope in e4m3, planned float16"),
    ("fp8-mlp", None, "prefix", "prefix.layers.0.mlp.gate_up geglu in e4m3, planned float16"),
    ("bf16", "fp8-all", "vision", "vision.layers.0.attn.qkv linear in float16, planned e4m3"),
    ("fp8-all", "fp8-full", "vision", "vision.layers.0.attn.qkv linear in e4m3, planned float16"),
    ("bf16", "fp8-expert", "step", "expert.layers.0.attn.qkv qkv_rope in float16, planned e4m3"),
    ("fp8-expert", "bf16", "loop", "expert.layers.0.attn.qkv qkv_rope in e4m3, planned float16"),
])  # fmt: skip
def test_a_model_that_is_not_what_its_plan_says(subject, runner_of, built, planned, part, says):
    model, _ = under(subject, built)
    plan = None if planned is None else under(subject, planned)[1]
    with pytest.raises(NumericsError, match=says):
        runner_of(model, plan)(part, SHAPES[part], {})


def test_one_layer_left_out_or_added(subject, runner_of):
    """A rule narrowed by one layer, and the reverse: the line names that layer and no other."""
    model, plan = under(subject, "fp8-mlp")
    without = replace(plan, rules=(Rule("prefix.layers.0.mlp.down", "keep"), *plan.rules))
    less = copy.deepcopy(subject.model)
    quantize.apply(less, without)
    for pair, says in (
        ((model, without), "got prefix.layers.0.mlp.down linear_residual_norm in e4m3, planned float16;? "),
        ((less, plan), "got prefix.layers.0.mlp.down linear_residual_norm in float16, planned e4m3;? "),
    ):
        with pytest.raises(NumericsError, match=says) as caught:
            runner_of(*pair)("prefix", SHAPES["prefix"], {})
        assert str(caught.value).count("planned") == 2, "once in the line, once in the title"


# --- how the plan gets there ------------------------------------------------------------------------------------------


def test_the_registry_hands_the_plan_to_backends_that_audit(monkeypatch):
    """And to no other: their constructors know no plans."""
    config = tiny_config("pi05")
    model, plan, seen = build_model(config, random_tensors(config)), preset("fp8-mlp"), []
    monkeypatch.setattr(backend, "why_not", lambda **_: None)
    monkeypatch.setattr(backend, "why_not_model", lambda model: None)
    monkeypatch.setattr(backend, "create", lambda model, config, *, plan: seen.append(plan))
    base.build("tensorrt", model, EngineConfig(), plan=plan)
    base.build("tensorrt", model, EngineConfig())
    assert seen == [plan, None]
    assert base.build("eager", model, EngineConfig(), plan=plan).name == "eager"


def test_the_backend_hands_it_to_its_runner(rtx, subject, monkeypatch):
    """From the constructor to what every network is held against."""
    model, plan = under(subject, "fp8-mlp")
    monkeypatch.setattr(backend, "here", lambda device: Target(89))
    monkeypatch.setattr(backend.CudaGraphBackend, "__init__", lambda self, *_, **__: None)
    made = backend.create(model, EngineConfig(), plan=plan)
    assert made._runner.recipe.plan == plan
    assert backend.create(copy.deepcopy(subject.model), EngineConfig())._runner.recipe.plan.rules == ()


def test_a_policy_hands_its_plan_to_the_registry(tmp_path, monkeypatch):
    from vivace.checkpoints.make import Recipe, make_checkpoint
    from vivace.precision.fit import all_layers

    make_checkpoint(tmp_path / "tiny", Recipe(size="tiny", horizon=6, dtype="bfloat16"))
    folder = tmp_path / "tiny"
    first = policies.load_policy(folder)
    names = [name for name in all_layers(first.model) if preset("fp8-mlp").quantises(name)]
    plan = replace(
        preset("fp8-mlp"), amax=dict.fromkeys(names, 4.0), checkpoint_hash=first.engine.checkpoint_hash, data="a test"
    )
    (tmp_path / "plan.json").write_text(plan.to_json())
    seen, plain = [], base.build

    def build(name, model, config, *, plan=None):
        seen.append((plan, skeleton.formats(model)))
        return plain(name, model, config, plan=plan)

    monkeypatch.setattr(base, "build", build)
    policies.load_policy(folder, config=EngineConfig(precision=str(tmp_path / "plan.json")))
    policies.load_policy(folder)
    assert [(plan and plan.rules, set(formats)) for plan, formats in seen] == [(plan.rules, set(names)), (None, set())]


@pytest.mark.parametrize(("fault", "says"), [
    (lambda formats: {}, "planned e4m3"),
    (lambda formats: {**formats, "prefix.layers.0.attn.o": "e4m3"}, "in e4m3, planned"),
])  # fmt: skip
def test_build_fails_when_it_writes_another_plan(rtx, subject, tmp_path, fault, says):
    """A fault between the plan and the outline: named at once, nothing is built."""
    plan = under(subject, "fp8-mlp")[1]
    names = skeleton.formats(subject.quantised)
    outlined = skeleton.outline(subject.config, base="fp16", formats=fault(plan.formats(names)))
    recipe = run.Recipe(rtx, outlined, {}, plan, baked=False, fused=False)
    with pytest.raises(NumericsError, match=says):
        run.make(recipe, "prefix", Shapes(keys=39), targets=[Target(89)], where=tmp_path)
    assert not list(tmp_path.iterdir())
