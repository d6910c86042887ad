"""`vivace calibrate PATH`: a precision plan from recorded observations; which layers may run in 8 bits, at what cost."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.progress import Progress

from ..check import environment, observations
from ..check.metrics import cosine, rel_l2
from ..check.results import result, write_text
from ..errors import ConfigError
from .calibrate_tables import show
from .output import FAILED, OK, console, emit, refuse_output
from .policy_args import PolicyArgs, load, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..precision.calibrate import LayerRange
    from ..precision.plan import InputScale, PrecisionPlan
    from ..precision.sensitivity import Alone, Mixed, Score
    from ..runtime.policy import Policy

FEW = 16
HELD_OUT = 4  # every fourth observation
SCALES = {"tensor": "static: the largest step decides", "row": "one per token", "step": "one per step"}


@dataclass(frozen=True)
class Args:
    """Measure the activation ranges that an FP8 or INT8 plan needs. Exit code 1: the plan misses --max-action-error.

    Example: vivace calibrate my_checkpoint --data recorded/ --preset fp8-full -o plan.json
    """

    path: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    data: Path | None = None
    """Recorded requests: a folder of .npz files, 64 or more over all phases of the task, or a LeRobot dataset, of which 256
    frames are taken, spread over all episodes."""
    without: tuple[str, ...] = ()
    """Cameras (keys of the requests) to leave out of --data: not connected, so black; the policy must do without them."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write the plan here, for --precision of check, bench and serve."""
    preset: str = "fp8-mlp"
    """fp8-mlp, fp8-full, fp8-prefix+vision, fp8-expert, fp8-all, int8-mlp, int8-full, or a plan file to take rules of."""
    input_scale: Literal["tensor", "row", "step"] | None = None
    """Scales of what layers read: one for all, one per token (found while running), or one per denoise step (expert)."""
    base: Literal["bfloat16", "bfloat16+vision"] = "bfloat16"
    """What the model is loaded in first; a LeRobot checkpoint needs bfloat16+vision to run on the GPU kernels."""
    percentile: str = "amax"
    """Share of |x| that must not saturate, e.g. 99.99; amax = the largest value seen sets the range."""
    observations: int = 0
    """Use that many made-up observations instead of --data; needs --synthetic."""
    synthetic: bool = False
    """Allow data that no robot saw; the plan is then named synthetic."""
    sensitivity: bool = False
    """Also run every layer alone in 8 bits and measure the error of the actions."""
    max_action_error: float | None = None
    """Keep the most 8-bit work with which the actions stay within this relative L2 error of float32."""
    sensitivity_observations: int = 4
    """Observations of each measurement of --sensitivity and --max-action-error."""
    policy: tyro.conf.OmitArgPrefixes[PolicyArgs] = field(default_factory=PolicyArgs)


@dataclass(frozen=True)
class Data:
    """Observations, where they come from, and the part that only judges."""

    used: Sequence[Any]
    held_out: Sequence[Any]
    source: str
    digest: str


@dataclass(frozen=True)
class Measured:
    """Ranges of every linear, the plan made of them, and the work of every linear."""

    ranges: Mapping[str, LayerRange]
    plan: PrecisionPlan
    flops: Mapping[str, float]
    engine: dict[str, Any]
    data: Data


def run(args: Args) -> int:
    """Calibrate; measure sensitivities if asked; write the plan unless it misses its bound; print."""
    refuse_output(args.output)
    percentile, base = _percentile(args.percentile), replace(_base(args.preset, args.input_scale), base=args.base)
    given = _given(args)
    with Progress(console=console, transient=True) as bar:
        found = _measure(args, base, given, percentile, bar)
        rows: tuple[Alone, ...] = ()
        mixed: Mixed | None = None
        judged: Score | None = None
        if args.sensitivity or args.max_action_error is not None:
            rows, reference, verdicts = _alone(args, found, bar)
            if args.max_action_error is not None:
                mixed, judged = _mixed(args, found, rows, (reference, verdicts), bar)
    plan = found.plan if mixed is None else mixed.plan
    passed = judged is None or args.max_action_error is None or judged.rel_l2 <= args.max_action_error
    body = {
        "passed": passed,
        "checkpoint": str(args.path),
        "engine": found.engine,
        "observations": {"source": found.data.source, "count": len(found.data.used), "hash": found.data.digest},
        "plan": {**asdict(plan), "hash": plan.digest},
        "layers": _layers(found),
        "steps": _steps(found),
        "remarks": _remarks(found, passed=passed),
    }
    if rows:
        body["sensitivity"] = rows
    if mixed is not None:
        body["mixed"] = {
            "max_action_error": args.max_action_error, "flops_share": mixed.flops_share, "chosen_with": mixed.score,
            "held_out": judged, "held_out_observations": len(found.data.held_out),
            "left_out": mixed.left_out,
        }  # fmt: skip
    show(found.plan.name, _quantised(found), rows, body)
    emit(result("calibrate", body, environment=environment.collect()))
    if args.output is not None and passed:
        write_text(args.output, plan.to_json() + "\n")
        next_command = f"vivace check {args.path} --precision {args.output}"
        console.print(f"wrote {args.output}; next: {next_command}", markup=False, soft_wrap=True)
    return OK if passed else FAILED


