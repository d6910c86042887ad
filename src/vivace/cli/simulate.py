"""`vivace simulate`: success of policies, or of the scripted expert, in the simulated conveyor, on equal seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..check.environment import collect
from ..check.results import result
from ..errors import ConfigError, WorkerDied
from .output import FAILED, OK, console, deliver
from .policy_args import CheckpointArgs
from .simulate_checks import check, check_horizons

if TYPE_CHECKING:
    from ..sim.arms import Arm
    from ..sim.campaign import Block, Settings
    from ..sim.controls import Control
    from ..sim.libero.campaign import Suite
    from ..sim.outcomes import Comparison, Outcome


SHOWN = 40
"""Comparisons in the printed table; the JSON has all."""


@dataclass(frozen=True)
class Args:
    """Run every combination of tasks, belts, policies, engines, precisions, steps, modes and delays on the same seeds.

    Time is simulated: nothing sleeps, the world goes on for the delay. The first arm of a task and belt is the reference.
    Exit code 1: a control failed, or an episode crashed. See docs/guides/simulation.md.

    Example: vivace simulate --task conveyor --belt slow fast --mode naive aligned --delay-ms 0 100 160
    Example: vivace simulate --policy my-policy --precision float32 plan.json --episodes 500 --processes 8 -o out.json
    Example: vivace simulate --suite libero_object --policy pi05-libero --libero-python libero-env/bin/python
    """

    task: tuple[str, ...] = ("static", "conveyor")
    """Names of vivace.sim.tasks, or all."""
    policy: tuple[str, ...] = ("expert",)
    """Checkpoint folders, or a policy that comes with vivace; expert = the scripted one, which sees the true state."""
    engine: tuple[str, ...] = ("auto",)
    """Backends, see vivace doctor."""
    precision: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--plan"])] = ("auto",)
    """float32, bfloat16, auto, or files of precision plans."""
    steps: tuple[int, ...] = ()
    """Denoise steps, each a condition of its own; default: what the checkpoint says."""
    belt: Annotated[
        tuple[Literal["off", "slow", "middle", "fast", "fastest"], ...], tyro.conf.arg(aliases=["--belt-speed"])
    ] = ()
    """Belt speeds; default: each task's own."""
    mode: tuple[Literal["pause", "naive", "aligned"], ...] = ("aligned",)
    """What the robot does while the policy computes."""
    delay_ms: tuple[float, ...] = ()
    """Inference delays, each a condition of its own, rounded up to control ticks of 20 ms; default 0."""
    latency: tuple[str, ...] = ()
    """JSON files of measured latencies, or bench results (FILE#ENGINE); each inference draws one."""
    real_clock: bool = False
    """Add the wall time of each inference on this machine to its delay."""
    committed: tuple[Literal["auto", "always", "never"], ...] = ("auto",)
    """Tell the policy which actions will be executed meanwhile (mode aligned); auto = where it was trained for it."""
    execute_ticks: int | None = None
    """Execution horizon: control ticks from one observation to the next; default 8, in a suite its convention's."""
    episodes: int = 50
    """Episodes of each arm."""
    seed: int = 0
    """First seed of the episodes; the others follow. In a suite: the first initial state."""
    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] | None = None
    """A LIBERO suite in the conveyor's place, with its official initial states. See docs/guides/libero.md."""
    convention: Literal["openpi", "lerobot"] = "openpi"
    """Whose evaluation protocol of LIBERO: image size, state, step limits, execution horizon."""
    suite_task: tuple[int, ...] = ()
    """Tasks of the suite, by number; default: all."""
    episodes_per_task: int = 50
    """Initial states of each task of the suite; 50 are there, and 50 make the standard number."""
    libero_python: str | None = None
    """The Python interpreter that has LIBERO installed; default: this one."""
    processes: int = 1
    """Blocks of episodes that run at the same time."""
    margin: float = 0.05
    """Non-inferiority margin: loss of success rate that would not matter. Choose it before the run."""
    controls: bool = True
    """Blanked images, broken mask, injected delay, stored rate."""
    control_episodes: int = 10
    """Episodes of each control."""
    keep_episodes: bool = False
    """Store a row for each episode, not only its outcome."""
    store: bool = False
    """Write the reached rates into simulation.json beside the policies: of 50 episodes or more, no fewer than stored."""
    video: Path | None = None
    """Also write one episode as an annotated clip: .mp4 (vivace[video]), .webp or .gif. First arm, first seed."""
    rerun: Path | None = None
    """Also log that episode for Rerun, .rrd; needs rerun-sdk."""
    gl: Literal["auto", "egl", "osmesa"] = "auto"
    """Which OpenGL draws the conveyor; auto = EGL where it gives a context, else OSMesa."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also write the JSON here."""
    options: tyro.conf.OmitArgPrefixes[CheckpointArgs] = field(default_factory=CheckpointArgs)


