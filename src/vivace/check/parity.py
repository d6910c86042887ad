"""The one comparison of engines: same inputs, same noise, stage by stage, against a reference in float32.

Stages in the order in which an observation becomes actions: vision tokens, prefix embeddings, keys and values of every
layer, velocity of every denoise step, the state x after every step, normalised actions, actions in robot units. The first
stage that is off says where to look. Velocities are open loop: each engine is evaluated on its own trajectory, so an error
in one step is part of the input of the next, exactly as on the robot.

The marks that decide pass or fail are values in `PassMarks`, stated before the run and stored with the result. How far
rounding alone may carry an engine from float32 is not stated but run: plain PyTorch in the same precision, on the same
inputs, is the yardstick, and an engine may be at most twice as far off at any stage (two-error rule).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..backends.base import Backend
from ..config import ResolvedEngine
from ..errors import ShapeError
from ..types import ModelInputs, Trace
from .metrics import Errors, at_least, at_most, errors, worst

RobotUnits = Callable[[NDArray[np.float32]], NDArray[Any]]
"""Normalised actions [H, 32] -> actions [H, A] in robot units."""


@dataclass(frozen=True)
class Snapshot:
    """Everything one engine computed for one observation batch, copied to the host, padding removed.

    k, v: per layer [valid tokens of the batch, kv heads, head_dim];  velocity, x: per step [B, H, 32]
    """

    vision: Tensor | None
    embeds: Tensor | None
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]
    x: tuple[Tensor, ...]
    actions: Tensor


@dataclass(frozen=True)
class RobotErrors:
    """Actions in robot units over [B, H, A]: per action dim the largest and mean difference, and the reference's range."""

    max_abs: tuple[float, ...]
    mean_abs: tuple[float, ...]
    reference_range: tuple[float, ...]
    units: tuple[str, ...]


@dataclass(frozen=True)
class Parity:
    """How far a candidate is from the reference, per stage. Lists run over layers (k, v) and over steps (velocity, x)."""

    vision: Errors | None
    embeds: Errors | None
    k: tuple[Errors, ...]
    v: tuple[Errors, ...]
    velocity: tuple[Errors, ...]
    x: tuple[Errors, ...]
    actions: Errors
    robot: RobotErrors | None = None


@dataclass(frozen=True)
class PassMarks:
    """What a candidate must reach. One instance per precision; none of them is ever derived from the run it judges.

    kv_cosine          founding report's mark, every layer of K and V, in every precision
    actions_cosine     mean over observations of the final normalised actions;  actions_cosine_worst: the worst of them
    rel_l2             relative L2 error of every stage; None = no bound of its own, the two-error rule decides
    grows_with_depth   rel_l2 is that of one rounded layer; a value that passed through n layers may have
                       rel_l2 * sqrt(n), because independent rounding errors add in quadrature
    """

    kv_cosine: float = 0.99
    rel_l2: float | None = None
    grows_with_depth: bool = False
    actions_cosine: float = 0.999
    actions_cosine_worst: float = 0.995


FLOAT32_MARKS = PassMarks(rel_l2=1e-5, actions_cosine=0.999999, actions_cosine_worst=0.999999)
BFLOAT16_MARKS = PassMarks()  # what must hold for actions however plain PyTorch rounds, and no more
# E4M3 has 3 mantissa bits: rounding to them is off by 2^-4 / sqrt(3) * sqrt(1/2) = 2.6 % (root mean square, relative),
# and a product of two rounded operands by sqrt(2) times that. The bounds on actions are those of bfloat16.
FP8_MARKS = PassMarks(rel_l2=3.6e-2, grows_with_depth=True)
PLAIN_FACTOR = 2.0
"""Two-error rule: how many times worse than plain PyTorch in the same precision an engine may be."""
PLAIN_SLACK = 1e-5
"""Added to it, so that a stage that plain PyTorch happens to compute exactly does not demand bit equality."""


@dataclass(frozen=True)
class Mark:
    """One pass mark and what was found."""

    what: str
    got: float
    wanted: float
    rule: str
    passed: bool


@dataclass(frozen=True)
class Summary:
    """Many observations: the worst of every number, the mean action cosine, and where it happened."""

    worst: Parity
    observations: int
    actions_cosine_mean: float
    worst_observation: int
    cosines: tuple[float, ...] = field(default_factory=tuple)


def marks_for(precision: str) -> PassMarks:
    """The stated marks of a dtype: float32 strict, anything narrower the bfloat16 ones."""
    return FLOAT32_MARKS if precision == "float32" else BFLOAT16_MARKS


def needs_yardstick(engine: ResolvedEngine) -> bool:
    """Whether plain PyTorch in the engine's precision must be run beside it, for the two-error rule.

    Not in float32, where the reference is plain PyTorch; and not for eager, which is plain PyTorch: it is held to the
    marks alone.
    """
    return engine.backend != "eager" and engine.precision != "float32"


