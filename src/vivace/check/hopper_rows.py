"""Latency rows of the full-size benchmark: engines interleaved at three boundaries, with checks that cost no extra call.

    B0        graph replay on device buffers, time between two events on the GPU, launched while the GPU spins
    B0 reuse  the same of the denoise stage alone: what a frame costs that reuses the prefix
    B1        pinned host buffers in, replay, actions back on the host; wall clock
    B2        `policy.infer`: uint8 pictures, raw state and task text in, robot actions out; wall clock
    B3        the same through a server on this machine, as vivace's client in another process sees it; its wall clock
    B3 openpi the same through openpi's own client

After every timed call its output is compared with the first one bit by bit, so an engine that is not deterministic is seen
among the very calls that made the percentiles. Where a graph writes to one address (B0), the output is then overwritten
with NaN, so a replay that skipped its work is seen too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..backends.spans import Spans
from ..config import ModelConfig
from ..ops.layers import AnyLinear, QuantisedLinear
from ..types import ModelInputs
from . import bench, targets
from .gpus import Gpu
from .hopper_engines import Engine
from .metrics import cosine
from .roofline import STAGES, StageCost, Workload, stage_costs
from .targets import Size

LOWEST_COSINE = {"bfloat16": 0.999, "fp8": 0.9}
"""An engine below it computes something else and is not timed; how good FP8 is, the accuracy rows say."""
BOUNDARIES = {"vivace": "B3", "openpi": "B3 openpi"}
"""Through which client (`hopper_client.CLIENTS`)."""
WARM_UP = bench.SHORT_WARM_UP
WARM_REPLAYS = 5


def in_process(size: Size) -> tuple[str, ...]:
    """The boundaries of this setting that need no server. No B2 without prompt tokens: policies refuse such a prompt."""
    return ("B0", "B1", "B2") if size.prompt_tokens else ("B0", "B1")


def on_host(inputs: ModelInputs, noise: Tensor) -> tuple[ModelInputs, Tensor]:
    """Copies of one request on the host, pinned if it lay on a GPU: what B1 begins with."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.clone()

    return replace(inputs, images=copied(inputs.images), tokens=copied(inputs.tokens)), copied(noise)


def with_copies(engine: Engine, inputs: ModelInputs, noise: Tensor) -> Callable[[], Tensor]:
    """What B1 times; `inputs` and `noise` are those of `on_host`."""
    return lambda: engine.backend.infer(inputs, noise).cpu()


def answering(policy: Any, request: dict[str, Any]) -> Callable[[], NDArray[np.float32]]:
    """What B2 times."""
    return lambda: policy.infer(request).actions


@dataclass
class Repeats:
    """Whether an engine gives the same bits again and again."""

    first: dict[str, Tensor] = field(default_factory=dict)
    same: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def see(self, name: str, output: Tensor | NDArray[np.float32], *, poison: bool) -> None:
        """Compare one output with the first one, then poison it if asked to: a captured graph must write it again."""
        seen = torch.from_numpy(output) if isinstance(output, np.ndarray) else output
        first = self.first.setdefault(name, seen.clone())
        self.calls[name] = self.calls.get(name, 0) + 1
        self.same[name] = self.same.get(name, 0) + int(torch.equal(first, seen))
        if poison:
            seen.fill_(float("nan"))


@dataclass(frozen=True)
class Timed:
    """One engine at one boundary.

    judged  its latency is held against the marks; a plan with less in E4M3 is there to be compared
    """

    engine: Engine
    run: Callable[[], Any]
    calls: int
    judged: bool = True


