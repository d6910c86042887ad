"""`vivace check PATH`: is this engine still the same policy? Against the float32 reference of the same checkpoint."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ..check import environment, observations, parity
from ..check.metrics import Errors
from ..check.results import result
from ..check.setting import setting_of
from ..errors import ConfigError, ShapeError
from .output import FAILED, OK, console, deliver, refuse_output, show_coverage
from .policy_args import PolicyArgs, load, refuse_early

if TYPE_CHECKING:
    from ..runtime.policy import Policy


@dataclass(frozen=True)
class Args:
    """Compare an engine with the float32 reference: every layer, every step, actions in robot units. Exit code 1 = differs.

    Example: vivace check my_checkpoint --backend compiled --precision bfloat16 --observations recorded/
    """

    path: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    backend: str = "auto"
    """The engine to judge; see vivace doctor."""
    precision: str = "auto"
    """float32, bfloat16, auto = what the checkpoint declares, or a plan file (vivace calibrate)."""
    observations: str = "4"
    """A number = that many made-up observations; a folder = recorded ones: .npz files with the keys of a request, or a
    LeRobot dataset, of which 256 frames are taken."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also write the JSON here."""
    policy: tyro.conf.OmitArgPrefixes[PolicyArgs] = field(default_factory=PolicyArgs)


@dataclass(frozen=True)
class Evidence:
    """What was run: the reference's facts, and snapshots per observation of reference, candidate and plain engine."""

    candidate: Policy
    requests: Sequence[Any]
    source: str
    facts: dict[str, Any]
    wanted: list[parity.Snapshot]
    got: list[parity.Snapshot]
    plain: list[parity.Snapshot]
    coverage: list[dict[str, Any]]


def run(args: Args) -> int:
    """Run the reference, then the candidate, on the same observations and noise; judge; print."""
    refuse_output(args.output)
    given = _recorded(args.observations)
    refuse_early(args.path, args.policy, backend=args.backend, precision=args.precision)
    found = _gather(args, given)
    body: dict[str, Any] = {
        "checkpoint": str(args.path),
        "engine": found.candidate.engine.to_json(),
        **found.facts,
        "observations": {"source": found.source, "count": len(found.requests), "seed": args.policy.seed},
    }
    try:
        summary, plain, marks = _judge(found)
    except ShapeError as error:
        body |= {"passed": False, "error": str(error)}
        console.print(str(error), style="red", markup=False)
    else:
        body |= {
            "passed": all(mark.passed for mark in marks) and not any(row["fallback"] for row in found.coverage),
            "limits": parity.marks_of(found.candidate.engine),
        }
        body |= {"marks": marks, "summary": summary, "plain": plain, "remarks": _remarks(found.candidate)}
        body |= {"coverage": found.coverage}
        _show(summary, marks, found.candidate, found.source)
        show_coverage(found.coverage, title="what ran")
        for remark in body["remarks"]:
            console.print(escape(remark), style="dim", highlight=False)
    document = result("check", body, environment=environment.collect())
    deliver(document, args.output)
    return OK if body["passed"] else FAILED


def _gather(args: Args, given: Sequence[Any]) -> Evidence:
    """One engine after the other: a full model in float32 is 13 GB, so two are never held."""
    from ..precision.coverage import as_json
    from ..runtime.coverage import record

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("reference: loading", total=None)
        reference = load(args.path, args.policy, backend="eager", precision="float32")
        requests, source = given, f"recorded: {Path(args.observations).name}"
        if not given:
            count, seed = int(args.observations), args.policy.seed or 0
            requests = observations.synthetic(reference.io, count, seed=seed, prepare=reference.prepare)
            source = "synthetic"
        bar.update(task, total=2 * len(requests) + 1, description="reference: eager float32")
        wanted = _run_all(reference, requests, bar, task)
        setting = setting_of(reference, reference.prepare(requests[0]))
        facts = {"reference": reference.engine.to_json(), "setting": setting}
        del reference
        gc.collect()
        candidate = load(args.path, args.policy, backend=args.backend, precision=args.precision)
        engine = candidate.engine
        bar.update(task, description=f"candidate: {engine.backend} {engine.precision}")
        got = _run_all(candidate, requests, bar, task)
        coverage = as_json(record(candidate, lambda: _run_all(candidate, requests[:1], bar, task)))
        candidate.describe_engine()
        plain = []
        if parity.needs_yardstick(engine):
            bar.update(task, total=3 * len(requests) + 1, description=f"yardstick: eager {engine.precision}")
            other = load(args.path, args.policy, backend="eager", precision=args.precision)
            plain = _run_all(other, requests, bar, task)
    return Evidence(candidate, requests, source, facts, wanted, got, plain, coverage)


