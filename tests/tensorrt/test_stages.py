"""The run-time path with the evaluator in place of a GPU: the conformance suite, and a small policy from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from suite import CHECKS, Subject, case_of, inputs_of
from tiny import build, random_tensors, tiny_config

from vivace.backends.eager import EagerBackend
from vivace.backends.loop import run_flow
from vivace.backends.spans import span
from vivace.backends.tensorrt import evaluate, run, skeleton
from vivace.backends.tensorrt.networks import Network, Part, Shapes
from vivace.backends.tensorrt.stages import EnginePolicy
from vivace.config import EngineConfig, TensorRTConfig
from vivace.errors import ShapeError
from vivace.types import PreviousChunk, Trace


class Evaluated:
    """`stages.Runner` that computes each network's definition."""

    def __init__(self, recipe: run.Recipe) -> None:
        self.recipe = recipe
        self.networks: dict[tuple[Part, Shapes], Network] = {}
        self.calls: list[tuple[Part, Shapes]] = []

    def __call__(self, part: Part, shapes: Shapes, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls.append((part, shapes))
        if (part, shapes) not in self.networks:
            self.networks[part, shapes] = self.recipe.write(part, shapes)
        return evaluate.run(self.networks[part, shapes], feeds, numbers=self.recipe.numbers)


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


def test_another_horizon_is_refused(rtx):
    config = tiny_config("pi05")
    model, case = build(config, random_tensors(config)), case_of(config)
    backend = EvaluatedBackend(model, EngineConfig(num_denoise_steps=2), rtx)
    with pytest.raises(ShapeError, match="one horizon"):
        backend.denoise(backend.prefill(inputs_of(case)), case.noise[:, :3])
