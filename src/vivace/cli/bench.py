"""`vivace bench PATH`: named engines side by side on the same work, percentiles and stages, with the machine attached."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ..check import bench, environment, observations
from ..check.budget import budget, read_run
from ..check.metrics import at_least, cosine, rel_l2
from ..check.parity import marks_of
from ..check.results import result
from ..check.setting import setting_of
from ..errors import ConfigError, NumericsError
from .output import FAILED, OK, console, deliver, emit, refuse_output, show_coverage
from .policy_args import PolicyArgs, load, refuse_early, require

if TYPE_CHECKING:
    from ..runtime.policy import Policy

BOUNDARY = {"name": "B2", "what": "policy.infer: host arrays in (uint8 images, raw state, prompt), host actions out"}


@dataclass(frozen=True)
class PresetArgs:
    """Only with --preset; further ones: python -m vivace.check.hopper --help."""

    settings: tuple[str, ...] = ()
    """VIEWS,PROMPT TOKENS,CHUNK, by spaces; default: the five of docs/measured.md."""
    plans: tuple[str, ...] = ()
    """bf16, presets and plan files, by spaces; default: bf16 and the four FP8 presets."""
    phases: tuple[str, ...] = ()
    """rows, accuracy, rivals (torch.compile and plain PyTorch), soak, proof, memory, start; default: all."""
    calls: int = 1000
    """Calls of our engines at B0."""
    host_calls: int = 1000
    """Calls of our engines at B1, B2 and B3."""
    seconds: float = 2100.0
    """What would begin later is not run, and the result says so; plain PyTorch, 11 minutes, is given up first."""


@dataclass(frozen=True)
class Args:
    """Time named engines side by side. Exit code 1 when an engine gives other actions than the reference: it is not timed.

    Also 1 when an operation fell back, and when the stages of an engine add up to more than its total by over 2 %.

    Example: vivace bench my_checkpoint --engines eager,compiled --samples 500 --target-hz 20 -o bench.json
             vivace bench --preset hopper -o hopper.json
    """

    path: tyro.conf.Positional[Path | None] = None
    """Checkpoint folder; none with --preset."""
    preset: Literal["hopper"] | None = None
    """hopper: full-size pi0.5 with random weights on an NVIDIA GPU, all engines, boundaries and proofs; half an hour."""
    engines: tuple[str, ...] = ("eager",)
    """BACKEND or BACKEND:PRECISION (a precision may be a plan file), by commas or spaces; the first is the baseline."""
    samples: int = 200
    """Rounds; every engine is called once per round, in random order."""
    warmup_seconds: float = 120.0
    """Longest warm-up of one engine."""
    target_hz: float | None = None
    """Also say how far each engine is from this rate."""
    observations: Path | None = None
    """Recorded requests (.npz files, or a LeRobot dataset); default: a made-up one. The first is used, repeated."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also write the JSON here."""
    policy: tyro.conf.OmitArgPrefixes[PolicyArgs] = field(default_factory=PolicyArgs)
    full: PresetArgs = field(default_factory=PresetArgs)


def run(args: Args) -> int:
    """Load every engine, check its output, time them interleaved. Exit code 1: see `Args`."""
    refuse_output(args.output)
    if args.preset is not None:
        return _preset(args)
    names = _names(args.engines)
    wanted, request = _reference(args, _checked(args, names))
    policies = {name: _load(args, name) for name in names}
    outputs: dict[str, dict[str, float]] = {}

    def refcheck(name: str, chunk: Any) -> str | None:
        got, limits = chunk.actions_normalized, marks_of(policies[name].engine)
        outputs[name] = {"cosine": cosine(got, wanted), "rel_l2": rel_l2(got, wanted)}
        good = at_least(outputs[name]["cosine"], limits.actions_cosine_worst)
        return None if good else f"cosine {outputs[name]['cosine']:.6f}, wanted at least {limits.actions_cosine_worst}"

    before = environment.snapshot()
    try:
        times = _measure(args, policies, request, refcheck)
    except NumericsError as error:
        console.print(str(error), style="red", markup=False)
        document = result("bench", {"passed": False, "error": str(error), "output": outputs})
    else:
        engines = {name: _engine(policies[name], times[name], outputs[name], request) for name in names}
        speedups = [bench.speedup(times[name], times[names[0]]) for name in names[1:]]
        document = _document(args, policies[names[0]], request, {"engines": engines, "speedups": speedups}, before)
        _show(document)
    deliver(document, args.output)
    return OK if document["passed"] else FAILED


