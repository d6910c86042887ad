"""Measures the activation ranges that a plan's static scales need: how large the inputs of every linear become.

    with watch(model) as ranges:
        for inputs, noise in observations:              # any backend that runs the model's own operations; eager does
            ranges.begin_prefill()
            cache = backend.prefill(inputs)
            ranges.begin_denoise()
            backend.denoise(cache, noise)
    plan = with_ranges(preset("fp8-all"), ranges, data="episodes/kitchen 0..31", checkpoint_hash=...)

The model is not touched: for the time of the block it is given an operation table that looks at what each linear reads
and then does what the table below it does. Counts stay on the device until the end, so nothing waits for the host.

Every |x| is counted in one of 32,768 bins, the positive bfloat16 numbers: exact for bfloat16 activations, within 2^-8 for
float32 ones. So a percentile costs no second pass, and how many values a range saturates is known for any range.

amax or percentile? E4M3 is a floating-point format: a range twice as wide costs resolution only below 2^-6 of a scale,
while a saturated outlier is wrong by all that was cut off. So amax is the default; a percentile is for layers with rare
values so large that the ordinary ones fall under that limit. INT8 has equal steps: there a range twice as wide doubles
every error, and a percentile is worth a try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import NumericsError
from ..ops.layers import Int8Linear, Linear, QuantisedLinear
from ..ops.reference import E4M3_MAX
from ..ops.table import OpTable
from .plan import Format, PrecisionPlan

HALF_STEPS: dict[Format, float] = {"e4m3": 2.0**-10 / E4M3_MAX, "int8": 0.5 / Int8Linear.largest, "keep": 0.0}
"""Of a range: half of the smallest number, which is 2^-9 scales in E4M3 and one scale in INT8."""
READERS = ("linear", "linear_gelu", "linear_residual_norm", "geglu", "qkv_rope", "kv_rope", "step_boundary")
BINS = 1 << 15


class HasOps(Protocol):
    """A model that runs whatever operation table it holds."""

    ops: OpTable


@dataclass(frozen=True)
class LayerRange:
    """What one linear read.

    amax       largest |x|
    chosen     the range that the method chose: the plan's number
    values     how many were seen
    saturated  how many of them lie above `chosen`
    flushed    how many become zero, because they lie below half of the format's smallest step under that range
    steps      largest |x| per denoise step; () outside the action expert
    """

    layer: str
    amax: float
    chosen: float
    values: int
    saturated: int
    flushed: int
    steps: tuple[float, ...] = ()

    @property
    def step_spread(self) -> float:
        """Largest over smallest of the steps; 1 = all alike."""
        return max(self.steps) / max(min(self.steps), 1e-30) if self.steps else 1.0


class Ranges:
    """Histogram and running maximum of |input| per layer, on the device; per denoise step for layers of the expert."""

    def __init__(self) -> None:
        self._amax: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._steps: dict[str, dict[int, Tensor]] = {}
        self._calls: dict[str, int] = {}
        self._denoising = False

    def begin_prefill(self) -> None:
        """What follows belongs to no denoise step."""
        self._denoising = False

    def begin_denoise(self) -> None:
        """What follows are the steps of one loop: the n-th call of a layer is step n."""
        self._denoising = True
        self._calls.clear()

    def see(self, layer: Linear | QuantisedLinear, x: Tensor) -> None:
        """Take one input of `layer` into account."""
        name, magnitude = layer.name, x.detach().abs()
        largest = magnitude.amax().float()
        self._amax[name] = _larger(self._amax.get(name), largest)
        bins = magnitude.to(torch.bfloat16).view(torch.int16).flatten().int() & (BINS - 1)  # a NaN may carry a sign
        counts = torch.bincount(bins, minlength=BINS)
        self._counts[name] = counts if name not in self._counts else self._counts[name] + counts
        if self._denoising and name.startswith("expert.layers."):
            step = self._calls[name] = self._calls.get(name, -1) + 1
            steps = self._steps.setdefault(name, {})
            steps[step] = _larger(steps.get(step), largest)

    def amax(self) -> dict[str, float]:
        """The largest |input| per layer (synchronises). Raises NumericsError if one is not finite."""
        found = {name: float(value) for name, value in self._amax.items()}
        broken = [name for name, value in found.items() if not value < float("inf")]
        if broken:
            raise NumericsError(
                "activations are not finite while calibrating", got=", ".join(broken[:4]),
                do="run `vivace check` on this checkpoint first",
            )  # fmt: skip
        return found

    def measured(
        self, percentile: float | None = None, *, format_of: Callable[[str], Format] = lambda layer: "e4m3"
    ) -> dict[str, LayerRange]:
        """Every layer's range: its amax, or the smallest bin edge that holds `percentile` per cent of its values.

        format_of  a plan's, for what would become zero; default: E4M3 everywhere
        """
        table = {}
        for name, amax in self.amax().items():
            counts = self._counts[name].cpu()
            chosen = amax if percentile is None else min(amax, _percentile(counts, percentile))
            steps = self._steps.get(name, {})
            table[name] = LayerRange(
                layer=name, amax=amax, chosen=chosen, values=int(counts.sum()), saturated=_above(counts, chosen),
                flushed=_flushed(counts, chosen * HALF_STEPS[format_of(name)]),
                steps=tuple(float(steps[index]) for index in sorted(steps)),
            )  # fmt: skip
        return table


def observing(ops: OpTable, ranges: Ranges) -> OpTable:
    """`ops`, with every linear's input shown to `ranges` first."""

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, layer: Linear | QuantisedLinear, *rest: Any) -> Any:
            ranges.see(layer, x)
            return operation(x, layer, *rest)

        return call

    return replace(ops, **{name: watched(getattr(ops, name)) for name in READERS})