def marks_of(engine: ResolvedEngine) -> PassMarks:
    """The stated marks of an engine: those of FP8 if it has a plan that quantises layers (INT8 is held to them too), else
    those of its dtype."""
    return FP8_MARKS if engine.plan is not None and engine.plan["layers"] else marks_for(engine.precision)


def run_traced(backend: Backend, inputs: ModelInputs, noise: Tensor) -> Snapshot:
    """One inference with everything visible. The cache is copied before `denoise`, because its buffers may be reused."""
    trace = Trace()
    cache = backend.prefill(inputs, trace=trace)
    keep = None if cache.mask is None else _host(cache.mask).bool()
    vision, embeds = trace.vision_tokens, trace.prefix_embeds
    k, v = (tuple(_valid(_host(layer), keep) for layer in layers) for layers in (cache.k, cache.v))
    kept_vision = None if vision is None else _host(vision)
    kept_embeds = None if embeds is None else _valid(_host(embeds), keep)
    actions = backend.denoise(cache, noise.clone(), trace=trace)
    return Snapshot(
        vision=kept_vision,
        embeds=kept_embeds,
        k=k,
        v=v,
        velocity=tuple(_host(step) for step in trace.velocity),
        x=tuple(_host(step) for step in trace.x),
        actions=_host(actions),
    )


def compare(
    reference: Backend,
    candidate: Backend,
    inputs: ModelInputs,
    noise: Tensor,
    *,
    robot_units: RobotUnits | None = None,
    units: Sequence[str] = (),
    candidate_inputs: ModelInputs | None = None,
) -> Parity:
    """Run both engines on the same inputs and noise and compare them stage by stage.

    Args:
        reference: the float32 eager engine.
        candidate: any engine of the same checkpoint.
        inputs: one batch, on the reference's device.
        noise: float32 [B, H, 32].
        robot_units: converts one chunk; None = no comparison in robot units.
        units: name of the unit of each action dim.
        candidate_inputs: the same batch on the candidate's device, where that differs.

    Raises:
        ShapeError: the engines disagree on how many layers, tokens, steps or actions there are.
    """
    wanted = run_traced(reference, inputs, noise)
    got = run_traced(candidate, candidate_inputs or inputs, noise.to((candidate_inputs or inputs).tokens.device))
    return compare_snapshots(got, wanted, robot_units=robot_units, units=units)


def compare_snapshots(
    got: Snapshot, wanted: Snapshot, *, robot_units: RobotUnits | None = None, units: Sequence[str] = ()
) -> Parity:
    """Compare two finished runs. Raises ShapeError, see `compare`."""
    return Parity(
        vision=_optional(got.vision, wanted.vision),
        embeds=_optional(got.embeds, wanted.embeds),
        k=_each("K layers", got.k, wanted.k),
        v=_each("V layers", got.v, wanted.v),
        velocity=_each("denoise steps", got.velocity, wanted.velocity),
        x=_each("states x", got.x, wanted.x),
        actions=errors(got.actions, wanted.actions),
        robot=robot_errors(got.actions, wanted.actions, robot_units, units) if robot_units else None,
    )


def robot_errors(got: Tensor, wanted: Tensor, robot_units: RobotUnits, units: Sequence[str]) -> RobotErrors:
    """Differences after un-normalising, by the robot's whole action transform; NaN if the actions are not finite."""
    b = _in_robot_units(wanted, robot_units)
    finite = bool(got.isfinite().all())  # a robot refuses other numbers
    a = _in_robot_units(got, robot_units) if finite else np.full_like(b, np.nan)
    difference, dims = np.abs(a - b), tuple(range(a.ndim - 1))
    names = [*units, *[""] * a.shape[-1]][: a.shape[-1]]
    return RobotErrors(
        max_abs=tuple(map(float, difference.max(axis=dims))),
        mean_abs=tuple(map(float, difference.mean(axis=dims))),
        reference_range=tuple(map(float, b.max(axis=dims) - b.min(axis=dims))),
        units=tuple(names),
    )


def _in_robot_units(chunks: Tensor, robot_units: RobotUnits) -> NDArray[np.float64]:
    return np.stack([np.asarray(robot_units(chunk.numpy()), np.float64) for chunk in chunks.float()])


def summarise(rows: Sequence[Parity]) -> Summary:
    """The worst of everything over observations; NaN counts as worst. `rows` must not be empty."""
    cosines = tuple(row.actions.cosine for row in rows)
    order = [-math.inf if math.isnan(value) else value for value in cosines]
    robots = [row.robot for row in rows if row.robot is not None]
    whole = Parity(
        vision=_worst_of([row.vision for row in rows]),
        embeds=_worst_of([row.embeds for row in rows]),
        k=_worst_lists([row.k for row in rows]),
        v=_worst_lists([row.v for row in rows]),
        velocity=_worst_lists([row.velocity for row in rows]),
        x=_worst_lists([row.x for row in rows]),
        actions=worst([row.actions for row in rows]),
        robot=_worst_robot(robots) if robots else None,
    )
    return Summary(whole, len(rows), float(np.mean(cosines)), int(np.argmin(order)), cosines)


