"""The phases of the full-size benchmark, each a function of one `Run`; every row is written to the file at once."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.source import Checkpoint
from ..config import ModelConfig
from ..errors import VivaceError
from ..model.pi import Pi
from ..precision.plan import PrecisionPlan
from ..robots.pipeline import RobotPipeline
from ..robots.tokenizer import Tokenizer
from ..types import ModelInputs
from . import bench, hopper_machine, hopper_proof, hopper_rows, targets
from .hopper_engines import COMPILED, EAGER, OURS, Engine, make, model_inputs, policy_of
from .hopper_robot import Scenes, pipeline, request
from .hopper_weights import load
from .results import jsonable, write_result
from .targets import Size


@dataclass(frozen=True)
class Options:
    """What to measure; `hopper.main` says what each means."""

    out: Path
    sizes: tuple[Size, ...]
    plans: tuple[str, ...]
    plan_files: tuple[Path, ...] = ()
    headline: str = "fp8-all"
    calls: int = 1000
    host_calls: int = 200
    rival_calls: int = 200
    rival_settings: int = 1
    soak_calls: int = 10000
    observations: int = 64
    draws: int = 3
    calibration: int = 8
    seed: int = 0
    outliers: int = 16
    seconds: float = 520.0


@dataclass
class Run:
    """Everything that phases share. `truth` and `plain` are per setting: actions in float32 and in plain bfloat16."""

    options: Options
    config: ModelConfig
    device: torch.device
    checkpoint: Checkpoint
    network: Pi | None
    tokenizer: Tokenizer
    scenes: Scenes
    document: dict[str, Any]
    begin: float
    tell: Callable[[str], None] = print
    plans: list[PrecisionPlan | None] = field(default_factory=list)
    engines: dict[str, Engine] = field(default_factory=dict)
    truth: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.options.seconds - (time.perf_counter() - self.begin)

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Store one row and write the file."""
        self.document.setdefault(table, []).append(jsonable(row))
        self.write()

    def write(self) -> None:
        """The document as it is now, complete or not."""
        self.document["missed"] = targets.missed(self.document)
        self.document["passed"] = not self.document["missed"] and not self.document["not_run"]
        write_result(self.options.out, self.document)

    def skip(self, phase: str, what: str, why: str) -> None:
        """Say that something was not measured."""
        self.tell(f"NOT RUN {phase} {what}: {why}")
        self.add("not_run", {"phase": phase, "what": what, "why": why})

    def base(self) -> Pi:
        """The bfloat16 network that all engines share; drawn again from its seed if it was let go."""
        if self.network is None:
            self.network = load(self.checkpoint, device=self.device, precision="bfloat16")
        return self.network

    def late(self, phase: str, what: str) -> bool:
        """Whether the time is up; then this is not begun, and the result says so."""
        if self.left_s > 0:
            return False
        self.skip(phase, what, f"no time left of {self.options.seconds:g} s")
        return True

    def engine(self, plan: PrecisionPlan | None) -> Engine:
        """vivace's engine for this plan, made once."""
        name = plan.name if plan else "bf16"
        if name not in self.engines:
            self.engines[name] = make(OURS, self.base(), plan=plan)
        return self.engines[name]

    def pipe(self, size: Size) -> RobotPipeline:
        """The robot of this setting."""
        return pipeline(size, self.config, self.tokenizer)

    def held_out(self, size: Size) -> hopper_proof.Samples:
        """Observations that calibration did not see, and noise."""
        o, pipe = self.options, self.pipe(size)
        chosen = range(o.calibration, o.calibration + o.observations)
        inputs = [
            model_inputs(pipe, request(pipe, size, self.scenes, i, seed=o.seed), device=self.device) for i in chosen
        ]
        shape = (o.observations, o.draws, size.horizon, self.config.action_width)
        return hopper_proof.Samples(inputs, noise(shape, seed=o.seed + 1, device=self.device))


