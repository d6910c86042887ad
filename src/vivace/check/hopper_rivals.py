"""The phase that times engines without kernels of ours: torch.compile under a CUDA graph, and plain PyTorch.

Each is timed at B0, B1 and B2 in the same rounds as engines of ours, so that every row has ratios that a drifting clock or
a busy host cannot make. What ours take in those rounds makes no rows of its own: phase "rows" has those.

What matters most comes first, and a time limit cuts from the end: realtime-vla at B0 if the caller has it, as its ratio is
judged; torch.compile at B0 in every setting asked for, then its B1 and B2, setting by setting (its engines stay until then;
they share the weights of one network, and a graph's working memory is small beside them); then plain PyTorch, 0.2 s a call,
at B0, B1 and B2. It leaves later phases their time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runtime.policy import Policy
from ..types import ModelInputs
from . import hopper_estimate, hopper_proof, hopper_realtime_vla, hopper_rows
from .hopper_engines import COMPILED, EAGER, OURS, Engine, make, policy_of
from .hopper_rows import Timed, in_process
from .hopper_run import Run, guarded, name_of
from .hopper_timing import said
from .targets import RIVAL_RATIO, Size, Target, at_least

STAGE_CALLS = 10
LEAST_COSINE = 0.99
"""realtime-vla rounds more often than plain bfloat16; below this it computes something else."""


@dataclass(frozen=True)
class Beside:
    """A rival and the engines of ours that are called in turn with it, in one setting."""

    size: Size
    rival: Engine
    ours: list[Engine]
    samples: hopper_proof.Samples

    @property
    def request(self) -> tuple[ModelInputs, Tensor]:
        """What is timed: the first of the samples, and its first noise."""
        return self.samples.inputs[0], self.samples.noise[0, :1]


def rivals(run: Run) -> None:
    """See the module."""
    o = run.options
    for size in o.sizes if o.realtime_vla is None else ():
        if size.name in RIVAL_RATIO:
            must, stretch = RIVAL_RATIO[size.name]
            what = f"{size.name} ratio of {o.headline}, at least {must}, stretch {stretch}"
            run.skip("rivals", what, "needs --realtime-vla, a clone of that project", informational=True)
    for name, option, asked in (
        (COMPILED, "--rival-settings", o.rival_settings), (EAGER, "--plain-settings", o.plain_settings),
    ):  # fmt: skip
        for size in o.sizes[asked:]:
            run.skip("rivals", f"{size.name} {name}", f"not asked for: {option} {asked}", informational=True)
    for size in o.sizes[: max(o.rival_settings, o.plain_settings)]:
        if "B2" not in in_process(size):
            run.remark(f"no B2 of rivals for {size.name}: policies refuse a prompt without tokens")
    if o.realtime_vla is not None:
        _realtime_vla(run, o.realtime_vla)
    _torch_compile(run)
    _plain_pytorch(run)


def _realtime_vla(run: Run, folder: Path) -> None:
    """B0 of every setting, judged by the headline plan's ratio, and its accuracy; one engine at a time."""
    o = run.options
    for size in o.sizes:
        what = f"{size.name} {hopper_realtime_vla.NAME}"
        if run.late("rivals", what, needs_s=hopper_estimate.realtime_vla_s(o)):
            continue
        with guarded(run, "rivals", what):
            rival = hopper_realtime_vla.make(folder, run.base(), size)
            one = Beside(size, rival, run.headline(size), run.held_out(size))
            actions, truth = rival.backend.infer(*one.request)[0], run.truth[size.name][0, 0]
            if reason := hopper_rows.wrong(rival, actions, truth, least=LEAST_COSINE):
                run.skip("rivals", what, reason)
            else:
                _rival_row(run, one, "B0", calls=o.rival_calls)
                _accuracy(run, one)


def _ratio(run: Run, size: Size, row: dict[str, Any]) -> list[Target]:
    """The mark of the headline plan beside realtime-vla."""
    beside = row["ours_in_the_same_rounds"].get(f"{OURS} {run.options.headline}")
    if beside is None or size.name not in RIVAL_RATIO:
        return []
    what = f"{hopper_realtime_vla.NAME}'s p50 over that of {run.options.headline}"
    return [at_least(what, beside["ratio"], *RIVAL_RATIO[size.name])]


