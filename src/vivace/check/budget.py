"""From one measured run to a target rate: what must shrink, by how much, and whether the hardware allows it at all.

Two ways to name the target. `target_hz`: one whole inference per period. Or the robot's own numbers, `control_hz` and
`execution_horizon` s: the robot plays s actions per inference, so an inference has s control ticks. A prediction for a GPU
that was not measured keeps each stage's measured efficiency (floor over time) and replaces the floor; it is a model and is
labelled as one. Host work ("other") is carried over unchanged, because no roofline describes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import GemmaConfig, ModelConfig, VisionConfig
from ..errors import ConfigError
from .gpus import Gpu, find_gpu, match_gpu
from .results import number
from .roofline import STAGES, Precision, StageFloor, Workload, stage_costs, stage_floors


@dataclass(frozen=True)
class Run:
    """What a budget needs of a measured run. `gpu` is None when the machine is not in the table of published peaks."""

    stages_ms: Mapping[str, float]
    total_ms: float
    work: Workload | None
    model: ModelConfig
    precision: Precision
    gpu: Gpu | None
    source: str


@dataclass(frozen=True)
class StageBudget:
    """One stage against the target.

    alone_ms     what it must become if no other stage changes; None = impossible even at 0 ms
    alone_factor how many times faster that is
    evenly_ms    what it must become if every stage shrinks by the same factor
    floor_ms     roofline on the GPU in question; None = not known
    """

    stage: str
    ms: float
    share: float
    alone_ms: float | None
    alone_factor: float | None
    evenly_ms: float
    floor_ms: float | None
    bound: str | None
    predicted_ms: float | None


@dataclass(frozen=True)
class Budget:
    """The answer.

    verdict  "met", "reachable by roofline" (a necessary condition only), "below the floor", or "unknown"
    basis    says whether the times were measured or are a model
    """

    target_hz: float
    budget_ms: float
    total_ms: float
    rate_hz: float
    must_shrink_ms: float
    factor: float
    stages: tuple[StageBudget, ...]
    floor_ms: float | None
    predicted_ms: float | None
    verdict: str
    basis: str
    notes: tuple[str, ...]


def read_run(document: Mapping[str, Any], *, engine: str | None = None) -> Run:
    """Take one engine of a bench result, or a hand-written file of kind "stages" (docs/measured.md describes it).

    Raises ConfigError when a stage time is missing, negative or not a number, or the engine is not in the file.
    """
    if document.get("kind") == "bench":
        row, source = _bench_row(document, engine)
        times, total = row["split"]["mean_ms"], row["split"]["total_mean_ms"]
        precision = row.get("precision", "bfloat16")
    elif "stages_ms" in document:
        times, total = document["stages_ms"], document.get("total_ms")
        source = str(document.get("source", "a hand-written file"))
        precision = document.get("precision", "bfloat16")
    else:
        kind = repr(document.get("kind"))
        raise ConfigError("no stage times in this file", got=f"kind {kind}", wanted="a bench result, or stages_ms")
    setting = document.get("setting") or {}
    stages = {str(name): _positive(name, value) for name, value in times.items()}
    total_ms = sum(stages.values()) if total is None else _positive("total_ms", total)
    if "other" not in stages:
        stages["other"] = max(0.0, total_ms - sum(stages.values()))
    if abs((added := sum(stages.values())) - total_ms) > 0.02 * total_ms:
        wanted = f"{total_ms:.2f} ms within 2 %"
        raise ConfigError("the stages do not add up to the total", got=f"{added:.2f} ms", wanted=wanted)
    return Run(stages, total_ms, _workload(setting), model_from(setting), precision, _measured_gpu(document), source)


def budget(
    run: Run,
    *,
    target_hz: float | None = None,
    gpu: Gpu | None = None,
    control_hz: float | None = None,
    execution_horizon: int | None = None,
    precision: Precision | None = None,
) -> Budget:
    """Compare a run with a target rate, on its own GPU or, as a model, on another.

    Raises ConfigError without a target, or when a roofline is asked for and the setting is not in the file.
    """
    rate = _target(target_hz, control_hz, execution_horizon)
    period_ms = 1e3 / rate
    floors = _floors(run, gpu or run.gpu, precision or run.precision)
    predicted = _predict(run, floors, gpu, precision)
    times = predicted or dict(run.stages_ms)
    total = sum(times.values()) if predicted else run.total_ms
    rows = tuple(_stage(name, ms, total, period_ms, floors.get(name), predicted) for name, ms in times.items())
    floor = sum(f.floor_ms for f in floors.values()) if floors else None
    return Budget(
        target_hz=rate,
        budget_ms=period_ms,
        total_ms=total,
        rate_hz=1e3 / total if total else math.inf,
        must_shrink_ms=max(0.0, total - period_ms),
        factor=total / period_ms,
        stages=rows,
        floor_ms=floor,
        predicted_ms=total if predicted else None,
        verdict=_verdict(total, period_ms, floor),
        basis=_basis(run, gpu, predicted),
        notes=tuple(_notes(run, gpu or run.gpu, total, control_hz, execution_horizon)),
    )


def model_from(setting: Mapping[str, Any]) -> ModelConfig:
    """The network of a result's `setting.model`; the published pi0.5 sizes where the file does not say."""
    model = setting.get("model") or {}
    parts: dict[str, Any] = {key: value for key, value in model.items() if key in ("kind", "horizon", "action_width")}
    for name, make in (("vision", VisionConfig), ("prefix", GemmaConfig), ("expert", GemmaConfig)):
        if name in model:
            parts[name] = make(**model[name])
    if "kind" not in parts and setting.get("kind") in ("pi0", "pi05"):
        parts["kind"] = setting["kind"]
    return ModelConfig(**parts)


