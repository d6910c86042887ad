"""Compiles kernels before anything is timed: a few processes at once, into the caches that the run reads.

A fresh machine would otherwise compile in turn, one setting after the other, for minutes of a GPU that waits. These
processes share the GPU with the run while it computes its float32 truth, which is not timed, and are gone before the first
row. They are a convenience: if one fails, the run compiles itself and says what happened.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import ModelConfig
from ..precision import plan as plans
from ..precision.plan import PrecisionPlan
from .hopper_engines import COMPILED, OURS, Engine, as_served, make, model_inputs
from .hopper_robot import Scenes, pipeline, request, toy_tokenizer
from .hopper_weights import load, random_checkpoint
from .targets import Size, parse_size

LONGEST_S = 200.0
AT_ONCE = 3
"""Processes for our engines: each holds a network of 7 GB beside the run's own two, of 7 and 13 GB, on a GPU of 80."""


@dataclass(frozen=True)
class Helper:
    """One process that compiles."""

    what: str
    process: subprocess.Popen[str]
    log: Path


def begin(
    sizes: Sequence[Size], plan: PrecisionPlan | None, *, rivals: Sequence[Size], seed: int, outliers: int,
    compile_mode: str = "default",
) -> list[Helper]:  # fmt: skip
    """Start processes for our engines in bfloat16 and under `plan` in all settings, and one per setting of a rival."""
    folder = Path(tempfile.mkdtemp(prefix="vivace-warm-"))
    file = folder / "plan.json"
    file.write_text(plan.to_json() if plan is not None else "")
    jobs = [(OURS, sizes[first::AT_ONCE]) for first in range(min(AT_ONCE, len(sizes)))]
    jobs += [(COMPILED, (size,)) for size in rivals]
    helpers = []
    for number, (name, some) in enumerate(jobs):
        log, named = folder / f"{number}.log", ";".join(size.name for size in some)
        command = [sys.executable, "-m", "vivace.check.hopper_warm", name, named, str(seed), str(outliers)]
        command += [str(file), compile_mode]
        with log.open("w") as written:
            process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, text=True)
        helpers.append(Helper(f"{name} {named}", process, log))
    return helpers


def finish(helpers: Sequence[Helper], *, tell: Callable[[str], None], longest_s: float = LONGEST_S) -> list[str]:
    """Wait for all of them, at most `longest_s` in all; one line per helper that did not do its work."""
    end, failed = time.monotonic() + longest_s, []
    for helper in helpers:
        try:
            code = helper.process.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            helper.process.kill()
            helper.process.wait(timeout=10.0)
            code = -9
        if code != 0:
            failed.append(f"compiling ahead {helper.what}: exit code {code}, {helper.log.read_text()[-300:]!r}")
            tell(failed[-1])
    return failed


def main(arguments: list[str]) -> None:
    """One helper: run every graph of one engine in some settings once."""
    name, sizes = arguments[0], [parse_size(text) for text in arguments[1].split(";")]
    seed, outliers, file, mode = int(arguments[2]), int(arguments[3]), Path(arguments[4]), arguments[5]
    config, device = ModelConfig(), torch.device("cuda")
    network = load(random_checkpoint(config, seed=seed, outliers=outliers), device=device, precision="bfloat16")
    torch.cuda.empty_cache()  # what drawing the weights took is the other processes' to have
    tokenizer = toy_tokenizer(config.vocab_size)
    scenes = Scenes.make(1, views=3, image_size=config.vision.image_size, seed=seed)

    def once(engine: Engine) -> None:
        for size in sizes:
            pipe = pipeline(size, config, tokenizer)
            inputs = model_inputs(pipe, request(pipe, size, scenes, 0, seed=seed), device=device)
            noise = torch.randn(1, size.horizon, config.action_width, device=device)
            as_served(engine, inputs, noise)
            engine.backend.infer(inputs, noise)
            engine.backend.denoise(engine.backend.prefill(inputs), noise)

    with torch.no_grad():
        once(make(name, network, in_place=True, compile_mode=mode))
        if name == OURS and file.stat().st_size:
            once(make(name, network, plan=plans.read(file), in_place=True))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
