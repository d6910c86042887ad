"""A training run from a recipe: demonstrations, steps, corrections, checkpoint folder, success rates.

Everything that happens is told to `report`, a row at a time (the verb writes them as JSON lines and draws progress).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints.make import Format
from ..checkpoints.open import open_checkpoint
from ..config import EngineConfig
from ..errors import ConfigError
from ..places import writable_folder
from ..robots import prompt
from ..robots.conveyor import embodiment
from ..robots.tokenizer import SentencePieceModel, Tokenizer
from ..runtime.policy import Policy, load_policy
from ..sim import scene, stored
from ..sim.conveyor import STATE_DIM
from ..sim.record import record
from ..sim.rollout import Execution
from ..types import PreviousChunk
from . import closed_loop, export
from .config import Correction, Recipe
from .frames import FLAVOUR, Frames
from .learner import Learner, check_loss
from .pieces import Piece, piece_of
from .simulator import Answered, Ended, Look
from .stored import read_pieces
from .tokenizer import conveyor_tokenizer, pieces

Report = Callable[[dict[str, Any]], None]
MAX_TOKENS = 48
CAMERAS = tuple(camera.view for camera in embodiment("pi05").cameras)


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    report: Report,
    resume: Path | None = None,
    seconds: float | None = None,
    compiled: bool = False,
    also: Sequence[Format] = (),
) -> Path:
    """Run a recipe and return the folder of the trained policy, `out/policy` (LeRobot's format).

    resume    a state that an earlier run of the same recipe saved
    seconds   from now on, half of it for recording: fewer episodes and steps than the recipe says where they do not fit;
              the report says how many, for the recipe
    compiled  torch.compile the loss
    also      formats to write beside LeRobot's, into out/policy_<format>
    Raises: ConfigError for data, a folder or seconds that cannot be used; NumericsError where the loss diverges;
    WorkerDied where a simulator's process does.
    """
    if seconds is not None and not 0.0 < seconds < math.inf:
        raise ConfigError("seconds", got=seconds, wanted="a time above 0")
    prepare(out)
    began = time.perf_counter()
    blob = conveyor_tokenizer()
    (out / "tokenizer.model").write_bytes(blob)
    tokenizer = SentencePieceModel(out / "tokenizer.model")
    vocabulary = -(-pieces(blob) // 16) * 16  # whole blocks for products
    learner = Learner(recipe.network.model(vocabulary), recipe.optimise, device=device, compiled=compiled)
    frames = _frames(recipe, learner, tokenizer, report, seconds=None if seconds is None else seconds / 2)
    if recipe.start:
        learner.begin_from(open_checkpoint(recipe.start))
    if resume is not None:
        learner.resume(resume)
    run = Run(recipe, learner, frames, blob, out, report)
    if seconds is not None:
        run.cut(seconds - (time.perf_counter() - began))
    run.steps()
    folder = out / "policy"
    export.export(folder, run.trained(), format="lerobot")
    run.remember(folder)
    for form in also:
        export.export(out / f"policy_{form}", run.trained(), format=form)
    report({"event": "exported", "folder": str(folder), "bytes": sum(f.stat().st_size for f in folder.rglob("*.*"))})
    if recipe.closed_loop.sources:
        run.evaluate(folder)
    return folder


def prepare(out: Path) -> None:
    """Make the folder of a run. Raises ConfigError where that cannot be, or where a policy is already."""
    if (out / "policy").exists():
        raise ConfigError(f"{out / 'policy'} exists already", do="choose another folder")
    writable_folder(out, name="the folder of the run")


class Run:
    """The state of a run: network, examples, and what is told on the way."""

    def __init__(
        self, recipe: Recipe, learner: Learner, frames: Frames, tokenizer: bytes, out: Path, report: Report
    ) -> None:  # fmt: skip
        self.recipe, self.learner, self.frames, self.out, self.report = recipe, learner, frames, out, report
        self._tokenizer = tokenizer

    def cut(self, seconds: float) -> None:
        """Measure what a step costs and set as many steps as fit, if the recipe asks for more. Takes no step."""
        began, count = 0.0, 30
        for index in range(count):
            if index == count // 3:
                self._settle()
                began = time.perf_counter()
            self.learner.rehearse(*self.learner.draw(self.frames))
        self._settle()
        each = (time.perf_counter() - began) / (count - count // 3)
        fit = max(1, min(self.recipe.optimise.steps, int(seconds / each)))
        self.recipe = replace(self.recipe, optimise=replace(self.recipe.optimise, steps=fit))
        self.learner.optimise = self.recipe.optimise
        self.report({"event": "cut", "steps": fit, "step_ms": 1000 * each})

    def _settle(self) -> None:
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize()

    def steps(self) -> None:
        """All steps from where the learner stands, with the corrections in between."""
        o = self.recipe.optimise
        due = self.corrections()
        for step, one in due:
            if step < self.learner.step:  # resumed: the examples are made again, by the weights of then
                self._correct(one, step, self._as_then(step))
        began, seen = time.perf_counter(), self.learner.step
        while self.learner.step < o.steps:
            step = self.learner.step
            for one in [one for at, one in due if at == step]:
                self._correct(one, step, self._as_now(step))
                began, seen = time.perf_counter(), step
            batch, draws = self.learner.draw(self.frames)
            measured = self.learner.learn(batch, draws)
            if (step + 1) % o.log_every == 0 or step + 1 == o.steps:
                value = float(measured.loss)
                check_loss(step, value)
                speed = (step + 1 - seen) * o.batch / (time.perf_counter() - began)
                rate = self.learner.rate(step)
                self.report(
                    {"event": "step", "step": step + 1, "loss": value, "norm": float(measured.norm), "rate": rate,
                     "observations_per_s": speed}
                )  # fmt: skip
            if o.save_every and (step + 1) % o.save_every == 0:
                self.learner.save(self.out / "state.safetensors")

    def corrections(self) -> list[tuple[int, Correction]]:
        """(step before which it happens, correction), in order; several may share a step of a short run."""
        steps = self.recipe.optimise.steps
        due = [(min(round(one.at * steps), steps - 1), one) for one in self.recipe.closed_loop.corrections]
        return sorted(due, key=lambda pair: (pair[0], pair[1].at))

    def trained(self) -> export.Trained:
        """The averaged weights with everything that serving needs."""
        recipe = self.recipe
        return export.Trained(
            model=self.learner.average, state=self.frames.state_stats, action=self.frames.action_stats,
            cameras=CAMERAS, tokenizer=self._tokenizer, max_tokens=MAX_TOKENS,
            num_denoise_steps=recipe.export.num_denoise_steps,
            max_committed=recipe.optimise.told_ticks, dtype=recipe.export.dtype,
        )  # fmt: skip

    def remember(self, folder: Path) -> None:
        """What the simulator wants to know of the policy, beside its weights."""
        recipe = self.recipe
        trained = stored.Stored(
            image_px=recipe.network.vision.image_size, execute_ticks=recipe.closed_loop.execute_ticks,
            committed_max_ticks=recipe.optimise.told_ticks,
        )  # fmt: skip
        stored.write_trained(folder, trained)

    def evaluate(self, folder: Path) -> list[dict[str, Any]]:
        """Success rates on the held-out seeds 0, 1, ..."""
        ended = self._episodes(folder, self.recipe.closed_loop.sources, first_seed=0)
        rows = closed_loop.rates(ended)
        self.report(
            {"event": "success", "step": self.learner.step, "rates": rows, "simulator": scene.versions(),
             "execute_ticks": self.recipe.closed_loop.execute_ticks}
        )  # fmt: skip
        return rows

    def _as_now(self, step: int) -> Path:
        """The averaged weights as a folder; what an earlier run left there is replaced."""
        folder = self.out / f"correction_{step}"
        shutil.rmtree(folder, ignore_errors=True)
        export.export(folder, self.trained(), format="lerobot")
        return folder

    def _as_then(self, step: int) -> Path:
        """Those of an earlier step of this run; the present ones where it was run in another folder."""
        folder = self.out / f"correction_{step}"
        return folder if folder.exists() else self._as_now(step)

    def _correct(self, correction: Correction, step: int, folder: Path) -> None:
        """Run a policy, add what the expert says about where it got."""
        ended = self._episodes(
            folder, correction.sources, first_seed=closed_loop.CORRECTION_SEED + 4000 * correction.seed_block,
            delay_ticks=correction.delay_ticks, correct=True,
        )  # fmt: skip
        ended.sort(key=lambda one: (one.job.source.task, one.job.source.belt, one.job.seed))
        before = len(self.frames)
        self.frames.add(one.piece for one in ended if one.piece is not None)
        rows = closed_loop.rates(ended)
        self.report(
            {"event": "corrected", "step": step, "delay_ticks": correction.delay_ticks, "rates": rows,
             "examples": len(self.frames) - before}
        )  # fmt: skip

    def _episodes(
        self, folder: Path, sources: Any, *, first_seed: int, delay_ticks: int = 0, correct: bool = False
    ) -> list[Ended]:
        network, loop = self.recipe.network, self.recipe.closed_loop
        policy = load_policy(folder, config=EngineConfig(device=str(self.learner.device), backend="eager"))
        work = closed_loop.jobs(
            sources, first_seed=first_seed, image_px=network.vision.image_size, horizon=network.horizon,
            execution=Execution("aligned", loop.execute_ticks, delay_ticks), correct=correct,
        )  # fmt: skip
        return list(closed_loop.run(work, answering(policy), processes=loop.processes))


def answering(policy: Policy) -> closed_loop.Answer:
    """A policy as `closed_loop` calls it: looks with as many committed actions are answered in one batch."""

    def answer(looks: list[Look]) -> list[Answered]:
        found: dict[int, Answered] = {}
        for ticks in sorted({look.ticks for look in looks}):
            places = [index for index, look in enumerate(looks) if look.ticks == ticks]
            older = [one for one in (looks[index].older for index in places) if one is not None]
            previous = PreviousChunk(torch.from_numpy(np.stack(older)), ticks, "trained") if older else None
            chunks = policy.infer_batch([looks[index].observation for index in places], previous=previous)
            for index, one in zip(places, chunks, strict=True):
                found[index] = Answered(one.actions, one.actions_normalized)
        return [found[index] for index in range(len(looks))]

    return answer


def _frames(recipe: Recipe, learner: Learner, tokenizer: Tokenizer, report: Report, *, seconds: float | None) -> Frames:
    """Demonstrations on the device. While simulators record, the loss is compiled."""
    with ThreadPoolExecutor(1) as thread:
        recording = thread.submit(_pieces, recipe, report, seconds)
        if learner.compiled:
            began = time.perf_counter()
            text = prompt.segments(FLAVOUR, "pick up the red cube", np.zeros(STATE_DIM))
            learner.warm(len(prompt.encode(text, tokenizer, max_tokens=MAX_TOKENS)), views=len(CAMERAS))
            report({"event": "compiled", "seconds": time.perf_counter() - began})
        pieces = recording.result()
    frames = Frames(
        pieces, tokenizer=tokenizer, width=recipe.network.action_width, max_tokens=MAX_TOKENS, device=learner.device
    )  # fmt: skip
    report({"event": "data", "episodes": len(pieces), "examples": len(frames)})
    return frames


def _pieces(recipe: Recipe, report: Report, seconds: float | None) -> list[Piece]:
    data = recipe.data
    if data.folder:
        network = recipe.network
        return read_pieces(Path(data.folder), horizon=network.horizon, image_px=network.vision.image_size)
    plan = recipe.plan()
    pieces, total, began = [], len(plan.jobs()), time.perf_counter()
    for count, demo in enumerate(record(plan, processes=data.processes), start=1):
        if demo.success:  # a lost cube has nothing to teach
            pieces.append(piece_of(demo))
        spent = time.perf_counter() - began
        late = seconds is not None and spent > seconds
        if count % max(1, total // 20) == 0 or count == total or late:
            report({"event": "recorded", "episodes": count, "of": total, "kept": len(pieces), "seconds": spent})
        if late:
            break
    return pieces