def noise(shape: tuple[int, ...], *, seed: int, device: torch.device) -> Tensor:
    """Standard normal, drawn on the host so that every machine has the same."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).to(device)


def rows(run: Run) -> None:
    """B0, B1 and B2 of our engines in every setting; the headline plans with all calls, others with fewer."""
    for size in run.options.sizes:
        if run.late("rows", size.name):
            continue
        with guarded(run, "rows", size.name):
            begin, samples = time.perf_counter(), run.held_out(size)
            engines = [engine for plan in run.plans if (engine := _right(run, size, plan, samples)) is not None]
            run.tell(f"rows {size.name}: captured and checked in {time.perf_counter() - begin:.0f} s")
            _boundary_rows(run, size, engines, samples)
            run.tell(f"rows {size.name}: {time.perf_counter() - begin:.0f} s")


def accuracy(run: Run) -> None:
    """Final actions of every engine in every setting."""
    for size in run.options.sizes:
        if run.late("accuracy", size.name):
            continue
        samples, truth = run.held_out(size), run.truth[size.name]
        plain = hopper_proof.scores(run.plain[size.name], truth)
        for plan in run.plans:
            with guarded(run, "accuracy", f"{size.name} {plan.name if plan else 'bf16'}"):
                engine = run.engine(plan)
                row = hopper_proof.accuracy_row(size, engine, hopper_proof.actions_of(engine, samples), truth, plain)
                run.add("accuracy", row)
                run.tell(f"accuracy {size.name} {row['precision']}: cosine mean {row['cosine_mean']:.5f} "
                         f"worst {row['cosine_worst']:.5f}, relative L2 {row['rel_l2']:.4f} "
                         f"(plain bfloat16 {plain['rel_l2']:.4f})")  # fmt: skip


def proof(run: Run) -> None:
    """Freshness and poisoned memory; last, because a graph that does not stand poison is broken afterwards."""
    for size in run.options.sizes:
        if run.late("proof", size.name):
            continue
        samples = run.held_out(size)
        for engine in _headline(run):
            with guarded(run, "proof", f"{size.name} {engine.name}"):
                inputs, drawn = samples.inputs[0], samples.noise[0, :1]
                row: dict[str, Any] = {"setting": size.name, "engine": engine.name}
                row["fresh"] = hopper_proof.fresh(engine, inputs, drawn)
                if size.prompt_tokens:
                    policy = policy_of(engine, size, run.pipe(size), run.checkpoint)
                    one = request(run.pipe(size), size, run.scenes, run.options.calibration, seed=run.options.seed)
                    row["fresh_policy"] = hopper_proof.fresh_policy(policy, one, drawn[0].cpu().numpy())
                row["poisoned"] = hopper_proof.poisoned(engine, inputs, drawn)
                row["passed"] = row["poisoned"]["passed"] and all(
                    value for part in ("fresh", "fresh_policy") for value in row.get(part, {}).values()
                )
                run.add("proof", row)
                run.tell(f"proof {size.name} {engine.name}: {'passed' if row['passed'] else row}")


def rivals(run: Run) -> None:
    """Engines without kernels of their own, in the same rounds as ours, one setting after the other while time is left."""
    took = 0.0
    for size in run.options.sizes[run.options.rival_settings :]:
        run.document.setdefault("remarks", []).append(f"no rivals in {size.name}: not asked for")
    for size in run.options.sizes[: run.options.rival_settings]:
        if run.left_s < took + 10.0:
            run.skip("rivals", size.name, f"{run.left_s:.0f} s left, the last setting took {took:.0f} s")
            continue
        begin = time.perf_counter()
        with guarded(run, "rivals", size.name):
            samples = run.held_out(size)
            rival = make(COMPILED, run.base())
            _rival_rows(run, size, [make(EAGER, run.base()), rival, *_headline(run)], samples)
            plain = hopper_proof.scores(run.plain[size.name], run.truth[size.name])
            actions = hopper_proof.actions_of(rival, samples)
            run.add("accuracy", hopper_proof.accuracy_row(size, rival, actions, run.truth[size.name], plain))
        took = time.perf_counter() - begin
        run.tell(f"rivals {size.name}: {took:.0f} s")


def memory(run: Run) -> None:
    """What one plan alone keeps on the device; everything else is let go first."""
    drop_networks(run)
    for plan in run.plans:
        if run.late("memory", plan.name if plan else "bf16"):
            continue
        with guarded(run, "memory", plan.name if plan else "bf16"):
            o = run.options
            row = hopper_machine.memory_row(run.config, o.sizes[0], plan, seed=o.seed, outliers=o.outliers)
            run.add("memory", row)
            run.tell(
                f"memory {row['engine']}: {row['ratio']:.3f} of weights + K,V, {row['peak_serving_bytes'] / 1e9:.2f} GB"
            )


def soak(run: Run) -> None:
    """Ten thousand replays of the headline engine in the first setting."""
    size, engine = run.options.sizes[0], _headline(run)[-1]
    if run.late("soak", engine.name):
        return
    with guarded(run, "soak", engine.name):
        samples = run.held_out(size)
        replay = engine.backend.graph_of(samples.inputs[0], samples.noise[0, :1])
        row = hopper_machine.soak_row(size, engine, replay, calls=run.options.soak_calls)
        run.add("soak", row)
        run.tell(f"soak: p50 {row['latency'].p50_ms:.3f}, p99 {row['latency'].p99_ms:.3f}, {row['targets']}")


def start(run: Run) -> None:
    """Cold and warm start of the headline plan in processes of their own."""
    drop_networks(run)
    o = run.options
    if run.late("start", o.headline):
        return
    plan = next((one for one in run.plans if one is not None and one.name == o.headline), None)
    with guarded(run, "start", o.headline):
        timeout_s = max(30.0, run.left_s)
        for row in hopper_machine.start_rows(o.sizes[0], plan, seed=o.seed, outliers=o.outliers, timeout_s=timeout_s):
            run.add("start", row)
            run.tell(f"start {row['caches']}: first action after {row['first_action_s']:.1f} s")


def drop_networks(run: Run) -> None:
    """Let every engine go; they come back when they are asked for, and the network from its seed."""
    run.engines.clear()
    run.network = None
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


FAILURES = (
    VivaceError, RuntimeError, AssertionError, OSError, ValueError, TypeError, AttributeError, LookupError, SubprocessError,
    NameError, ImportError,
)  # fmt: skip


@contextmanager
def guarded(run: Run, phase: str, what: str) -> Iterator[None]:
    """What fails is written down and does not take the next with it.

    An hour of a lent GPU is worth more than a traceback: whatever an engine raises becomes a line of `not_run`.
    """
    begin = time.perf_counter()
    try:
        yield
    except FAILURES as error:
        run.skip(phase, what, f"{type(error).__name__}: {str(error)[:400]}")
    finally:
        spent = run.document.setdefault("phase_seconds", {})
        spent[phase] = round(spent.get(phase, 0.0) + time.perf_counter() - begin, 1)


PHASES: dict[str, Callable[[Run], None]] = {
    "rows": rows, "accuracy": accuracy, "rivals": rivals, "proof": proof, "soak": soak, "memory": memory, "start": start,
}  # fmt: skip
"""In the order in which they run. Those after "soak" need the device for themselves."""


def _headline(run: Run) -> list[Engine]:
    """bfloat16, the headline plan and every plan that came as a file."""
    files = {path.stem for path in run.options.plan_files}
    names = {"bf16", run.options.headline, *files}
    return [run.engine(plan) for plan in run.plans if (plan.name if plan else "bf16") in names]


def _right(run: Run, size: Size, plan: PrecisionPlan | None, samples: hopper_proof.Samples) -> Engine | None:
    """The engine of this plan if its first answer is near float32's; otherwise None, and the result says why."""
    name = plan.name if plan else "bf16"
    with guarded(run, "rows", f"{size.name} {name}"):
        engine = run.engine(plan)
        actions = engine.backend.infer(samples.inputs[0], samples.noise[0, :1])
        reason = hopper_rows.wrong(engine, actions[0], run.truth[size.name][0, 0])
        if reason is None:
            return engine
        run.skip("rows", f"{size.name} {name}", reason)
    return None


