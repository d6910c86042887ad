"""The policy as TensorRT engines: for Jetson, RTX and data-centre cards (docs/guides/tensorrt.md).

    module       which TensorRT: `tensorrt` or `tensorrt_rtx`
    skeleton     the model's outline without numbers       symbols, operations   its forward, written as TensorRT layers
    networks     vision, prefix, step, loop                 targets, build        engines, also without a GPU
    audit        types of every matrix product              evaluate              the definition computed in torch
    identity, cache   engines on disk                       engine, run, stages   engines as the stages of a policy

The model is not defined again: its own methods run once on symbols. So a network cannot differ from the model in anything
but the layers that one operation is written with, and those are compared number by number (`evaluate`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from ...config import EngineConfig, TensorRTBase
from ...errors import Unsupported
from ...model.pi import Pi
from ...precision.coverage import Coverage
from ...precision.plan import PrecisionPlan
from ..cuda_graph import CudaGraphBackend
from . import module as modules
from . import run, skeleton
from .stages import EnginePolicy
from .targets import FIRST, Target, choose_base, here


def why_not(*, device: str, config: EngineConfig | None = None) -> str | None:
    """None if it can run on `device` with the module that `config` asks for."""
    try:
        module = modules.load(config.tensorrt.module if config is not None else "auto")
    except Unsupported as error:
        return str(error)
    if not device.startswith("cuda"):
        return (
            f"TensorRT engines need an NVIDIA GPU, not {device}; without one, `vivace build` makes engines for others"
        )
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return refused_gpu(module, here(device))


def refused_gpu(module: modules.Module, target: Target) -> str | None:
    """Why a module does not run on a GPU: TensorRT-RTX has a closed list."""
    if not module.is_rtx:
        return None
    try:
        target.member(module.api.ComputeCapability)
    except Unsupported as error:
        return str(error)
    return None


def why_not_model(model: Pi) -> str | None:
    """None if this machine's GPU computes in the types of the network, and its input scales are constants."""
    if reason := skeleton.why_not_scales(model):
        return reason
    (first, name), target = FIRST[torch.float8_e4m3fn], here(model.device)
    if "e4m3" in skeleton.formats(model).values() and target.number < first:
        instead = "an INT8 plan (vivace calibrate --preset int8-mlp), or --precision bfloat16"
        return f"{target.label} has no {name}: use {instead}"
    return None


class TensorRTBackend(CudaGraphBackend):
    """Engines behind the graph backend: every stage's engines are recorded into the graphs that it replays."""

    name = "tensorrt"

    def __init__(self, stages: EnginePolicy, config: EngineConfig, *, runner: run.EngineRunner) -> None:
        super().__init__(cast(Pi, stages), config, ops=stages.ops, wavefront=False)
        self._runner = runner

    def describe(self) -> dict[str, Any]:
        """See Backend.describe."""
        recipe = self._runner.recipe
        return {
            **super().describe(),
            "module": recipe.module.label,
            "base": str(recipe.outlined.prefix_dtype).removeprefix("torch."),
            "weights": "baked" if recipe.baked else "inputs",
            "fused": recipe.fused,
        }


def base_of(model: Pi, config: EngineConfig, target: Target) -> TensorRTBase:
    """Compute type of the engines of `model` for `target`, see `targets.choose_base`."""
    return choose_base(config.tensorrt.base, target.number, float32=model.prefix_dtype == torch.float32)


def create(model: Pi, config: EngineConfig, *, plan: PrecisionPlan | None = None) -> TensorRTBackend:
    """Registry constructor.  plan: what every network is held against when it is made; None = nothing is quantised."""
    module = modules.load(config.tensorrt.module)
    target = here(model.device)
    if reason := refused_gpu(module, target):
        raise Unsupported(f"{module.label} cannot run here", got=reason)
    base = base_of(model, config, target)
    seen = Coverage(kernel=module.name)
    runner = run.EngineRunner(run.recipe(model, module, config.tensorrt, base=base, plan=plan), model.device, seen)
    stages = EnginePolicy(model, runner, base=skeleton.DTYPES[base], loop=config.tensorrt.loop)
    bucket = max(config.prompt_bucket, run.prompt_bucket(runner.recipe.baked))
    backend = TensorRTBackend(stages, replace(config, prompt_bucket=bucket), runner=runner)
    model.ops = seen.wrap(model.ops)  # who asks what ran finds the audit's table here
    seen.clear()
    return backend
