"""What each layer costs in accuracy when it alone runs in 8 bits, and the plan that spends a given error on the most work.

Errors are those of the final actions: what a robot executes, after all layers and all denoise steps. How they are measured
is the caller's: `measure` runs the model on some observations and returns the worst score against the float32 reference.

Greedy: layers in order of error per floating-point operation. How many of them may be taken is found by running the model
with that many, not by adding up single errors, because errors of different layers partly cancel and partly compound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from ..errors import ConfigError
from .plan import PrecisionPlan, Rule
from .quantize import linears, planned_layer


@dataclass(frozen=True)
class Score:
    """Final actions against the reference, the worst of all observations: relative L2 error and cosine."""

    rel_l2: float
    cosine: float


@dataclass(frozen=True)
class Alone:
    """One layer in its 8-bit format, all others as loaded.  flops: operations of its product in one inference."""

    layer: str
    flops: float
    score: Score

    @property
    def price(self) -> float:
        """Error per operation."""
        return self.score.rel_l2 / max(self.flops, 1.0)


@dataclass(frozen=True)
class Mixed:
    """The plan that the search found.

    score        of the whole plan on the observations that it was chosen with
    flops_share  of the linears that the base plan would quantise, how many operations run in 8 bits
    left_out     layers that stay as loaded, cheapest first
    """

    plan: PrecisionPlan
    score: Score
    flops_share: float
    left_out: tuple[Alone, ...]


Measure = Callable[[], Score]
Progress = Callable[[str], None]


@contextmanager
def quantised(model: nn.Module, plan: PrecisionPlan, names: Iterable[str]) -> Iterator[None]:
    """For the time of the block, run the layers `names` in 8 bits under the plan's ranges; then as before."""
    wanted, swapped = set(names), []
    for owner, attribute, layer in linears(model):
        if layer.name in wanted:
            swapped.append((owner, attribute, layer))
            setattr(owner, attribute, planned_layer(layer, plan))
    assert len(swapped) == len(wanted), f"{len(wanted) - len(swapped)} of {sorted(wanted)[:4]} ... are not in the model"
    try:
        yield
    finally:
        for owner, attribute, layer in swapped:
            setattr(owner, attribute, layer)


def each_alone(
    model: nn.Module, plan: PrecisionPlan, *, flops: Mapping[str, float], measure: Measure, progress: Progress
) -> tuple[Alone, ...]:
    """Every layer that `plan` quantises, alone, the worst first."""
    rows = []
    for name in [layer.name for _, _, layer in linears(model) if plan.quantises(layer.name)]:
        with quantised(model, plan, [name]):
            rows.append(Alone(name, flops.get(name, 0.0), measure()))
        progress(name)
    return tuple(sorted(rows, key=lambda row: -row.score.rel_l2))


def most_fp8(
    model: nn.Module,
    plan: PrecisionPlan,
    rows: Sequence[Alone],
    *,
    bound: float,
    measure: Measure,
    progress: Progress,
) -> Mixed:
    """The most layers, cheapest first, with which the measured error stays within `bound` (relative L2).

    Raises ConfigError if the bound is not even met without any.
    """
    order = sorted(rows, key=lambda row: row.price)

    def score_of(count: int) -> Score:
        with quantised(model, plan, [row.layer for row in order[:count]]):
            found = measure()
        progress(f"{count} layers: {found.rel_l2:.2e}")
        return found

    good, best = 0, score_of(0)
    if not best.rel_l2 <= bound:
        raise ConfigError(
            "no plan can meet this action error", got=f"{best.rel_l2:.2e} without any FP8", wanted=f"at most {bound:g}",
            do="raise --max-action-error above the error of bfloat16 itself",
        )  # fmt: skip
    low, high = 1, len(order)
    while low <= high:  # bisection from the top: first everything, then the middle of what is open
        count = high if high == len(order) and good == 0 else (low + high) // 2
        found = score_of(count)
        if found.rel_l2 <= bound:
            good, best, low = count, found, count + 1
        else:
            high = count - 1
    return _mixed(plan, order, good, score=best, bound=bound)


def _mixed(plan: PrecisionPlan, order: Sequence[Alone], count: int, *, score: Score, bound: float) -> Mixed:
    taken, left = order[:count], tuple(order[count:])
    rules: list[Rule] = []
    for row in taken:
        rule = plan.rule(row.layer)
        assert rule is not None, row.layer
        rules.append(replace(rule, pattern=row.layer))
    total = sum(row.flops for row in order) or 1.0
    names = {row.layer for row in taken}
    amax = {name: value for name, value in plan.amax.items() if name in names}
    step_amax = {name: value for name, value in plan.step_amax.items() if name in names}
    mixed = replace(plan, name=f"{plan.name} within {bound:g}", rules=tuple(rules), amax=amax, step_amax=step_amax)
    return Mixed(mixed, score, sum(row.flops for row in taken) / total, left)