# --- what is measured -------------------------------------------------------------------------------------------------


def _measure(
    args: Args, base: PrecisionPlan, given: Sequence[Any], percentile: float | None, bar: Progress
) -> Measured:
    """Run every observation through the bfloat16 model and look at what each linear reads."""
    from ..precision import calibrate, coverage, fit

    task = bar.add_task(f"loading in {args.base}", total=None)
    policy = load(args.path, args.policy, backend="eager", precision=args.base)
    checkpoint_hash = policy.engine.checkpoint_hash
    data = _data(args, given, policy)
    bar.update(task, total=len(data.used), description="measuring ranges")
    seen, before = coverage.Coverage(kernel="eager"), policy.model.ops
    policy.model.ops = seen.wrap(before)
    with calibrate.watch(policy.model) as ranges:
        for request in data.used:
            _run(policy, request, between=(ranges.begin_prefill, ranges.begin_denoise))
            bar.advance(task)
    table = ranges.measured(percentile, format_of=base.format_of)
    plan = calibrate.from_measured(
        base, table, data=data.source, checkpoint_hash=checkpoint_hash, data_hash=data.digest,
        method="amax" if percentile is None else f"percentile {percentile:g}",
    )  # fmt: skip
    fit.check_fit(plan, fit.all_layers(policy.model), checkpoint_hash=checkpoint_hash)
    work = coverage.layer_flops(seen, steps=policy.engine.num_denoise_steps)
    engine = policy.engine.to_json()
    bar.remove_task(task)
    del policy
    gc.collect()
    return Measured(table, plan, work, engine, data)