def _torch_compile(run: Run) -> None:
    """B0 in all settings, their accuracy, then B1 and B2 in each of those that could be timed."""
    o = run.options
    ready: list[Beside] = []
    for size in o.sizes[: o.rival_settings]:
        what = f"{size.name} {COMPILED}"
        if not run.late("rivals", what, needs_s=hopper_estimate.rival_s(o, "B0")):
            with guarded(run, "rivals", what):
                ready.append(_compiled(run, size))
    for one in ready:
        with guarded(run, "rivals", f"{one.size.name} {COMPILED} accuracy"):
            _accuracy(run, one)
    for one in ready:
        for boundary in in_process(one.size)[1:]:
            what = f"{one.size.name} {COMPILED} {boundary}"
            if not run.late("rivals", what, needs_s=hopper_estimate.rival_s(o, boundary)):
                with guarded(run, "rivals", what):
                    _rival_row(run, one, boundary, calls=o.rival_calls)


def _compiled(run: Run, size: Size) -> Beside:
    """torch.compile in this setting, timed at B0."""
    begin = time.perf_counter()
    rival = make(COMPILED, run.base(), compile_mode=run.options.compile_mode)
    one = Beside(size, rival, run.headline(size), run.held_out(size))
    _rival_row(run, one, "B0", calls=run.options.rival_calls)
    run.tell(f"rivals {size.name}: compiled and timed at B0 in {time.perf_counter() - begin:.0f} s")
    return one


def _accuracy(run: Run, one: Beside) -> None:
    truth = run.truth[one.size.name]
    plain = hopper_proof.scores(run.plain[one.size.name], truth)
    actions = hopper_proof.actions_of(one.rival, one.samples)
    run.add("accuracy", hopper_proof.accuracy_row(one.size, one.rival, actions, truth, plain))


def _plain_pytorch(run: Run) -> None:
    """One boundary of all settings after the other, where the phases behind this one will still have their time."""
    o = run.options
    kept_s = hopper_estimate.later_s(run.document["setup"]["estimated_s"], "rivals")
    for boundary in ("B0", "B1", "B2"):
        for size in o.sizes[: o.plain_settings]:
            what = f"{size.name} {EAGER} {boundary}"
            if boundary not in in_process(size) or run.late(
                "rivals", what, needs_s=hopper_estimate.plain_s(o, boundary), kept_s=kept_s
            ):
                continue
            with guarded(run, "rivals", what):
                one = Beside(size, make(EAGER, run.base()), _one_of_ours(run, size), run.held_out(size))
                _rival_row(run, one, boundary, calls=o.plain_calls)


def _one_of_ours(run: Run, size: Size) -> list[Engine]:
    """The engine of the headline plan; where that is not among the plans, of the first one."""
    plans = sorted(run.plans, key=lambda plan: name_of(plan) != run.options.headline)
    return [run.engine(plan, size) for plan in plans[:1]]


def _rival_row(run: Run, one: Beside, boundary: str, *, calls: int) -> None:
    """Add the rival's row, with the ratios to ours from the same rounds."""
    timed = [Timed(engine, _work(run, one, engine, boundary), calls) for engine in (one.rival, *one.ours)]
    row, *ours = hopper_rows.time_rows(one.size, boundary, timed)
    p50_ms = row["latency"].p50_ms
    row["ours_in_the_same_rounds"] = {
        our["engine"]: {"p50_ms": our["latency"].p50_ms, "ratio": p50_ms / our["latency"].p50_ms} for our in ours
    }
    if one.rival.name == hopper_realtime_vla.NAME:
        row["clock"] += "; its forward: small copies into its buffers, and the replay"
        row["targets"] = _ratio(run, one.size, row)
    elif boundary == "B0":
        inputs, drawn = one.request
        row["stages_ms"] = hopper_rows.stage_ms(one.rival, inputs, drawn, calls=STAGE_CALLS)
    if boundary == "B2":
        row["parts_ms"] = hopper_rows.parts_ms(_policy(run, one, one.rival), run.request(one.size))
    if one.rival.name == COMPILED:
        row["compile_mode"] = one.rival.backend.describe().get("mode")
    elif one.rival.name == EAGER and boundary == "B0":
        row["clock"] += "; no graph: device buffers in, device buffers out"
    said(run, row)


def _work(run: Run, one: Beside, engine: Engine, boundary: str) -> Callable[[], Any]:
    """What is called of this engine at this boundary."""
    if boundary == "B0":
        return engine.backend.graph_of(*one.request)
    if boundary == "B1":
        return hopper_rows.with_copies(engine, *hopper_rows.on_host(*one.request))
    return hopper_rows.answering(_policy(run, one, engine), run.request(one.size))


def _policy(run: Run, one: Beside, engine: Engine) -> Policy:
    return policy_of(engine, one.size, run.pipe(one.size), run.checkpoint)