def _preset(args: Args) -> int:
    """`check.hopper` with this command line."""
    from ..check import hopper

    if args.path is not None or args.output is None:
        got = f"the checkpoint {args.path}" if args.path is not None else "no --output"
        raise ConfigError(
            "the preset makes its own weights and writes a file", got=got, wanted="--preset hopper -o FILE"
        )
    command = ["--out", str(args.output), "--calls", str(args.full.calls), "--seconds", str(args.full.seconds)]
    command += ["--host-calls", str(args.full.host_calls)]
    for name, values, between in (
        ("--settings", args.full.settings, ";"), ("--plans", args.full.plans, ","), ("--phases", args.full.phases, ","),
    ):  # fmt: skip
        command += [name, between.join(values)] if values else []
    options = hopper.parser().parse_args(command)
    document = hopper.run(
        hopper.options_of(options), phases=options.phases.split(","),
        tell=lambda text: console.print(text, markup=False, highlight=False),
    )  # fmt: skip
    emit(document)
    return OK if document["passed"] else FAILED


def _measure(
    args: Args, policies: dict[str, Policy], request: Any, refcheck: Callable[[str, Any], str | None]
) -> dict[str, bench.EngineTimes]:
    from ..backends.on_device import on

    device = next(iter(policies.values())).model.device
    with Progress(console=console, transient=True) as bar, on(device):  # the timer's events belong to the engines' GPU
        task = bar.add_task("warming up", total=None)
        return bench.measure(
            {name: _call(policy, request) for name, policy in policies.items()},
            samples=args.samples,
            seed=args.policy.seed or 0,
            warmup=bench.WarmUp(max_seconds=args.warmup_seconds),
            refcheck=refcheck,
            stages=lambda chunk: {k: v for k, v in chunk.milliseconds.items() if k != "total"},
            device=bench.CudaTimer() if _on_gpu(policies) else None,
            progress=_Teller(bar, task, args.samples * len(policies)),
        )