def _judge(found: Evidence) -> tuple[parity.Summary, parity.Summary | None, tuple[parity.Mark, ...]]:
    """How far candidate and plain PyTorch (None: not needed) are from float32, and the marks."""

    def summary_of(snapshots: list[parity.Snapshot]) -> parity.Summary:
        triples = zip(found.requests, snapshots, found.wanted, strict=True)
        return parity.summarise([_compare(found.candidate, request, a, b) for request, a, b in triples])

    summary, precision = summary_of(found.got), found.candidate.engine.precision
    config = found.candidate.model.config
    depths = {"vision_layers": config.vision.layers, "layers": config.prefix.layers}
    marks = parity.judge(summary, parity.marks_of(found.candidate.engine), **depths)
    plain = summary_of(found.plain) if found.plain else None
    if plain is not None:
        marks += parity.judge_against_plain(summary, plain, name=precision)
    return summary, plain, marks


def _recorded(text: str) -> Sequence[Any]:
    """The requests of the folder `text`; none where it is a number. Raises ConfigError for other numbers than counts."""
    if not re.fullmatch(r"[-+]?\d+(\.\d*)?", text):
        return observations.recorded(Path(text))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("--observations cannot be used", got=text, wanted="a number from 1, or a folder")
    return []


def _run_all(policy: Policy, requests: Sequence[Any], bar: Progress, task: Any) -> list[parity.Snapshot]:
    import torch

    from ..runtime import noise
    from ..runtime.collate import collate

    snapshots = []
    for request in requests:
        row = policy.prepare(request)
        drawn = noise.draw(policy.engine.seed, row, horizon=policy.engine.horizon, width=policy.io.action_width)
        inputs = collate([row], kind=policy.model.config.kind, device=policy.model.device)
        x = torch.from_numpy(drawn)[None].to(policy.model.device)
        snapshots.append(parity.run_traced(policy.backend, inputs, x))
        bar.advance(task)
    return snapshots


def _compare(policy: Policy, request: Any, got: parity.Snapshot, wanted: parity.Snapshot) -> parity.Parity:
    row = policy.prepare(request)
    robot = policy.io.embodiment
    return parity.compare_snapshots(
        got, wanted, robot_units=lambda chunk: policy.pipeline.finish(chunk, row), units=robot.action_units
    )


def _remarks(candidate: Policy) -> list[str]:
    remarks = ["velocities are open loop: each engine on its own trajectory"]
    if (candidate.engine.backend, candidate.engine.precision) == ("eager", "float32"):
        remarks.append("the candidate is the reference itself: this run shows determinism, not accuracy")
    elif candidate.engine.precision != "float32" and not parity.needs_yardstick(candidate.engine):
        remarks.append(
            "the candidate is plain PyTorch in this precision, which other engines are compared with: there is nothing to "
            "compare it with here but the absolute marks, so this run shows what the precision costs, not that it is right"
        )
    return remarks


def _show(summary: parity.Summary, marks: Sequence[parity.Mark], candidate: Policy, source: str) -> None:
    engine, row = candidate.engine, summary.worst
    title = f"{engine.backend} {engine.precision} against eager float32, worst of {summary.observations} observations"
    table = Table(title=escape(title), caption=escape(f"observations: {source}"))
    for name in ("stage", "cosine", "MAE", "max", "relative", "rel. L2", "SQNR dB"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for name, errors in _stages(row):
        table.add_row(name, *_cells(errors))
    console.print(table)
    if row.robot is not None:
        console.print(_robot_table(row.robot))
    failed = [mark for mark in marks if not mark.passed]
    for mark in failed[:20]:
        console.print(f"[red]failed[/] {escape(mark.what)}: got {mark.got:.3g}, wanted {mark.rule} {mark.wanted:.3g}")
    colour = "red" if failed else "green"
    console.print(f"[{colour}]{len(marks) - len(failed)} of {len(marks)} marks passed[/]")


def _stages(row: parity.Parity) -> list[tuple[str, Errors]]:
    named = [("vision", row.vision), ("prefix in", row.embeds)]
    for letter, layers in (("K", row.k), ("V", row.v)):
        named += [(f"{letter} layer {i}", errors) for i, errors in enumerate(layers)]
    named += [(f"velocity {i}", errors) for i, errors in enumerate(row.velocity)]
    named.append(("actions", row.actions))
    return [(name, errors) for name, errors in named if errors is not None]


def _cells(e: Errors) -> list[str]:
    db = f"{e.sqnr_db:.1f}"
    return [f"{e.cosine:.7f}", f"{e.mae:.2e}", f"{e.max_abs:.2e}", f"{e.relative_error:.2e}", f"{e.rel_l2:.2e}", db]


def _robot_table(robot: parity.RobotErrors) -> Table:
    table = Table(title="actions in robot units")
    for name in ("dim", "unit", "max difference", "mean difference", "range of the reference"):
        table.add_column(name, justify="right")
    rows = zip(robot.units, robot.max_abs, robot.mean_abs, robot.reference_range, strict=True)
    for dim, (unit, largest, mean, span) in enumerate(rows):
        table.add_row(str(dim), escape(unit), f"{largest:.3g}", f"{mean:.3g}", f"{span:.3g}")
    return table
