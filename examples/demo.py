"""The main job, start to end, on this machine and without a download: `make demo`.

Runs the policy that comes with vivace, conveyor-small: says what it is, records demonstrations in the simulator, calibrates
an FP8 plan on them and checks the engines against the float32 reference on recorded frames, benches, serves the policy and
lets openpi's own client pick cubes with it at 0 and 100 ms of simulated delay, plays three ways to live with a delay, and
writes one report with curves and a clip. The policy was trained in this simulator for this task; four episodes an arm show
that it works, not how often (docs/guides/simulation.md has the rates). Every number is computed in this run.

Steps that do not need each other run two at a time, with a thread each. So round trips of the client and inference times
of the simulation are those of a busy machine; the simulated delay is the one named. Bench runs alone, with all cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from vivace.backends.base import why_not
from vivace.check import observations

HERE = Path(__file__).resolve().parent
POLICY = "conveyor-small"
ENVIRONMENT = {
    **os.environ,
    # Two cores are often shared: a thread that spins at a barrier while its peer has no core costs seconds (docs/log.md)
    "OMP_WAIT_POLICY": "passive",
    # Software OpenGL with threads of its own in every process costs a sixth more
    "LP_NUM_THREADS": "1",
    # torch.compile on a CPU: all kernels of a program in one file, same bits and speed, a quarter less to compile
    "TORCHINDUCTOR_CPP_WRAPPER": os.environ.get("TORCHINDUCTOR_CPP_WRAPPER", "1"),
}
VIVACE = [sys.executable, "-m", "vivace.cli.main"]
CALIBRATION_FRAMES = 32
FRAMES = 6
"""Recorded frames that check and bench use."""
LIMIT_S = 600.0
CLIP = "clip.webp"


@dataclass(frozen=True)
class Step:
    """One command: its table goes to the terminal, its JSON into the file `save`.

    threads  of its process; None = all cores
    needs    titles of steps that must have ended before
    then     what is left to do with what the command wrote
    """

    title: str
    command: list[str]
    save: Path | None = None
    threads: int | None = None
    needs: tuple[str, ...] = ()
    then: Callable[[], None] = lambda: None


class Runner:
    """Runs steps, alone or several at a time. If one fails, those that run beside it are ended and none begins."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended: set[str] = set()
        self._failed = False

    def alone(self, step: Step) -> None:
        """One step, printed as it writes. Raises SystemExit if it fails."""
        _say(_head(step))
        self._run(step, None)

    def side_by_side(self, steps: Sequence[Step], *, at_a_time: int) -> None:
        """All steps, each as soon as what it needs has ended, else in the order given; each is printed when it ends.

        Raises SystemExit if one fails.
        """
        waiting = list(steps)
        with ThreadPoolExecutor(at_a_time) as pool:
            workers = [pool.submit(self._work, waiting) for _ in range(at_a_time)]
        for worker in workers:
            worker.result()

    def _work(self, waiting: list[Step]) -> None:
        while (step := self._next(waiting)) is not None:
            _say(f"   begins: {step.title}")
            try:
                with tempfile.TemporaryFile("w+") as log:
                    self._run(step, log)
            except BaseException:
                with self._changed:
                    first, self._failed = not self._failed, True
                    for process in self._running:
                        process.terminate()
                    self._changed.notify_all()
                if first:
                    raise
                return  # ended because of the other one, which says why
            with self._changed:
                self._ended.add(step.title)
                self._changed.notify_all()

    def _next(self, waiting: list[Step]) -> Step | None:
        """The first step that can begin, once there is one; None when all have begun or one failed."""
        with self._changed:
            while waiting and not self._failed:
                for step in waiting:
                    if self._ended.issuperset(step.needs):
                        waiting.remove(step)
                        return step
                self._changed.wait()
        return None

    def _run(self, step: Step, log: TextIO | None) -> None:
        start = time.perf_counter()
        variables = ENVIRONMENT if step.threads is None else {**ENVIRONMENT, "OMP_NUM_THREADS": str(step.threads)}
        with self._changed:
            process = subprocess.Popen(step.command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables)
            self._running.add(process)
        try:
            out, _ = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()  # nothing where it has ended
            process.wait()
            with self._changed:
                self._running.discard(process)
        if step.save is not None:
            step.save.write_text(out)
        said = ""
        if log is not None:
            log.seek(0)
            said = f"{_head(step)}\n{log.read().rstrip()}\n"
        _say(f"{said}   {time.perf_counter() - start:.1f} s")
        if process.returncode:
            raise SystemExit(f"{step.title}: exit code {process.returncode}")
        step.then()


def _head(step: Step) -> str:
    return f"\n== {step.title}\n   {' '.join(_short(word) for word in step.command)}"


def _short(word: str) -> str:
    return "vivace" if word == "vivace.cli.main" else Path(word).name if word == sys.executable else word


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")  # one write: lanes do not cut into each other's lines
    sys.stderr.flush()