@contextmanager
def watch(model: HasOps) -> Iterator[Ranges]:
    """Collect ranges from everything that `model` computes inside the block."""
    ranges, before = Ranges(), model.ops
    model.ops = observing(before, ranges)
    try:
        yield ranges
    finally:
        model.ops = before


def with_ranges(
    plan: PrecisionPlan, ranges: Ranges, *, data: str, checkpoint_hash: str = "", data_hash: str = "",
    percentile: float | None = None,
) -> PrecisionPlan:  # fmt: skip
    """`plan` with the ranges of the layers that it quantises.

    data        where the observations come from, stored in the plan; data_hash: of what they contain
    percentile  of |x| that does not saturate; None = the largest value seen. One scale serves all denoise steps, so the
                largest step decides, unless the plan wants a scale per step
    """
    return from_measured(
        plan, ranges.measured(percentile, format_of=plan.format_of), data=data,
        checkpoint_hash=checkpoint_hash, data_hash=data_hash,
        method="amax" if percentile is None else f"percentile {percentile:g}",
    )  # fmt: skip


def from_measured(
    plan: PrecisionPlan,
    table: Mapping[str, LayerRange],
    *,
    data: str,
    checkpoint_hash: str,
    data_hash: str,
    method: str,
) -> PrecisionPlan:
    """`plan` with the chosen ranges of `table`, for the layers that it quantises; per step where it says so."""
    rows = {name: row for name, row in table.items() if plan.quantises(name) and row.chosen > 0.0}
    steps = {
        name: tuple(min(one, row.chosen) for one in row.steps)
        for name, row in rows.items()
        if plan.input_scale_of(name) == "step" and row.steps and min(row.steps) > 0.0
    }
    return replace(
        plan, amax={name: row.chosen for name, row in rows.items()}, step_amax=steps, data=data,
        checkpoint_hash=checkpoint_hash, data_hash=data_hash, method=method,
    )  # fmt: skip


def _larger(known: Tensor | None, value: Tensor) -> Tensor:
    return value if known is None else torch.maximum(known, value)


def _edges() -> Tensor:
    """The positive bfloat16 numbers, ascending, float64 [BINS]; infinities and NaN come last."""
    return torch.arange(BINS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()


def _percentile(counts: Tensor, percentile: float) -> float:
    reached = counts.double().cumsum(0) >= counts.sum().double() * (percentile / 100.0)
    return float(_edges()[int(reached.to(torch.uint8).argmax())])


def _above(counts: Tensor, limit: float) -> int:
    """How many values lie above `limit`; float32 values are counted as the bfloat16 numbers nearest to them."""
    return int(counts[_edges() > max(limit, float(torch.tensor(limit).bfloat16()))].sum())


def _flushed(counts: Tensor, limit: float) -> int:
    edges = _edges()
    return int(counts[(edges > 0.0) & (edges <= limit)].sum())
