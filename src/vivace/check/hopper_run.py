"""What the phases of the full-size benchmark share: its options, its state, its clock, and what a failure becomes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from ..precision.coverage import RecordedOps
from ..precision.plan import PrecisionPlan
from ..robots.pipeline import RobotPipeline
from ..robots.tokenizer import Tokenizer
from . import hopper_proof, targets
from .hopper_engines import OURS, Engine, as_served, make, model_inputs
from .hopper_robot import Scenes, pipeline, request
from .hopper_weights import load
from .results import jsonable, write_result
from .targets import Size


@dataclass(frozen=True)
class Options:
    """What to measure.

    calls, host_calls        of bfloat16, the headline plan and plans from files: at B0, and at B1, B2 and B3 each
    few_calls, few_settings  the other plans: B0 only, in the first settings only
    few_observations         on which their accuracy is measured
    reuse_calls              replays of the denoise stage alone
    rival_calls, rival_settings, compile_mode  torch.compile, at B0, B1 and B2 each, in the first settings
    plain_calls, plain_settings                plain PyTorch, the same
    realtime_vla             folder with that engine's files, to be timed at B0 in every setting; None: it is not run
    seconds                  what would not fit into this is not begun, and the result says so
    commit                   of the code, for results of a copy that has no git
    """

    out: Path
    sizes: tuple[Size, ...]
    plans: tuple[str, ...]
    plan_files: tuple[Path, ...] = ()
    headline: str = "fp8-all"
    calls: int = 1000
    host_calls: int = 1000
    few_calls: int = 1000
    few_settings: int = 1
    few_observations: int = 64
    reuse_calls: int = 1000
    rival_calls: int = 1000
    rival_settings: int = 1
    plain_calls: int = 1000
    plain_settings: int = 1
    realtime_vla: Path | None = None
    compile_mode: str = "default"
    soak_calls: int = 10000
    observations: int = 64
    draws: int = 3
    calibration: int = 8
    seed: int = 0
    outliers: int = 16
    seconds: float = 2100.0
    commit: str = ""

    def is_headline(self, name: str) -> bool:
        """Whether the plan of this name ("bf16" for none) gets all calls in every setting."""
        return name in {"bf16", self.headline, *(path.stem for path in self.plan_files)}

    def is_measured(self, name: str, size: Size) -> bool:
        """Whether this plan is measured in this setting at all."""
        return self.is_headline(name) or size in self.sizes[: self.few_settings]


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
    rehearsed: set[tuple[str, Size]] = field(default_factory=set)
    truth: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    guards: int = 0

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
        self.document["passed"] = targets.passed(self.document)
        write_result(self.options.out, self.document)

    def skip(self, phase: str, what: str, why: str, *, informational: bool = False) -> None:
        """Say that something was not measured.  informational: no mark hangs on it here, so it decides nothing."""
        self.tell(f"NOT RUN {phase} {what}: {why}")
        self.add("not_run", {"phase": phase, "what": what, "why": why, "informational": informational})

    def remark(self, text: str) -> None:
        """A line for whoever reads the result."""
        self.document.setdefault("remarks", []).append(text)

    def base(self) -> Pi:
        """The bfloat16 network that all engines share; drawn again from its seed if it was let go."""
        if self.network is None:
            self.network = load(self.checkpoint, device=self.device, precision="bfloat16")
        return self.network

    def late(self, phase: str, what: str, *, needs_s: float = 0.0, kept_s: float = 0.0) -> bool:
        """Whether too little time is left for work of `needs_s`; then it is not begun, and the result says so.

        kept_s  of what is left, kept for phases that come later
        """
        if self.left_s - kept_s > needs_s:
            return False
        why = f"{max(0.0, self.left_s):.0f} s left of {self.options.seconds:g} s, needs about {needs_s:.0f} s"
        self.skip(phase, what, why + (f" beside {kept_s:.0f} s of later phases" if kept_s else ""))
        return True

    def engine(self, plan: PrecisionPlan | None, size: Size) -> Engine:
        """vivace's engine for this plan, made once, with the graphs that a server has for this setting."""
        name = name_of(plan)
        if name not in self.engines:
            self.engines[name] = make(OURS, self.base(), plan=plan)
        if (name, size) not in self.rehearsed:
            self.rehearsed.add((name, size))
            ops = self.engines[name].model.ops
            if isinstance(ops, RecordedOps):
                ops.coverage.clear()  # from here on it holds this setting's graphs alone
            inputs = model_inputs(self.pipe(size), self.request(size), device=self.device)
            shape = (1, size.horizon, self.config.action_width)
            as_served(self.engines[name], inputs, noise(shape, seed=0, device=self.device))
        return self.engines[name]

    def measured(self, size: Size) -> list[PrecisionPlan | None]:
        """The plans that are measured in this setting."""
        return [plan for plan in self.plans if self.options.is_measured(name_of(plan), size)]

    def headline(self, size: Size) -> list[Engine]:
        """bfloat16, the headline plan and every plan that came as a file."""
        return [self.engine(plan, size) for plan in self.plans if self.options.is_headline(name_of(plan))]

    def pipe(self, size: Size) -> RobotPipeline:
        """The robot of this setting."""
        return pipeline(size, self.config, self.tokenizer)

    def request(self, size: Size) -> dict[str, Any]:
        """The first held-out observation, as a client sends it."""
        return request(self.pipe(size), size, self.scenes, self.options.calibration, seed=self.options.seed)

    def held_out(self, size: Size) -> hopper_proof.Samples:
        """Observations that calibration did not see, and noise."""
        o, pipe = self.options, self.pipe(size)
        chosen = range(o.calibration, o.calibration + o.observations)
        inputs = [
            model_inputs(pipe, request(pipe, size, self.scenes, i, seed=o.seed), device=self.device) for i in chosen
        ]
        shape = (o.observations, o.draws, size.horizon, self.config.action_width)
        return hopper_proof.Samples(inputs, noise(shape, seed=o.seed + 1, device=self.device))

    def drop_networks(self) -> None:
        """Let every engine go; they come back when they are asked for, and the network from its seed."""
        self.engines.clear()
        self.rehearsed.clear()
        self.network = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def name_of(plan: PrecisionPlan | None) -> str:
    """The plan's name, "bf16" for none."""
    return plan.name if plan is not None else "bf16"


def noise(shape: tuple[int, ...], *, seed: int, device: torch.device) -> Tensor:
    """Standard normal, drawn on the host so that every machine has the same."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).to(device)


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What Triton raises for a kernel that this GPU cannot compile or hold; those are not RuntimeErrors."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


FAILURES: tuple[type[Exception], ...] = (VivaceError, RuntimeError, OSError, SubprocessError, *_kernel_errors())
"""What a measurement can raise: vivace's refusals, torch and CUDA (RuntimeError, out of memory too), kernels that do not
compile, processes and files. Anything else is a bug of the benchmark itself and ends the run; the rows so far are kept."""


@contextmanager
def guarded(run: Run, phase: str, what: str) -> Iterator[None]:
    """A measurement that fails becomes a line of `not_run`, and the next one runs. One inside another is timed once."""
    begin, outer = time.perf_counter(), not run.guards
    run.guards += 1
    try:
        yield
    except FAILURES as error:
        run.skip(phase, what, f"{type(error).__name__}: {str(error)[:400]}")
    finally:
        run.guards -= 1
        if outer:
            spent = run.document.setdefault("phase_seconds", {})
            spent[phase] = round(spent.get(phase, 0.0) + time.perf_counter() - begin, 1)
