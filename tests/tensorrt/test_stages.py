"""The run-time path with the evaluator in place of a GPU: the conformance suite, and a small policy from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from suite import CHECKS, Subject, case_of, inputs_of
from tiny import build, random_tensors, tiny_config

from vivace.backends import tensorrt
from vivace.backends.eager import EagerBackend
from vivace.backends.loop import run_flow
from vivace.backends.spans import span
from vivace.backends.tensorrt import cache, evaluate, run, skeleton
from vivace.backends.tensorrt.build import Built
from vivace.backends.tensorrt.networks import Network, Part, Shapes
from vivace.backends.tensorrt.stages import EnginePolicy
from vivace.backends.tensorrt.targets import Target
from vivace.config import EngineConfig, TensorRTConfig
from vivace.errors import ConfigError, ShapeError
from vivace.precision.coverage import Coverage, fallbacks, rows
from vivace.types import PreviousChunk, Trace


class Evaluated:
    """`stages.Runner` that computes each network's definition."""

    def __init__(self, recipe: run.Recipe) -> None:
        self.recipe = recipe
        self.networks: dict[tuple[Part, Shapes], tuple[Network, evaluate.Walked]] = {}
        self.calls: list[tuple[Part, Shapes]] = []

    def __call__(self, part: Part, shapes: Shapes, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls.append((part, shapes))
        if (part, shapes) not in self.networks:
            network = self.recipe.write(part, shapes)
            self.networks[part, shapes] = (network, evaluate.look(network.definition, network.module.api))
        network, walked = self.networks[part, shapes]
        return evaluate.run(network, feeds, numbers=self.recipe.numbers, walked=walked)


class EvaluatedBackend(EagerBackend):
    """Stages that are networks, behind torch's plainest backend."""

    def __init__(self, model, config, module, *, base="fp32", loop=False) -> None:
        self.runner = Evaluated(run.recipe(model, module, TensorRTConfig(weights="inputs"), base=base))
        stages = EnginePolicy(model, self.runner, base=skeleton.DTYPES[base], loop=loop)
        super().__init__(cast(Any, stages), config)

    def denoise(self, cache, noise, *, previous=None, trace=None, spans=None):
        """As the graph backend calls it: whole chunks where it can."""
        with span(spans, "denoise"):
            return run_flow(self.model, None, self._table, cache, noise, previous=previous, trace=trace)


@pytest.fixture(scope="module")
def subjects(rtx):
    built: dict[str, Subject] = {}

    def get(kind: str) -> Subject:
        if kind not in built:
            built[kind] = Subject(lambda model, config: EvaluatedBackend(model, config, rtx), kind)
        return built[kind]

    return get


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_conformance(subjects, kind, check):
    CHECKS[check](subjects(kind))


@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
def test_whole_policy_as_one_loop(rtx, base):
    """Vision, prefix and the unrolled loop, one after the other, give the model's actions."""
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    case = case_of(config)
    wanted = EagerBackend(model, EngineConfig(num_denoise_steps=4)).infer(inputs_of(case), case.noise)
    backend = EvaluatedBackend(model, EngineConfig(num_denoise_steps=4), rtx, base=base, loop=True)
    got = backend.infer(inputs_of(case), case.noise)
    assert [part for part, _ in backend.runner.calls] == ["vision", "prefix", "loop"]
    error = float((got - wanted).norm() / wanted.norm())
    assert error <= {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}[base]


def test_a_trace_or_an_older_chunk_takes_single_steps(rtx):
    config = tiny_config("pi05")
    model, case = build(config, random_tensors(config)), case_of(config)
    backend = EvaluatedBackend(model, EngineConfig(num_denoise_steps=2), rtx, loop=True)
    cache = backend.prefill(inputs_of(case))
    for options in ({"trace": Trace()}, {"previous": PreviousChunk(case.noise, 2, "trained")}):
        backend.runner.calls.clear()
        backend.denoise(cache, case.noise, **options)
        rows = config.horizon if "previous" in options else 1
        assert [(part, shapes.rows) for part, shapes in backend.runner.calls] == [("step", rows)] * 2


class Recorded:
    """`run.Engine` that computes the definition of which it was told to be the engine."""

    made: list[Recorded] = []  # noqa: RUF012

    def __init__(self, module, plan, *, weights, device, compiled):
        self.weights, self.compiled, self.runs, self.saved = weights, compiled, 0, []
        self.network = Recorded.networks.pop()
        Recorded.made.append(self)

    def __call__(self, feeds):
        self.runs += 1
        return evaluate.run(self.network, feeds, numbers=self.weights)

    def save(self, compiled):
        assert self.runs == 1, "before a run there is nothing to save"
        self.saved.append(compiled)


def test_the_runner_makes_each_engine_once(rtx, monkeypatch, tmp_path):
    """Write, audit, build, store, bind, run: everything but TensorRT's builder and run time is real."""
    Recorded.made, Recorded.networks = [], []

    def build_here(network, targets, *, progress=None, device=None):
        assert (targets, device) == ([], torch.device("cpu")), "for the GPU at hand"
        Recorded.networks.append(network)
        return Built(b"plan", 0.1)

    monkeypatch.setattr(run, "build", build_here)
    monkeypatch.setattr(run, "Engine", Recorded)
    monkeypatch.setattr(run, "here", lambda device: Target(89))
    monkeypatch.setenv("VIVACE_CACHE", str(tmp_path))
    config = tiny_config("pi05")
    model, case = build(config, random_tensors(config)), case_of(config)
    seen = Coverage(kernel=rtx.name)
    runner = run.EngineRunner(run.recipe(model, rtx, TensorRTConfig(), base="fp32"), torch.device("cpu"), seen)
    backend = EagerBackend(
        cast(Any, EnginePolicy(model, runner, base=torch.float32)), EngineConfig(num_denoise_steps=4)
    )
    wanted = EagerBackend(model, EngineConfig(num_denoise_steps=4)).infer(inputs_of(case), case.noise)
    for _ in range(2):
        assert torch.allclose(backend.infer(inputs_of(case), case.noise), wanted, atol=1e-5)
    assert [engine.network.part for engine in Recorded.made] == ["vision", "prefix", "step"]
    assert [engine.runs for engine in Recorded.made] == [2, 2, 8]
    assert all(engine.saved == [cache.runtime_cache(rtx.name, rtx.version, "sm89")] for engine in Recorded.made)
    assert len(list((tmp_path / "tensorrt").glob("*-sm89-*.engine"))) == 3
    assert {entry.calls for entry in seen.seen.values()} == {1}
    assert len(fallbacks(rows(seen, steps=4))) == 0


def test_compute_type(rtx):
    config = tiny_config("pi05")
    wide = build(config, random_tensors(config))
    half = build(config, random_tensors(config), dtype_of=lambda name: torch.bfloat16)
    ada, turing = Target(89), Target(75)
    assert tensorrt.base_of(wide, EngineConfig(), ada) == "fp32"
    with pytest.raises(ConfigError, match="--precision bfloat16"):
        tensorrt.base_of(wide, EngineConfig(tensorrt=TensorRTConfig(base="fp16")), ada)
    assert [tensorrt.base_of(half, EngineConfig(), gpu) for gpu in (ada, turing)] == ["bf16", "fp16"]
    assert tensorrt.base_of(half, EngineConfig(tensorrt=TensorRTConfig(base="fp16")), ada) == "fp16"


def test_another_horizon_is_refused(rtx):
    config = tiny_config("pi05")
    model, case = build(config, random_tensors(config)), case_of(config)
    backend = EvaluatedBackend(model, EngineConfig(num_denoise_steps=2), rtx)
    with pytest.raises(ShapeError, match="one horizon"):
        backend.denoise(backend.prefill(inputs_of(case)), case.noise[:, :3])