def _alone(
    args: Args, found: Measured, bar: Progress
) -> tuple[tuple[Alone, ...], list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Every layer alone in 8 bits in the float32 model; also the float32 actions of the observations, used and held out."""
    from ..precision import sensitivity

    task = bar.add_task("loading in float32", total=None)
    policy = load(args.path, args.policy, backend="eager", precision="float32")
    few = _spread(found.data.used, args.sensitivity_observations)
    reference = [_run(policy, request) for request in few]
    verdicts = [_run(policy, request) for request in found.data.held_out]
    bar.update(task, total=len(_quantised(found)), description="each layer alone")
    rows = sensitivity.each_alone(
        policy.model, found.plan, flops=found.flops, measure=_scorer(policy, few, reference),
        progress=lambda name: bar.advance(task),
    )  # fmt: skip
    bar.remove_task(task)
    del policy
    gc.collect()
    return rows, reference, verdicts


def _mixed(
    args: Args,
    found: Measured,
    rows: tuple[Alone, ...],
    wanted: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]],
    bar: Progress,
) -> tuple[Mixed, Score]:
    """The plan that meets the bound on the used observations, and its score on those held out."""
    from ..precision import sensitivity

    assert args.max_action_error is not None
    task = bar.add_task(f"loading in {args.base}", total=None)
    policy = load(args.path, args.policy, backend="eager", precision=args.base)
    few = _spread(found.data.used, args.sensitivity_observations)
    mixed = sensitivity.most_fp8(
        policy.model, found.plan, rows, bound=args.max_action_error, measure=_scorer(policy, few, wanted[0]),
        progress=lambda what: bar.update(task, description=what),
    )  # fmt: skip
    with sensitivity.quantised(policy.model, mixed.plan, [rule.pattern for rule in mixed.plan.rules]):
        judged = _scorer(policy, found.data.held_out, wanted[1])()
    bar.remove_task(task)
    return mixed, judged


def _scorer(policy: Policy, requests: Sequence[Any], wanted: list[NDArray[np.float32]]) -> Callable[[], Score]:
    from ..precision.sensitivity import Score

    def score() -> Score:
        got = [_run(policy, request) for request in requests]
        pairs = list(zip(got, wanted, strict=True))
        return Score(max(rel_l2(a, b) for a, b in pairs), min(cosine(a, b) for a, b in pairs))

    return score


def _run(
    policy: Policy, request: Any, between: tuple[Callable[[], None], Callable[[], None]] | None = None
) -> NDArray[np.float32]:
    """Normalised actions [1, H, 32]; `between` is called before each of the two stages."""
    import torch

    from ..runtime import noise
    from ..runtime.collate import collate

    row = policy.prepare(request)
    drawn = noise.draw(policy.engine.seed, row, horizon=policy.engine.horizon, width=policy.io.action_width)
    inputs = collate([row], kind=policy.model.config.kind, device=policy.model.device)
    before_prefill, before_denoise = between or (lambda: None, lambda: None)
    before_prefill()
    cache = policy.backend.prefill(inputs)
    before_denoise()
    actions = policy.backend.denoise(cache, torch.from_numpy(drawn)[None].to(policy.model.device))
    host: NDArray[np.float32] = actions.float().cpu().numpy()
    return host


# --- what was asked for -----------------------------------------------------------------------------------------------


def _percentile(text: str) -> float | None:
    if text == "amax":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 50.0 <= value <= 100.0:
        raise ConfigError("--percentile is no share of values", got=repr(text), wanted="amax, or 50 to 100, e.g. 99.99")
    return value


def _base(text: str, input_scale: InputScale | None) -> PrecisionPlan:
    from ..precision import plan

    path = Path(text)
    base = plan.read(path) if path.is_file() else plan.preset(text)
    if not base.rules:
        raise ConfigError("this plan has nothing to calibrate", got=repr(text), wanted="a plan with FP8 or INT8 layers")
    base = base.with_input_scale(input_scale) if input_scale is not None else base
    return replace(base, amax={}, step_amax={}, checkpoint_hash="", data="", data_hash="", method="")


def _given(args: Args) -> Sequence[Any]:
    """The recorded requests; none where they are to be made up.

    Raises ConfigError for numbers that cannot be used and for data that no robot saw, unless it is called synthetic.
    """
    require("--sensitivity-observations", args.sensitivity_observations, least=1)
    require("--max-action-error", args.max_action_error, above=0)
    require("--observations", args.observations, least=0)
    if (args.data is None) == (args.observations == 0):
        raise ConfigError(
            "calibration needs one source of observations",
            wanted="--data FOLDER of recorded requests (.npz), or a LeRobot dataset",
            do="or, for self-tests only, --observations N --synthetic",
        )  # fmt: skip
    if args.data is None:
        if not args.synthetic:
            raise observations.unlike_a_robot(["they are made up"])
        return []
    requests = observations.without(observations.recorded(args.data), args.without)
    if (doubts := observations.doubts(requests)) and not args.synthetic:
        raise observations.unlike_a_robot(doubts)
    return requests


def _data(args: Args, given: Sequence[Any], policy: Policy) -> Data:
    """What measures and what judges, of the given requests or of made-up ones."""
    if args.data is not None:
        requests, name = given, f"{args.data.resolve().name}, {len(given)} observations"
        name += f" without {', '.join(args.without)}" if args.without else ""
    else:
        seed = args.policy.seed or 0
        requests = observations.synthetic(policy.io, args.observations, seed=seed, prepare=policy.prepare)
        name = f"{args.observations} made-up observations"
    held_out: Sequence[Any] = []
    if args.max_action_error is not None:
        if len(requests) < 2:
            raise ConfigError("--max-action-error holds observations out", got=len(requests), wanted="at least 2")
        held_out = requests[1::HELD_OUT]
        requests = [request for index, request in enumerate(requests) if index % HELD_OUT != 1]
    source = f"{'synthetic' if args.synthetic else 'recorded'}: {name}"
    return Data(requests, held_out, source, observations.digest(requests))


def _spread(requests: Sequence[Any], count: int) -> Sequence[Any]:
    """At most `count` of the requests, evenly over all of them."""
    step = max(1, -(-len(requests) // count))
    return requests[::step]


# --- what is said -----------------------------------------------------------------------------------------------------


def _quantised(found: Measured) -> list[LayerRange]:
    return [row for name, row in found.ranges.items() if name in found.plan.amax]


def _layers(found: Measured) -> list[dict[str, Any]]:
    plan = found.plan
    return [
        {**asdict(row), "step_spread": row.step_spread, "input_scale": plan.input_scale_of(row.layer)}
        for row in _quantised(found)
    ]


def _steps(found: Measured) -> dict[str, Any]:
    """Whether the expert's ranges differ from denoise step to denoise step, over all its layers."""
    rows = [row for row in found.ranges.values() if row.steps]
    widest = max(rows, key=lambda row: row.step_spread, default=None)
    if widest is None:
        return {}
    return {
        "layer": widest.layer, "largest_over_smallest": widest.step_spread, "amax": widest.steps,
        "scale": SCALES[found.plan.input_scale_of(widest.layer)],
    }  # fmt: skip


def _remarks(found: Measured, *, passed: bool) -> list[str]:
    remarks = []
    if found.data.source.startswith("synthetic"):
        remarks.append("synthetic data: the plan is for self-tests, its ranges mean nothing for a robot")
    if len(found.data.used) < FEW:
        remarks.append(
            f"{len(found.data.used)} observations are few; 64 or more, over all phases of the task, are right"
        )
    if (steps := _steps(found)) and steps["largest_over_smallest"] > 2.0:
        spread = f"{steps['largest_over_smallest']:.1f}x"
        remarks.append(f"ranges of the expert differ by up to {spread} between denoise steps ({steps['layer']})")
    if found.plan.method == "amax" and "int8" in found.plan.formats(found.plan.amax).values():
        remarks.append("INT8 has equal steps: one large value costs all others; compare with --percentile 99.99")
    kinds = {found.plan.input_scale_of(row.layer) for row in _quantised(found)} - {"tensor"}
    if kinds:
        what = " and ".join(sorted(kinds))
        remarks.append(
            f"counts of values saturated and flushed are those of one static scale; this plan has one per {what}"
        )
    if not passed:
        remarks.append("the plan misses its bound on the observations held out: not written")
    return remarks