def judge(summary: Summary, marks: PassMarks, *, vision_layers: int, layers: int) -> tuple[Mark, ...]:
    """Hold a summary against the marks. In bfloat16 that is half of the verdict: see `judge_against_plain`.

    Depths count the rounded blocks that a value passed: K and V of layer i come after vision + i + 1 of them; the velocity
    of step s after vision, the prefix, and s + 1 passes through the expert, because x carries the earlier steps' errors
    (open loop). Actions are held to the depth of step 0: integration averages the errors of the steps.
    """
    row, vision = summary.worst, vision_layers + 2

    def near(what: str, stage: Errors | None, depth: int) -> list[Mark]:
        if stage is None or marks.rel_l2 is None:
            return []
        grown = math.sqrt(depth) if marks.grows_with_depth else 1.0
        return [_below(f"{what}, relative L2", stage.rel_l2, marks.rel_l2 * grown)]

    found = near("vision tokens", row.vision, vision) + near("prefix embeddings", row.embeds, vision)
    for name, rows in (("K", row.k), ("V", row.v)):
        for i, layer in enumerate(rows):
            found.append(_above(f"{name} layer {i}, cosine", layer.cosine, marks.kv_cosine))
            found += near(f"{name} layer {i}", layer, vision + i + 1)
    for i, step in enumerate(row.velocity):
        found += near(f"velocity step {i}", step, vision + layers + (i + 1) * layers)
    found += near("actions", row.actions, vision + 2 * layers)
    found.append(_above("actions, mean cosine", summary.actions_cosine_mean, marks.actions_cosine))
    found.append(_above("actions, worst cosine", row.actions.cosine, marks.actions_cosine_worst))
    return tuple(found)


def judge_against_plain(summary: Summary, plain: Summary, *, name: str) -> tuple[Mark, ...]:
    """The two-error rule: an engine may be at most twice as far from float32 as plain PyTorch in the same precision.

    Args:
        summary: the candidate against the float32 reference.
        plain: the eager engine in the candidate's precision against the same reference.
        name: that precision, for the marks.
    """
    pairs: list[tuple[str, Errors | None, Errors | None]] = [
        ("vision tokens", summary.worst.vision, plain.worst.vision),
        ("prefix embeddings", summary.worst.embeds, plain.worst.embeds),
        ("actions", summary.worst.actions, plain.worst.actions),
    ]
    for label, ours, theirs in (
        ("K layer", summary.worst.k, plain.worst.k),
        ("V layer", summary.worst.v, plain.worst.v),
        ("velocity step", summary.worst.velocity, plain.worst.velocity),
    ):
        pairs += [(f"{label} {i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    return tuple(
        _below(f"{what}, relative L2 against plain {name}", a.rel_l2, PLAIN_FACTOR * b.rel_l2 + PLAIN_SLACK)
        for what, a, b in pairs
        if a is not None and b is not None
    )


def _below(what: str, got: float, limit: float) -> Mark:
    return Mark(what, got, limit, "at most", at_most(got, limit))


def _above(what: str, got: float, limit: float) -> Mark:
    return Mark(what, got, limit, "at least", at_least(got, limit))


def _host(value: Tensor) -> Tensor:
    out = value.detach().to("cpu", copy=True)
    return out.float() if out.is_floating_point() else out


def _valid(layer: Tensor, keep: Tensor | None) -> Tensor:
    """[B, S, ...] -> valid tokens only; embeddings may lack the state token that pi0 appends to the cache."""
    return layer.flatten(0, 1) if keep is None else layer[keep[:, : layer.shape[1]]]


def _optional(got: Tensor | None, wanted: Tensor | None) -> Errors | None:
    return None if got is None or wanted is None else errors(got, wanted)


def _each(what: str, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[Errors, ...]:
    if len(got) != len(wanted):
        raise ShapeError(f"the engines have different numbers of {what}", got=len(got), wanted=len(wanted))
    return tuple(errors(a, b) for a, b in zip(got, wanted, strict=True))


def _worst_of(rows: Sequence[Errors | None]) -> Errors | None:
    there = [row for row in rows if row is not None]
    return worst(there) if there else None


def _worst_lists(lists: Sequence[tuple[Errors, ...]]) -> tuple[Errors, ...]:
    return tuple(worst(list(column)) for column in zip(*lists, strict=True))


def _worst_robot(rows: Sequence[RobotErrors]) -> RobotErrors:
    def over(name: str, pick: Callable[[Any], Any]) -> tuple[float, ...]:
        return tuple(map(float, pick(np.array([vars(row)[name] for row in rows]))))

    return RobotErrors(
        max_abs=over("max_abs", lambda values: values.max(axis=0)),
        mean_abs=over("mean_abs", lambda values: values.mean(axis=0)),
        reference_range=over("reference_range", lambda values: values.max(axis=0)),
        units=rows[0].units,
    )