def run(args: Args) -> int:
    """Print one row for each arm, comparisons and controls, and the JSON."""
    from ..sim import campaign, controls, statistics  # Unsupported without the extra `sim`

    check(args)
    if args.suite is not None:
        return _run_suite(args)
    arms, settings = _arms(args), _settings(args)
    statistics.paired(0, 0, 1, margin=args.margin)  # a bad margin is refused before hours of work
    if args.store:
        _check_store(arms, args.episodes)
    _film(args, arms[0], settings)
    work = campaign.jobs(arms, settings, processes=args.processes)
    extra = controls.control_jobs(arms, settings, episodes=args.control_episodes) if args.controls else []
    blocks, died = _played([*work, *extra], args.processes)
    outcomes = campaign.collect(arms, blocks[: len(work)], keep=args.keep_episodes)
    if died is not None:
        _keep_unfinished(args, campaign.as_json(outcomes, settings, [], simulator=campaign.simulator(blocks)), died)
    compared = campaign.comparisons(outcomes, margin=args.margin)
    judged = controls.judge(outcomes, extra, blocks[len(work) :], settings) if args.controls else []
    passed = not any(one.status == "failed" for one in judged) and not any(one.crashes for one in outcomes)
    body = campaign.as_json(outcomes, settings, compared, simulator=campaign.simulator(blocks))
    document = result(
        "simulate", {"passed": passed, **body, "controls": [asdict(one) for one in judged]}, environment=collect()
    )
    _show(outcomes, compared, judged, args, f"{args.episodes} episodes each, equal seeds from {args.seed}")
    deliver(document, args.output)
    kept = _store(outcomes, judged, args.seed) if args.store else True
    return OK if passed and kept else FAILED


def _run_suite(args: Args) -> int:
    """The same for a suite of LIBERO: its own tasks, initial states and versions."""
    from ..sim import campaign
    from ..sim.libero import campaign as libero

    suite = _suite(args)
    arms = _arms(args, suite)
    work = libero.jobs(arms, suite)
    extra = libero.control_jobs(arms, suite, episodes=args.control_episodes) if args.controls else []
    blocks, died = _played([*work, *extra], args.processes, libero.run_job)
    outcomes = campaign.collect(arms, blocks[: len(work)], keep=args.keep_episodes, units=libero.UNITS)
    settings = campaign.Settings(episodes=suite.episodes_per_task, first_seed=args.seed, margin=args.margin)
    simulator = libero.simulator(blocks, suite)
    if died is not None:
        _keep_unfinished(args, campaign.as_json(outcomes, settings, [], simulator=simulator), died)
    compared = campaign.comparisons(outcomes, margin=args.margin)
    judged = libero.judge(outcomes, extra, blocks[len(work) :])
    passed = not any(one.status == "failed" for one in judged) and not any(one.crashes for one in outcomes)
    body = campaign.as_json(outcomes, settings, compared, simulator=simulator)
    tasks = libero.by_task(outcomes, blocks, suite)
    document = result(
        "simulate",
        {"passed": passed, **body, "tasks": tasks, "controls": [asdict(one) for one in judged]},
        environment=collect(),
    )
    title = f"{args.suite}, {suite.convention}: {len(suite.numbers)} tasks x {suite.episodes_per_task} initial states"
    _show(outcomes, compared, judged, args, title)
    for row in tasks:
        counts = ", ".join(f"{one['successes']}/{one['n']}" for one in row["arms"])
        console.print(f"{row['task']:2} {counts}  {row['prompt']}", markup=False)
    deliver(document, args.output)
    return OK if passed else FAILED


