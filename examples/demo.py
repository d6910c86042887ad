"""The main job, start to end, on this machine and without a download: `make demo`.

Runs the policy that comes with vivace, conveyor-small: says what it is, records demonstrations in the simulator, calibrates
an FP8 plan on them and checks the engines against the float32 reference on recorded frames, benches, serves the policy and
lets openpi's own client pick cubes with it at 0 and 100 ms of simulated delay, plays three ways to live with a delay, and
writes one report with curves and a clip. The policy was trained in this simulator for this task; four episodes an arm show
that it works, not how often (docs/guides/simulation.md has the rates). Every number is computed in this run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from vivace.backends.base import why_not
from vivace.check import observations

HERE = Path(__file__).resolve().parent
POLICY = "conveyor-small"
# Two cores are often shared: a thread that spins at a barrier while its peer has no core costs seconds (docs/log.md)
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive"}
VIVACE = [sys.executable, "-m", "vivace.cli.main"]
CALIBRATION_FRAMES = 64
FRAMES = 6
"""Recorded frames that check and bench use."""


def step(title: str, command: list[str], *, save: Path | None = None, threads: int | None = None) -> None:
    """Run one command, its table on the terminal, its JSON into a file; stop the demo if it fails."""
    print(f"\n== {title}\n   {' '.join(_short(word) for word in command)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    variables = ENVIRONMENT if threads is None else {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, env=variables)
    if save is not None:
        save.write_text(done.stdout)
    print(f"   {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"{title}: exit code {done.returncode}")


def _short(word: str) -> str:
    return "vivace" if word == "vivace.cli.main" else Path(word).name if word == sys.executable else word


def some_frames(demos: Path, folder: Path, count: int) -> None:
    """Frames of a dataset, spread over it, as .npz files with the keys of a request."""
    every = observations.recorded(demos)
    folder.mkdir()
    for i in range(count):
        np.savez(folder / f"{i:03}.npz", **every[i * len(every) // count])


def look_and_measure(out: Path, files: dict[str, Path]) -> None:
    """Machine, checkpoint, demonstrations, a plan calibrated on them, accuracy and speed."""
    step("what this machine is", [*VIVACE, "doctor"], save=files["doctor"])
    step("what the policy is", [*VIVACE, "inspect", POLICY], save=files["inspect"])
    demos, frames, many, plan = out / "demos", out / "frames", out / "frames-to-calibrate", out / "plan.json"
    for folder in (demos, frames, many):
        shutil.rmtree(folder, ignore_errors=True)
    record = ["record", str(demos), "--task", "static", "conveyor", "--episodes", "3", "--image-px", "96"]
    step("six demonstrations of the scripted expert", [*VIVACE, *record, "--processes", "2"], threads=1)
    some_frames(demos, frames, FRAMES)
    some_frames(demos, many, CALIBRATION_FRAMES)  # `--data` takes the dataset too, of which it uses 256
    calibrate = ["calibrate", POLICY, "--data", str(many), "--preset", "fp8-mlp", "-o", str(plan)]
    step("which numbers meet each layer? An FP8 plan", [*VIVACE, *calibrate], save=files["calibrate"])
    check = [*VIVACE, "check", POLICY, "--observations", str(frames)]
    title = "what would FP8 cost? (simulated on a CPU: its rounding, not its speed)"
    step(title, [*check, "--precision", str(plan)], save=files["check-fp8"])
    reason = why_not("compiled", device="cpu")
    if reason:
        print(f"\n== no compiled engine here: {reason}; bfloat16 stands in for it", file=sys.stderr)
    candidate = ["--backend", "eager", "--precision", "bfloat16"] if reason else ["--backend", "compiled"]
    step("is the fast engine the same policy?", [*check, *candidate], save=files["check"])
    bench = ["bench", POLICY, "--engines", "eager,eager:bfloat16" if reason else "eager,compiled", "--samples", "40"]
    shown = ["--observations", str(frames), "--warmup-seconds", "5"]
    step("how fast is each engine?", [*VIVACE, *bench, *shown], save=files["bench"])
    budget = ["budget", str(files["bench"]), "--target-hz", "20"]
    step("what would have to shrink for 20 Hz?", [*VIVACE, *budget], save=files["budget"])


def act(episodes: int, files: dict[str, Path], clip: Path) -> None:
    """Closed loop over the network, then the curves and the clip. The first arm is the one that is filmed."""
    client = [str(HERE / "closed_loop_with_openpi_client.py"), POLICY, "--belt", "middle", "--episodes", str(episodes)]
    title = "served, and openpi's client picks cubes off the moving belt"
    step(title, [sys.executable, *client, "-o", str(files["closed-loop"])])
    arms = ["--task", "conveyor", "--belt", "middle", "--mode", "aligned", "naive", "pause", "--delay-ms", "100", "0"]
    size = ["--episodes", str(episodes), "--processes", "2", "--no-controls", "--video", str(clip)]
    title = "three ways to live with 100 ms, on equal seeds"
    step(title, [*VIVACE, "simulate", "--policy", POLICY, *arms, *size], save=files["simulate"], threads=1)


def main() -> int:
    """Run all steps; returns 0 and prints where the report is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--episodes", type=int, default=4, help="of each condition")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    start, clip, report = time.perf_counter(), out / "clip.webp", out / "report.html"
    names = "closed-loop", "simulate", "check", "check-fp8", "calibrate", "bench", "budget", "inspect", "doctor"
    files = {name: out / f"{name}.json" for name in names}
    look_and_measure(out, files)
    act(args.episodes, files, clip)
    shown = [files["closed-loop"], clip, *(files[name] for name in names[1:])]
    step(
        "one page of it", [*VIVACE, "report", *map(str, shown), "--title", f"vivace demo: {POLICY}", "-o", str(report)]
    )
    print(f"\n{time.perf_counter() - start:.0f} s. The report: {report.resolve()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
