"""The main job, start to end, on this machine and without a download: `make demo`.

Makes a small random checkpoint in LeRobot's format, says what it is, checks the compiled engine against the float32
reference, benches eager against it, serves the policy, drives it with openpi's own client over 50 camera frames, and
writes one report. The policy is random: what is shown is the machinery and its evidence, not a skill. Every number is
computed in this run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from vivace.backends.base import why_not

HERE = Path(__file__).resolve().parent
# Two cores are often shared: a thread that spins at a barrier while its peer has no core costs seconds (docs/log.md)
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "passive"}
VIVACE = [sys.executable, "-m", "vivace.cli.main"]


def step(title: str, command: list[str], *, save: Path | None = None) -> None:
    """Run one command, its table on the terminal, its JSON into a file; stop the demo if it fails."""
    print(f"\n== {title}\n   {' '.join(_short(word) for word in command)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, env=ENVIRONMENT)
    if save is not None:
        save.write_text(done.stdout)
    print(f"   {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"{title}: exit code {done.returncode}")


def _short(word: str) -> str:
    return "vivace" if word == "vivace.cli.main" else Path(word).name if word == sys.executable else word


def main() -> int:
    """Run all steps; returns 0 and prints where the report is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--samples", type=int, default=40)
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    policy, start = out / "policy", time.perf_counter()
    files = {name: out / f"{name}.json" for name in ("inspect", "check", "bench", "budget", "drive", "doctor")}
    make = ["make-checkpoint", str(policy), "--size", "small", "--kind", "pi05", "--format", "lerobot", "--overwrite"]
    step("a small random policy in LeRobot's format", [*VIVACE, *make])
    step("what this machine is", [*VIVACE, "doctor"], save=files["doctor"])
    step("what the checkpoint is", [*VIVACE, "inspect", str(policy)], save=files["inspect"])
    reason = why_not("compiled", device="cpu")
    if reason:
        print(f"\n== no compiled engine here: {reason}; bfloat16 stands in for it", file=sys.stderr)
    candidate = ["--backend", "eager", "--precision", "bfloat16"] if reason else ["--backend", "compiled"]
    check = ["check", str(policy), *candidate, "--observations", "2"]
    step("is the fast engine the same policy?", [*VIVACE, *check], save=files["check"])
    engines = "eager,eager:bfloat16" if reason else "eager,compiled"
    bench = ["bench", str(policy), "--engines", engines, "--samples", str(args.samples), "--warmup-seconds", "10"]
    step("how fast is each engine?", [*VIVACE, *bench], save=files["bench"])
    budget = ["budget", str(files["bench"]), "--target-hz", "20"]
    step("what would have to shrink for 20 Hz?", [*VIVACE, *budget], save=files["budget"])
    drive = [str(HERE / "drive_with_openpi_client.py"), str(policy), "--frames", str(args.frames)]
    step("served, and driven by openpi's client", [sys.executable, *drive, "-o", str(files["drive"])])
    report = out / "report.html"
    step("one page of it", [*VIVACE, "report", *map(str, files.values()), "-o", str(report)])
    print(f"\n{time.perf_counter() - start:.0f} s. The report: {report.resolve()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