def _suite(args: Args) -> Suite:
    from ..sim.actors import Options
    from ..sim.libero.campaign import Suite

    options = asdict(args.options)
    options["embodiment"] = options["embodiment"] or "libero"
    return Suite(
        name=args.suite or "",
        convention=args.convention,
        tasks=args.suite_task,
        episodes_per_task=args.episodes_per_task,
        first_state=args.seed,
        python=args.libero_python,
        options=Options(**options),
    )


def _arms(args: Args, suite: Suite | None = None) -> list[Arm]:
    from ..sim import arms, latency, scene, stored
    from ..sim.libero import campaign as libero
    from ..sim.libero.conventions import CONTROL_HZ, convention

    measured = [latency.read_latencies(given) for given in args.latency]
    fixed = args.delay_ms or (() if measured else (0.0,))
    ticks, hz = (8, scene.CONTROL_HZ) if suite is None else (convention(suite.convention).execute_ticks, CONTROL_HZ)
    axes = arms.Axes(
        tasks=args.task,
        belts=args.belt,
        policies=args.policy,
        engines=args.engine,
        precisions=args.precision,
        steps=args.steps,
        modes=args.mode,
        delays=arms.delays(fixed, measured, measured=args.real_clock, control_hz=hz),
        execute_ticks=args.execute_ticks or ticks,
    )
    product = arms.product(axes) if suite is None else libero.arms(axes, suite)
    check_horizons(product, args.options)
    return stored.with_committed(product, args.committed)


def _settings(args: Args) -> Settings:
    from ..sim.actors import Options
    from ..sim.campaign import Settings

    options = asdict(args.options)
    options["embodiment"] = options["embodiment"] or "conveyor"
    return Settings(
        episodes=args.episodes,
        first_seed=args.seed,
        margin=args.margin,
        keep=args.keep_episodes,
        options=Options(**options, gl=args.gl),
    )


def _played(
    work: Sequence[Any], processes: int, run: Callable[[Any], Block] | None = None
) -> tuple[list[Block], WorkerDied | None]:
    """Run all blocks under a progress bar that counts episodes; those before a process that was killed, and its error."""
    from ..sim.campaign import run_job, run_jobs

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    blocks = []
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("episodes", total=sum(len(job.seeds) for job in work))
        try:
            for block in run_jobs(work, processes=processes, run=run or run_job):
                blocks.append(block)
                bar.update(task, advance=len(block.rows))
        except WorkerDied as error:
            return blocks, error
    return blocks, None


def _keep_unfinished(args: Args, body: dict[str, Any], died: WorkerDied) -> None:
    """Write what was finished, without comparisons and controls, and raise."""
    unfinished = {"passed": False, "unfinished": str(died), **body, "controls": []}
    deliver(result("simulate", unfinished, environment=collect()), args.output)
    if args.output is not None:
        console.print(f"{args.output}: what was finished", highlight=False, markup=False)
    raise died


def _film(args: Args, arm: Arm, settings: Settings) -> None:
    """Before the campaign, so that a missing library is known before hours of work."""
    if args.video is None and args.rerun is None:
        return
    from ..sim import film

    episode = film.record(arm, seed=args.seed, options=settings.options, video=args.video, rerun=args.rerun)
    end = "success" if episode.success else "no success"
    written = ", ".join(str(path) for path in (args.video, args.rerun) if path is not None)
    console.print(f"{written}: seed {args.seed}, {end} after {len(episode.actions) / episode.control_hz:.2f} s")


def _check_store(arms: Sequence[Arm], episodes: int) -> None:
    """Before the campaign: what it will not store anyway is no reason for hours of work."""
    from ..sim import stored

    kept = [arm for arm in arms if stored.has_rate(arm)]
    if not kept:
        raise ConfigError("nothing to store", got="no arm", wanted="a checkpoint folder at a fixed delay, with --store")
    for policy in dict.fromkeys(arm.policy for arm in kept):
        mine = [stored.rate_of(arm, successes=0, n=episodes) for arm in kept if arm.policy == policy]
        stored.check_rates(policy, mine)


