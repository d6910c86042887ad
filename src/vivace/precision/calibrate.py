"""Measures the activation ranges that a plan's static scales need: the largest |input| of every linear.

    with watch(model) as ranges:
        for inputs, noise in observations:              # any backend that runs the model's own operations; eager does
            backend.denoise(backend.prefill(inputs), noise)
    plan = with_ranges(preset("fp8-all"), ranges, data="episodes/kitchen 0..31", checkpoint_hash=...)

The model is not touched: for the time of the block it is given an operation table that looks at what each linear reads
and then does what the table below it does. Ranges stay on the device until the end, so nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.layers import Fp8Linear, Linear
from ..ops.table import OpTable
from .plan import PrecisionPlan

READERS = ("linear", "linear_gelu", "linear_residual_norm", "geglu", "qkv_rope", "kv_rope")


class HasOps(Protocol):
    """A model that runs whatever operation table it holds."""

    ops: OpTable


class Ranges:
    """Running maximum of |input| per layer name, float32 scalars on the device."""

    def __init__(self) -> None:
        self._amax: dict[str, Tensor] = {}

    def see(self, layer: Linear | Fp8Linear, x: Tensor) -> None:
        """Take one input of `layer` into account."""
        largest = x.detach().abs().amax().float()
        known = self._amax.get(layer.name)
        self._amax[layer.name] = largest if known is None else torch.maximum(known, largest)

    def amax(self) -> dict[str, float]:
        """The ranges as host numbers (synchronises)."""
        return {name: float(value) for name, value in self._amax.items()}


def observing(ops: OpTable, ranges: Ranges) -> OpTable:
    """`ops`, with every linear's input shown to `ranges` first."""

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, layer: Linear | Fp8Linear, *rest: Any) -> Any:
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
    plan: PrecisionPlan, ranges: Ranges, *, data: str, checkpoint_hash: str = "", headroom: float = 1.0
) -> PrecisionPlan:
    """`plan` with the ranges of the layers that it quantises.

    data      where the observations come from, stored in the plan
    headroom  factor on every range; above 1 trades resolution for fewer saturated outliers
    """
    amax = {name: value * headroom for name, value in ranges.amax().items() if plan.quantises(name)}
    return replace(plan, amax=amax, data=data, checkpoint_hash=checkpoint_hash)