def _document(
    args: Args, baseline: Policy, request: Any, found: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
    body = {
        "passed": all(_is_sound(engine) for engine in found["engines"].values()),
        "checkpoint": str(args.path),
        "boundary": BOUNDARY,
        "setting": setting_of(baseline, baseline.prepare(request)),
        "observation": "recorded" if args.observations else "synthetic",
        "method": "interleaved rounds in random order; garbage collected before the samples, off while they are taken",
        **found,
        "state_before": before,
        "state_after": environment.snapshot(),
    }
    document = result("bench", body, environment=environment.collect())
    if args.target_hz is not None and all(row["split"]["adds_up"] for row in found["engines"].values()):
        document["budgets"] = _budgets(document, list(found["engines"]), args.target_hz)
    return document


def _is_sound(engine: dict[str, Any]) -> bool:
    """Everything ran where it was meant to, and the parts add up."""
    return engine["split"]["adds_up"] and not any(row["fallback"] for row in engine["coverage"])


class _Teller:
    """Moves the bar: unknown length while warming up, then one step per sample."""

    def __init__(self, bar: Progress, task: Any, samples: int) -> None:
        self._bar, self._task, self._samples = bar, task, samples
        self._left = False

    def __call__(self, name: str, *, sampling: bool) -> None:
        if sampling and not self._left:
            self._left = True
            self._bar.update(self._task, total=self._samples, completed=0, description="measuring")
        self._bar.update(self._task, advance=1)


def _names(given: tuple[str, ...]) -> list[str]:
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        got, wanted = repr(" ".join(given)), "e.g. eager,compiled:bfloat16"
        raise ConfigError("--engines must name each engine once", got=got, wanted=wanted)
    return names


def _path(args: Args) -> Path:
    if args.path is None:
        raise ConfigError("nothing to measure", wanted="a checkpoint folder, or --preset hopper")
    return args.path


def _load(args: Args, name: str) -> Policy:
    backend, _, precision = name.partition(":")
    return load(_path(args), args.policy, backend=backend, precision=precision or "auto")


def _checked(args: Args, names: Sequence[str]) -> Any:
    """The recorded request, or None for a made-up one. Raises what is wrong with the arguments, before anything runs."""
    require("--samples", args.samples, least=1)
    require("--warmup-seconds", args.warmup_seconds, least=0)
    require("--target-hz", args.target_hz, above=0)
    for name in names:
        backend, _, precision = name.partition(":")
        refuse_early(_path(args), args.policy, backend=backend, precision=precision or "auto")
    return None if args.observations is None else observations.recorded(args.observations)[0]


def _reference(args: Args, request: Any) -> tuple[Any, Any]:
    """Actions of the float32 eager reference, and the request; the model is released before others are loaded."""
    reference = load(_path(args), args.policy, backend="eager", precision="float32")
    if request is None:
        request = observations.synthetic(reference.io, 1, seed=args.policy.seed or 0, prepare=reference.prepare)[0]
    actions = np.array(reference.infer(request).actions_normalized)
    del reference
    gc.collect()
    return actions, request


def _call(policy: Policy, request: Any) -> Callable[[], Any]:
    return lambda: policy.infer(request)


def _on_gpu(policies: dict[str, Policy]) -> bool:
    return any(policy.engine.device.startswith("cuda") for policy in policies.values())


def _engine(policy: Policy, times: bench.EngineTimes, output: dict[str, float], request: Any) -> dict[str, Any]:
    from ..precision.coverage import as_json
    from ..runtime.coverage import record

    total = bench.summary(times.total_ms)
    return {
        "precision": policy.engine.precision,
        "engine": policy.engine.to_json(),
        "output": output,
        "coverage": as_json(record(policy, _call(policy, request))),
        "cold_ms": times.cold_ms,
        "warmup_calls": times.warmup_calls,
        "stable": times.stable,
        "total": total,
        "rate_hz": 1e3 / total.p50_ms,
        "device": bench.summary(times.device_ms) if times.device_ms else None,
        "stages": {name: bench.summary(values) for name, values in times.stages_ms.items()},
        "split": bench.split(times),
        "samples": {
            "total_ms": _compact(times.total_ms),
            "device_ms": _compact(times.device_ms),
            "stages_ms": {name: _compact(values) for name, values in times.stages_ms.items()},
        },
    }


def _other(name: str, split: dict[str, Any]) -> str:
    """What is in `other`, or that the spans overlap."""
    spans = dict(split["other_ms"])
    unexplained = spans.pop("unexplained")
    if not split["adds_up"]:
        return f"[red]{escape(name)}: the spans overlap, they add up to {-unexplained:.2f} ms more than the total[/]"
    share = unexplained / split["total_mean_ms"]
    listed = "".join(f"{escape(span)} {ms:.2f}, " for span, ms in spans.items())
    return f"{escape(name)}: other is {listed}unexplained host time {unexplained:.2f} ms ({share:.1%} of the total)"


def _compact(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _budgets(document: dict[str, Any], names: list[str], target_hz: float) -> dict[str, Any]:
    answers = {name: budget(read_run(document, engine=name), target_hz=target_hz) for name in names}
    plain: dict[str, Any] = result("budget", {"budgets": answers})["budgets"]
    return plain


def _show(document: dict[str, Any]) -> None:
    s = document["setting"]
    size = f"({s['views']} views, {s['prompt_tokens']} tokens, chunk {s['horizon']}), {s['steps']} steps"
    title = f"{size}, {s['device']}, boundary B2"
    latency = Table(title=escape(title), caption="host wall time, ms")
    where = Table(title="where it goes, mean ms (share)")
    for table, heads in (
        (latency, ("p50", "p95", "p99", "max", "Hz", "first call")),
        (where, (*bench.STAGES, "other")),
    ):
        table.add_column("engine", no_wrap=True)
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
    for name, row in document["engines"].items():
        label, split = f"{escape(name)} ({row['precision']})", row["split"]
        times = [row["total"][key] for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        latency.add_row(label, *(f"{value:.2f}" for value in (*times, row["rate_hz"], row["cold_ms"])))
        where.add_row(label, *(f"{ms:.2f} ({split['share'][stage]:.0%})" for stage, ms in split["mean_ms"].items()))
    console.print(latency)
    console.print(where)
    for name, row in document["engines"].items():
        show_coverage(row["coverage"], title=f"coverage of {name}")
    for speedup in document["speedups"]:
        console.print(
            f"{escape(speedup['engine'])} is {speedup['ratio']:.2f}x as fast as {escape(speedup['baseline'])} "
            f"(95 % interval {speedup['low']:.2f} to {speedup['high']:.2f})",
            highlight=False,
        )
    for name, row in document["engines"].items():
        console.print(_other(name, row["split"]), highlight=False)
        if not row["stable"]:
            console.print(f"[yellow]{escape(name)}: still changing when the warm-up ended[/]")
    for name, answer in (document.get("budgets") or {}).items():
        console.print(
            f"{escape(name)}: {answer['target_hz']:g} Hz is {answer['verdict']}, must shrink {answer['factor']:.2f}x"
        )