def _bench_row(document: Mapping[str, Any], engine: str | None) -> tuple[Mapping[str, Any], str]:
    engines = document.get("engines") or {}
    name = engine or min(engines, key=lambda key: number(engines[key]["total"]["p50_ms"]), default="")
    if name not in engines:
        raise ConfigError("no such engine in the result", got=repr(engine), wanted=f"one of {sorted(engines)}")
    return engines[name], f"engine {name!r} of a bench result"


def _measured_gpu(document: Mapping[str, Any]) -> Gpu | None:
    if isinstance(name := document.get("gpu"), str):
        return find_gpu(name)
    if (document.get("setting") or {}).get("device") == "cpu":
        return None
    gpus = (document.get("environment") or {}).get("gpus") or [{}]
    return match_gpu(gpus[0].get("name"))


def _workload(setting: Mapping[str, Any]) -> Workload | None:
    needed = ("views", "prompt_tokens", "horizon", "steps")
    if not all(isinstance(setting.get(key), int) for key in needed):
        return None
    views, prompt_tokens, horizon, steps = (int(setting[key]) for key in needed)
    return Workload(views, prompt_tokens, horizon, steps, batch=int(setting.get("batch", 1)))


def _positive(name: object, value: Any) -> float:
    ms = number(value)
    if not math.isfinite(ms) or ms < 0:
        raise ConfigError(f"stage time {name} is not a number of milliseconds", got=value, wanted="0 or more")
    return ms


def _target(target_hz: float | None, control_hz: float | None, execution_horizon: int | None) -> float:
    if target_hz is None and control_hz is not None and execution_horizon is not None and execution_horizon > 0:
        target_hz = control_hz / execution_horizon
    if target_hz is None or not target_hz > 0 or math.isinf(target_hz):
        raise ConfigError(
            "no target rate", got=target_hz, do="pass --target-hz, or --control-hz and --execution-horizon"
        )
    return target_hz


def _floors(run: Run, gpu: Gpu | None, precision: Precision) -> dict[str, StageFloor]:
    if gpu is None or run.work is None:
        return {}
    floors = stage_floors(stage_costs(run.model, run.work, precision=precision), gpu, precision=precision)
    return {floor.stage: floor for floor in floors if floor.stage in run.stages_ms}


def _predict(run: Run, floors: dict[str, StageFloor], gpu: Gpu | None, precision: Precision | None) -> dict[str, float]:
    if gpu is None or run.gpu is None or not floors or (gpu == run.gpu and precision in (None, run.precision)):
        return {}
    own = _floors(run, run.gpu, run.precision)
    scaled = {name: run.stages_ms[name] * floors[name].floor_ms / own[name].floor_ms for name in floors}
    return {name: scaled.get(name, ms) for name, ms in run.stages_ms.items()}


def _stage(
    name: str, ms: float, total: float, period_ms: float, floor: StageFloor | None, predicted: Mapping[str, float]
) -> StageBudget:
    room = period_ms - (total - ms)
    alone = min(ms, room) if room > 0 else None
    return StageBudget(
        stage=name,
        ms=ms,
        share=ms / total if total else 0.0,
        alone_ms=alone,
        alone_factor=ms / alone if alone else None,
        evenly_ms=ms * min(1.0, period_ms / total) if total else 0.0,
        floor_ms=floor.floor_ms if floor else None,
        bound=floor.bound if floor else None,
        predicted_ms=predicted.get(name) if name in STAGES else None,
    )


def _verdict(total: float, period_ms: float, floor: float | None) -> str:
    if total <= period_ms:
        return "met"
    if floor is None:
        return "unknown"
    return "reachable by roofline" if floor <= period_ms else "below the floor"


def _basis(run: Run, gpu: Gpu | None, predicted: Mapping[str, float]) -> str:
    if predicted and gpu and run.gpu:
        move = f"{run.source} on {run.gpu.label}, scaled to {gpu.label}"
        return f"a model, not a measurement: {move} by roofline at equal efficiency"
    if gpu and gpu != run.gpu:
        return f"measured: {run.source}; floors are those of {gpu.label}, where nothing was measured"
    return f"measured: {run.source}"


def _notes(
    run: Run, gpu: Gpu | None, total: float, control_hz: float | None, execution_horizon: int | None
) -> list[str]:
    notes = []
    if gpu is None:
        notes.append("no roofline: the machine is not in the table of published peaks; --gpu names one that is")
    if gpu is not None:
        mark = "" if gpu.verified else " (partly derived)"
        notes.append(f"{gpu.label}: {gpu.source}{mark}" + (f"; {gpu.remark}" if gpu.remark else ""))
    if gpu is not None and run.work is None:
        notes.append("no roofline: the file lacks setting.views, prompt_tokens, horizon, steps")
    if control_hz:
        delay = math.ceil(total * 1e-3 * control_hz)
        notes.append(f"inference delay: {delay} control ticks at {control_hz:g} Hz")
        horizon = run.work.horizon if run.work else None
        if execution_horizon and horizon and delay + execution_horizon > horizon:
            need = f"{delay} ticks of delay + {execution_horizon} executed"
            notes.append(f"the chunk is too short: {need} > horizon {horizon}")
    return notes
