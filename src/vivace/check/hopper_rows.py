"""Latency rows of the full-size benchmark: engines interleaved at three boundaries, with checks that cost no extra call.

    B0  graph replay on device buffers, time between two events on the GPU
    B1  pinned host buffers in, replay, actions back on the host; wall clock
    B2  `policy.infer`: uint8 pictures, raw state and task text in, robot actions out; wall clock

After every timed call at B0 and B1 its output is compared with the first one bit by bit and then overwritten with NaN, so
a replay that skipped its work, or that is not deterministic, is seen among the very calls that made the percentiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.spans import Spans
from ..config import ModelConfig
from ..ops.layers import Fp8Linear, Linear
from . import bench, targets
from .gpus import Gpu
from .hopper_engines import Engine
from .metrics import cosine
from .roofline import STAGES, StageCost, Workload, stage_costs
from .targets import Size

LOWEST_COSINE = {"bfloat16": 0.999, "fp8": 0.9}
"""An engine below it computes something else and is not timed; how good FP8 is, the accuracy rows say."""
WARM_UP = bench.WarmUp(max_calls=40, max_seconds=20.0)


@dataclass
class Repeats:
    """Whether an engine gives the same bits again and again."""

    first: dict[str, Tensor] = field(default_factory=dict)
    same: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def see(self, name: str, output: Tensor) -> None:
        """Compare one output with the first one, then poison it: a captured graph must write it again."""
        first = self.first.setdefault(name, output.clone())
        self.calls[name] = self.calls.get(name, 0) + 1
        self.same[name] = self.same.get(name, 0) + int(torch.equal(first, output))
        output.fill_(float("nan"))


@dataclass(frozen=True)
class Timed:
    """One engine at one boundary."""

    engine: Engine
    run: Callable[[], Any]
    calls: int


def time_rows(size: Size, boundary: str, timed: Sequence[Timed], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of these engines, called in rounds; those with fewer calls are spread evenly over the rounds."""
    on_gpu = timed[0].engine.model.device.type == "cuda"
    repeats = Repeats()

    def looked_at(answer: tuple[str, Any]) -> Mapping[str, float]:
        name, output = answer
        if isinstance(output, Tensor):
            repeats.see(name, output)
        return {}

    times = bench.measure(
        {one.engine.name: _named(one) for one in timed}, samples=max(one.calls for one in timed), seed=seed,
        warmup=WARM_UP, stages=looked_at, device=bench.CudaTimer() if on_gpu else None,
        fewer={one.engine.name: one.calls for one in timed},
    )  # fmt: skip
    return [_row(size, boundary, one.engine, times[one.engine.name], repeats) for one in timed]


def wrong(engine: Engine, actions: Tensor, truth: Tensor) -> str | None:
    """Why this engine is not worth timing, or None."""
    got, least = cosine(actions.float().cpu().numpy(), truth.float().cpu().numpy()), LOWEST_COSINE[engine.family]
    return None if got >= least else f"cosine {got:.5f} to float32, wanted at least {least}"