def _store(outcomes: Sequence[Outcome], judged: Sequence[Control], first_seed: int) -> bool:
    """Write the rates of every policy whose controls held and whose episodes all ended; say which were not."""
    from ..sim import stored

    stored_all = True
    for policy in dict.fromkeys(one.arm.policy for one in outcomes if stored.has_rate(one.arm)):
        mine = [one for one in outcomes if one.arm.policy == policy and stored.has_rate(one.arm)]
        failed = [one.name for one in judged if one.policy == policy and one.status == "failed"]
        if failed or any(one.crashes for one in mine):
            why = f"control {', '.join(failed)} failed" if failed else "episodes crashed"
            hint = "; if the stored rate is the wrong one: --no-controls" if failed == ["stored rate"] else ""
            console.print(f"stored no rate of {policy}: {why}{hint}", style="red", markup=False)
            stored_all = False
            continue
        rates = tuple(
            stored.rate_of(
                one.arm, successes=one.successes, n=one.finished, first_seed=first_seed, engine=one.engine
            ) for one in mine
        )  # fmt: skip
        console.print(f"stored {len(rates)} rates in {stored.write_rates(policy, rates)}", markup=False)
    return stored_all


def _show(
    outcomes: Sequence[Outcome], compared: Sequence[Comparison], judged: Sequence[Control], args: Args, title: str
) -> None:
    table = Table(title=title)
    heads = ["arm", "delay", "success", "95 % interval", "time, s", "age, ms", "p99", "wrong", "crashed"]
    starved = any(one.starved_ticks for one in outcomes)
    heads += ["starved, ticks"] if starved else []
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right")
    for one in outcomes:
        low, high = one.interval
        rate = "" if one.rate is None else f"{one.rate:.1%}"
        figures = one.time_to_success_s["median"], one.age_ms["mean"], one.age_ms["p99"]
        shown = [_number(value, digits) for value, digits in zip(figures, (2, 0, 0), strict=True)]
        cells = [rate, f"{low:.1%} to {high:.1%}", *shown, str(one.wrong_object), str(one.crashes)]
        cells += [str(one.starved_ticks or "")] if starved else []
        table.add_row(escape(_title(one.arm)), escape(one.arm.delay.name), *cells, style="red" if one.crashes else None)
    console.print(table)
    if compared:
        console.print(_comparisons(outcomes, compared, args.margin))
    for message in dict.fromkeys(text for one in outcomes for text in one.crash_messages):
        console.print(f"crash: {message}", style="red", markup=False)
    for control in judged:
        colour = {"passed": "green", "failed": "red", "void": "yellow"}[control.status]
        console.print(
            f"control {control.name}, {control.policy}, its first arm: {control.status}; {control.found}",
            style=colour, markup=False,
        )  # fmt: skip


def _title(arm: Arm) -> str:
    parts: list[Any] = [arm.task, arm.belt, None if arm.policy == "expert" else arm.policy, arm.mode]
    parts += [None if value == "auto" else value for value in (arm.engine, arm.precision)]
    parts += [f"{arm.steps} steps" if arm.steps else None, "committed" if arm.committed else None]
    return " ".join(str(part) for part in parts if part)


def _comparisons(outcomes: Sequence[Outcome], compared: Sequence[Comparison], margin: float) -> Table:
    table = Table(title="pairs: difference of success, Tango's 95 % interval, McNemar exact (Holm over the table)")
    for i, head in enumerate(
        ("arm", "against", "difference", "95 % interval", "+", "-", "p", f"not worse by {margin:.0%}")
    ):
        table.add_column(head, justify="left" if i < 2 else "right")
    for one in compared[:SHOWN]:
        r = one.result
        low, high = r.interval
        sides = [escape(f"{_title(outcomes[i].arm)}, {outcomes[i].arm.delay.name}") for i in (one.arm, one.reference)]
        size = [f"{r.difference:+.1%}", f"{low:+.1%} to {high:+.1%}", str(r.gained), str(r.lost), f"{one.holm_p:.2g}"]
        table.add_row(*sides, *size, r.void or ("yes" if r.noninferior else "not shown"))
    if len(compared) > SHOWN:
        table.caption = f"{len(compared) - SHOWN} more in the JSON"
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