def _boundary_rows(run: Run, size: Size, engines: list[Engine], samples: hopper_proof.Samples) -> None:
    o, main = run.options, size == run.options.sizes[0]
    head = {engine.name for engine in _headline(run)}
    inputs, drawn = samples.inputs[0], samples.noise[0, :1]
    b0 = [
        hopper_rows.Timed(
            engine,
            engine.backend.graph_of(inputs, drawn),
            o.calls if main or engine.name in head else max(3, o.calls // 10),
        )
        for engine in engines
    ]
    for row, engine in zip(hopper_rows.time_rows(size, "B0", b0), engines, strict=True):
        stages = hopper_rows.stage_ms(engine, inputs, drawn, calls=30)
        row |= {"stages_ms": stages, "rates": hopper_rows.rates(engine, size, stages, run.document["ceilings"])}
        row["targets"] = [*row["targets"], *targets.of_reuse(size, engine.family, denoise_ms=stages["denoise"])]
        _said(run, row)
    pinned = _pinned(inputs), _host(drawn)
    kept = [engine for engine in engines if main or engine.name in head]
    b1 = [hopper_rows.Timed(e, _with_copies(e, *pinned), o.host_calls) for e in kept]
    for row in hopper_rows.time_rows(size, "B1", b1):
        _said(run, row)
    if not size.prompt_tokens:
        run.document.setdefault("remarks", []).append(f"no B2 for {size.name}: policies refuse a prompt without tokens")
        return
    one = request(run.pipe(size), size, run.scenes, o.calibration, seed=o.seed)
    b2 = [hopper_rows.Timed(e, _answering(run, e, size, one), o.calls if main and e.name in head else o.host_calls)
          for e in kept]  # fmt: skip
    before = {
        row["engine"]: row for row in run.document["rows"] if row["boundary"] == "B0" and row["setting"] == size.name
    }
    for row, engine in zip(hopper_rows.time_rows(size, "B2", b2), kept, strict=True):
        row["parts_ms"] = hopper_rows.parts_ms(policy_of(engine, size, run.pipe(size), run.checkpoint), one)
        added = row["latency"].p50_ms - before[row["engine"]]["latency"]["p50_ms"]
        row["targets"] = [targets.at_most("B2 - B0, ms", added, targets.HOST_MS)]
        _said(run, row)


def _rival_rows(run: Run, size: Size, engines: list[Engine], samples: hopper_proof.Samples) -> None:
    """Rows of the rivals, and ratios to ours from the same rounds."""
    calls = run.options.rival_calls
    inputs, drawn = samples.inputs[0], samples.noise[0, :1]
    timed = [
        hopper_rows.Timed(e, e.backend.graph_of(inputs, drawn), max(5, calls // 10) if e.name == EAGER else calls)
        for e in engines
    ]
    found = hopper_rows.time_rows(size, "B0", timed)
    by_name = {row["engine"]: row["latency"].p50_ms for row in found}
    for row, engine in zip(found, engines, strict=True):
        if engine.ours:
            continue
        row["stages_ms"] = hopper_rows.stage_ms(engine, inputs, drawn, calls=10)
        row["ours_in_the_same_rounds"] = {
            e.name: {"p50_ms": by_name[e.name], "ratio": row["latency"].p50_ms / by_name[e.name]}
            for e in engines if e.ours
        }  # fmt: skip
        row["clock"] += "; no graph: device buffers in, device buffers out" if engine.name == EAGER else ""
        _said(run, row)


def _said(run: Run, row: dict[str, Any]) -> None:
    run.add("rows", row)
    t: bench.Summary = row["latency"]
    marks = ", ".join(f"{one.what} {'met' if one.must_met else 'MISSED'}" for one in row.get("targets", []))
    what = f"{row['setting']} {row['engine']} {row['boundary']}"
    run.tell(f"{what}: p50 {t.p50_ms:.2f} p95 {t.p95_ms:.2f} p99 {t.p99_ms:.2f} n {t.samples}; {marks}")


def _with_copies(engine: Engine, inputs: ModelInputs, drawn: Tensor) -> Callable[[], Any]:
    return lambda: engine.backend.infer(inputs, drawn).cpu()


def _answering(run: Run, engine: Engine, size: Size, one: dict[str, Any]) -> Callable[[], Any]:
    policy = policy_of(engine, size, run.pipe(size), run.checkpoint)
    return lambda: policy.infer(one).actions


def _pinned(inputs: ModelInputs) -> ModelInputs:
    return replace(inputs, images=_host(inputs.images), tokens=_host(inputs.tokens))


def _host(tensor: Tensor) -> Tensor:
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.clone()