def stage_ms(engine: Engine, inputs: Any, noise: Tensor, *, calls: int) -> dict[str, float]:
    """Median milliseconds of vision, prefix and denoise, each run apart; their sum may exceed the whole's B0."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for turn in range(calls + 2):
        spans = Spans(cuda=engine.model.device.type == "cuda")
        engine.backend.denoise(engine.backend.prefill(inputs, spans=spans), noise, spans=spans)
        for stage, value in spans.milliseconds().items():
            if turn >= 2 and stage in found:
                found[stage].append(value)
    return {stage: bench.summary(values).p50_ms for stage, values in found.items()}


def parts_ms(policy: Any, request: Any, *, calls: int = 10) -> dict[str, float]:
    """Median milliseconds of every part of `policy.infer` that the policy itself names, "total" among them."""
    seen = [policy.infer(request).milliseconds for _ in range(calls)]
    return {name: bench.summary([one[name] for one in seen]).p50_ms for name in seen[0]}


def rates(engine: Engine, size: Size, stages: Mapping[str, float], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """Per stage: work, achieved rates beside the ceilings, and the time below which this plan cannot go there."""
    found = {}
    for cost, share in zip(plan_costs(engine, size), fp8_shares(engine), strict=True):
        seconds = stages[cost.stage] / 1e3
        floor_s = max(
            cost.flops * share / (ceilings["fp8_tflops"] * 1e12)
            + cost.flops * (1 - share) / (ceilings["bf16_tflops"] * 1e12),
            cost.total_bytes / (ceilings["copy_gb_s"] * 1e9),
        )
        found[cost.stage] = {
            "tflop": cost.flops / 1e12, "gb": cost.total_bytes / 1e9, "fp8_share": share,
            "tflop_s": cost.flops / seconds / 1e12, "gb_s": cost.total_bytes / seconds / 1e9,
            "floor_ms": floor_s * 1e3, "of_floor": floor_s / seconds,
        }  # fmt: skip
    return found


def plan_costs(engine: Engine, size: Size) -> tuple[StageCost, ...]:
    """The roofline's work of each stage, with the bytes that this engine's own weights have."""
    config, work = engine.model.config, Workload(size.views, size.prompt_tokens, size.horizon)
    times = {"vision": 1, "prefix": 1, "denoise": work.steps}
    moved = {stage: sum(_bytes(layer) for layer in layers) for stage, layers in _stage_layers(engine).items()}
    return tuple(
        replace(cost, weight_bytes=float(moved[cost.stage] * times[cost.stage])) for cost in stage_costs(config, work)
    )


def fp8_shares(engine: Engine) -> list[float]:
    """Of each stage's weights, the share in E4M3; every token passes every weight, so the share of its products too."""
    shares = []
    for layers in _stage_layers(engine).values():
        total = sum(layer.weight.numel() for layer in layers)
        shares.append(sum(layer.weight.numel() for layer in layers if isinstance(layer, Fp8Linear)) / total)
    return shares


def published(gpu: Gpu | None) -> dict[str, float | None]:
    """The datasheet's peaks in the names of `ceilings`."""
    if gpu is None:
        return {"bf16_tflops": None, "fp8_tflops": None, "copy_gb_s": None}
    return {"bf16_tflops": gpu.bfloat16, "fp8_tflops": gpu.fp8, "copy_gb_s": gpu.bandwidth_gb_s}


def kv_bytes(config: ModelConfig, size: Size) -> int:
    """Keys and values of one observation in bfloat16."""
    tokens = config.vision.tokens * size.views + size.prompt_tokens
    return config.prefix.layers * 2 * tokens * config.prefix.num_kv_heads * config.prefix.head_dim * 2


def _named(one: Timed) -> Callable[[], tuple[str, Any]]:
    return lambda: (one.engine.name, one.run())


def _row(
    size: Size, boundary: str, engine: Engine, times: bench.EngineTimes, repeats: Repeats
) -> dict[str, Any]:  # fmt: skip
    series = times.device_ms if boundary == "B0" and times.device_ms else times.total_ms
    found, name = bench.summary(series), engine.name
    row: dict[str, Any] = {
        "setting": size.name, "engine": name, "precision": engine.precision, "boundary": boundary, "batch": 1,
        "steps": 10, "calls": found.samples, "latency": found, "stable": times.stable, "cold_ms": times.cold_ms,
        "clock": "device events" if series is times.device_ms else "host, device finished",
    }  # fmt: skip
    if name in repeats.calls:
        row["bit_identical"] = {"same": repeats.same[name], "of": repeats.calls[name], "output_poisoned": True}
    if boundary == "B0" and engine.ours:
        row["targets"] = targets.of_latency(size.name, engine.family, p50_ms=found.p50_ms, p99_ms=found.p99_ms)
    return row


def _stage_layers(engine: Engine) -> dict[str, list[Linear | Fp8Linear]]:
    """The products that each stage reads whole: no tables, no modulation."""
    model = engine.model
    stages = {
        "vision": (model.vision, model.projector), "prefix": (model.prefix,),
        "denoise": (model.expert, model.action_in, model.action_out),
    }  # fmt: skip
    return {stage: [one for part in parts for one in _products(part)] for stage, parts in stages.items()}


def _products(part: nn.Module) -> list[Linear | Fp8Linear]:
    layers = [layer for layer in part.modules() if isinstance(layer, Linear | Fp8Linear)]
    return [layer for layer in layers if ".modulation" not in layer.name]


def _bytes(layer: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in layer.parameters())