def time_rows(size: Size, boundary: str, timed: Sequence[Timed], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of these engines, called in rounds; those with fewer calls are spread evenly over the rounds."""
    on_gpu = timed[0].engine.model.device.type == "cuda"
    timers = {one.engine.name: timer_of(boundary) for one in timed} if on_gpu else {}
    repeats, poisoned = Repeats(), {one.engine.name for one in timed if boundary == "B0" and one.engine.graphed}

    def looked_at(answer: tuple[str, Any]) -> Mapping[str, float]:
        name, output = answer
        repeats.see(name, output, poison=name in poisoned)
        return {}

    times = bench.measure(
        {one.engine.name: _named(one) for one in timed}, samples=max(one.calls for one in timed), seed=seed,
        warmup=WARM_UP, stages=looked_at, device=timers or None,
        fewer={one.engine.name: one.calls for one in timed},
    )  # fmt: skip
    rows = []
    for one in timed:
        name = one.engine.name
        row = _row(size, boundary, one.engine, times[name])
        row["bit_identical"] = _identical(repeats, name, poisoned=name in poisoned)
        if name in timers and boundary == "B0":
            row["launches"] = {"exposed": timers[name].exposed, "of": timers[name].calls}
        row["targets"] = _targets(size, boundary, one, row) if one.engine.ours else []
        rows.append(row)
    return rows


def served_row(
    size: Size, engine: Engine, times: bench.EngineTimes, same: Mapping[str, int], *, client: str = "vivace"
) -> dict[str, Any]:
    """A row at B3, from what this client measured."""
    row = _row(size, BOUNDARIES[client], engine, times)
    row |= {
        "clock": "the client's, question packed until answer unpacked",
        "bit_identical": {**same, "output_poisoned": False},
    }
    row["server_p50_ms"] = bench.summary(times.stages_ms["server"]).p50_ms
    row["targets"] = [targets.same_bits(same["same"], same["of"]), targets.warmed_up(times.stable)]
    return row


def timer_of(boundary: str) -> bench.CudaTimer:
    """Device work alone at B0; elsewhere the host's clock counts, and the GPU must be idle before."""
    return bench.CudaTimer(spin_ms=bench.SPIN_MS if boundary == "B0" else 0.0)


def reuse_row(size: Size, engine: Engine, inputs: Any, noise: Tensor, *, calls: int) -> dict[str, Any]:
    """Replays of the denoise stage's graph on one prefix; the event pair is the one around that replay."""
    on_gpu = engine.model.device.type == "cuda"
    cache, repeats, times = engine.backend.prefill(inputs), Repeats(), []
    for turn in range(calls + WARM_REPLAYS):
        spans = _idle_spans(on_gpu)
        actions = engine.backend.denoise(cache, noise, spans=spans)
        value = spans.milliseconds()["denoise"]
        if turn >= WARM_REPLAYS:
            times.append(value)
            repeats.see(engine.name, actions, poison=False)
    found = bench.summary(times)
    seen = _identical(repeats, engine.name, poisoned=False)
    return {
        "setting": size.name, "engine": engine.name, "precision": engine.precision, "boundary": "B0 reuse", "batch": 1,
        "steps": 10, "calls": found.samples, "latency": found, "bit_identical": seen,
        "clock": "device events around the denoise stage" if on_gpu else "host",
        "targets": targets.of_reuse(engine.family, p50_ms=found.p50_ms, same=seen["same"], calls=seen["of"]),
    }  # fmt: skip


def wrong(engine: Engine, actions: Tensor, truth: Tensor, *, least: float | None = None) -> str | None:
    """Why this engine is not worth timing, or None.  least: cosine; None = `LOWEST_COSINE`."""
    got = cosine(actions.float().cpu().numpy(), truth.float().cpu().numpy())
    least = LOWEST_COSINE[engine.family] if least is None else least
    return None if got >= least else f"cosine {got:.5f} to float32, wanted at least {least}"


def stage_ms(engine: Engine, inputs: Any, noise: Tensor, *, calls: int) -> dict[str, float]:
    """Median milliseconds of vision, prefix and denoise, each run apart; their sum may exceed the whole's B0."""
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for turn in range(calls + 2):
        spans = _idle_spans(engine.model.device.type == "cuda")
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
    for cost, of_weights in zip(plan_costs(engine, size), fp8_shares(engine), strict=True):
        seconds = stages[cost.stage] / 1e3
        share = of_weights * (1 - cost.attention_flops / cost.flops)  # attention stays in bfloat16 under every plan
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
    """Of each stage's weights, the share in 8 bits; every token passes every weight, so that of their products too.

    INT8 counts as E4M3 does: the datasheets of Hopper give both the same peak.
    """
    shares = []
    for layers in _stage_layers(engine).values():
        total = sum(layer.weight.numel() for layer in layers)
        shares.append(sum(layer.weight.numel() for layer in layers if isinstance(layer, QuantisedLinear)) / total)
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


def _row(size: Size, boundary: str, engine: Engine, times: bench.EngineTimes) -> dict[str, Any]:
    series = times.device_ms if boundary == "B0" and times.device_ms else times.total_ms
    found = bench.summary(series)
    return {
        "setting": size.name, "engine": engine.name, "precision": engine.precision, "boundary": boundary, "batch": 1,
        "steps": 10, "calls": found.samples, "latency": found, "stable": times.stable, "cold_ms": times.cold_ms,
        "clock": "device events" if series is times.device_ms else "host, device finished",
    }  # fmt: skip


def _targets(size: Size, boundary: str, timed: Timed, row: Mapping[str, Any]) -> list[targets.Target]:
    found, seen = row["latency"], row["bit_identical"]
    made = [targets.same_bits(seen["same"], seen["of"]), targets.warmed_up(row["stable"])]
    if boundary == "B0" and timed.judged:
        made = [*targets.of_latency(size.name, timed.engine.family, p50_ms=found.p50_ms, p99_ms=found.p99_ms), *made]
    return made


def _identical(repeats: Repeats, name: str, *, poisoned: bool) -> dict[str, Any]:
    return {"same": repeats.same[name], "of": repeats.calls[name], "output_poisoned": poisoned}


def _idle_spans(on_gpu: bool) -> Spans:
    """Spans of the next call, which is launched while the GPU spins."""
    if on_gpu:
        torch.cuda.synchronize()
        bench.spin()
    return Spans(cuda=on_gpu)


def _stage_layers(engine: Engine) -> dict[str, list[AnyLinear]]:
    """The products that each stage reads whole: no tables, no modulation."""
    model = engine.model
    stages = {
        "vision": (model.vision, model.projector), "prefix": (model.prefix,),
        "denoise": (model.expert, model.action_in, model.action_out),
    }  # fmt: skip
    return {stage: [one for part in parts for one in _products(part)] for stage, parts in stages.items()}


def _products(part: nn.Module) -> list[AnyLinear]:
    layers = [layer for layer in part.modules() if isinstance(layer, AnyLinear)]
    return [layer for layer in layers if ".modulation" not in layer.name]


def _bytes(layer: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in layer.parameters())