def some_frames(demos: Path, folder: Path, count: int) -> None:
    """Frames of a dataset, spread over it, as .npz files with the keys of a request."""
    every = observations.recorded(demos)
    folder.mkdir()
    for i in range(count):
        np.savez(folder / f"{i:03}.npz", **every[i * len(every) // count])


def steps(out: Path, files: dict[str, Path], *, episodes: int, slow: str | None) -> tuple[list[Step], list[Step]]:
    """(steps that can run side by side, steps that run alone after them).

    files  one for every result of the report
    slow   why there is no compiled engine here; None = there is one
    """
    demos, few, many, plan = out / "demos", out / "frames", out / "frames-to-calibrate", out / "plan.json"
    for folder in (demos, few, many):
        shutil.rmtree(folder, ignore_errors=True)

    def choose_frames() -> None:
        some_frames(demos, few, FRAMES)
        some_frames(demos, many, CALIBRATION_FRAMES)  # `--data` takes the dataset too, of which it uses 256

    command = ["record", str(demos), "--task", "static", "conveyor", "--episodes", "2", "--image-px", "96"]
    record = Step("four demonstrations of the scripted expert", [*VIVACE, *command], threads=1, then=choose_frames)
    command = ["calibrate", POLICY, "--data", str(many), "--preset", "fp8-mlp", "-o", str(plan)]
    title = f"which numbers meet each layer? An FP8 plan from {CALIBRATION_FRAMES} recorded frames"
    calibrate = Step(title, [*VIVACE, *command], files["calibrate"], 1, needs=(record.title,))
    check = [*VIVACE, "check", POLICY, "--observations", str(few)]
    title = "what would FP8 cost? (simulated on a CPU: its rounding, not its speed)"
    fp8 = Step(title, [*check, "--precision", str(plan)], files["check-fp8"], 1, needs=(calibrate.title,))
    check += ["--backend", "eager", "--precision", "bfloat16"] if slow else ["--backend", "compiled"]
    # all cores: a compiled program is made for a number of threads, and bench uses it again
    fast = Step("is the fast engine the same policy?", check, files["check"], needs=(record.title,))
    arms = ["--task", "conveyor", "--belt", "middle", "--mode", "aligned", "naive", "pause", "--delay-ms", "100", "0"]
    size = ["--episodes", str(episodes), "--no-controls", "--video", str(out / CLIP)]  # the first arm is filmed
    command = [*VIVACE, "simulate", "--policy", POLICY, *arms, *size]
    simulate = Step("three ways to live with 100 ms, on equal seeds", command, files["simulate"], 1)
    client = [str(HERE / "closed_loop_with_openpi_client.py"), POLICY, "--belt", "middle", "--episodes", str(episodes)]
    command = [sys.executable, *client, "-o", str(files["closed-loop"])]
    served = Step("served, and openpi's client picks cubes off the moving belt", command, threads=1)
    doctor = Step("what this machine is", [*VIVACE, "doctor"], files["doctor"])
    inspect = Step("what the policy is", [*VIVACE, "inspect", POLICY], files["inspect"])

    command = [*VIVACE, "bench", POLICY, "--engines", "eager,eager:bfloat16" if slow else "eager,compiled"]
    command += ["--observations", str(few), "--samples", "40", "--warmup-seconds", "5"]
    bench = Step("how fast is each engine? (nothing runs beside it)", command, files["bench"])
    command = [*VIVACE, "budget", str(files["bench"]), "--target-hz", "20"]
    budget = Step("what would have to shrink for 20 Hz?", command, files["budget"])
    # long ones early: the last steps of both cores then end at about the same time
    return [doctor, record, inspect, fast, simulate, calibrate, served, fp8], [bench, budget]


def main() -> int:
    """Run all steps; returns 0 and prints where the report is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--episodes", type=int, default=4, help="of each condition")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    start, runner, report = time.perf_counter(), Runner(), out / "report.html"
    names = "closed-loop", "simulate", "check", "check-fp8", "calibrate", "bench", "budget", "inspect", "doctor"
    files = {name: out / f"{name}.json" for name in names}
    if slow := why_not("compiled", device="cpu"):
        _say(f"== no compiled engine here: {slow}; bfloat16 stands in for it")
    together, alone = steps(out, files, episodes=args.episodes, slow=slow)
    _say("== two steps at a time; what each says is shown when it ends")
    runner.side_by_side(together, at_a_time=2)
    shown = [files["closed-loop"], out / CLIP, *(files[name] for name in names[1:])]
    command = [*VIVACE, "report", *map(str, shown), "--title", f"vivace demo: {POLICY}", "-o", str(report)]
    for step in (*alone, Step("one page of it", command)):
        runner.alone(step)
    _say(f"\n{time.perf_counter() - start:.0f} s. The report: {report.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
