"""What really ran: layer x operation -> kernel, precision, share of the work, and what fell back from the plan.

    seen = Coverage(kernel="eager")
    model.ops = seen.wrap(model.ops)          # looks at what each operation is given, then does what it did before
    ... one inference ...
    rows(seen, steps=10, plan=plan, layers=names)

A plan says what was asked for; this says what the dispatch was handed: the format of the weights that reached an operation,
and the kernel that took the call (kernels report themselves through `Coverage.record`; a call that none reported ran as
`kernel`). A captured graph replays what was dispatched while it was captured, so looking then is looking at every replay.

Counted per call: 2 operations per multiply-add of every matrix product, and the bytes of weights, inputs and result. Calls
of the action expert count once per denoise step; pi0's single state token is not counted. Where the end of a step and the
beginning of the next are one operation, it counts between steps, and the two products in it once before and once after, so
`action_in` and `action_out` count once per step either way. Shares are of one inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..ops.layers import Linear, QuantisedLinear
from ..ops.table import OpTable
from .plan import PrecisionPlan

IN_THE_LOOP = ("expert.layers.", "expert.norm", "action_")
LINEARS = (
    "patch_embed",
    "linear",
    "linear_gelu",
    "linear_residual_norm",
    "geglu",
    "qkv_rope",
    "kv_rope",
    "step_boundary",
)
NORMS = ("layer_norm", "rms_norm")
E4M3 = "e4m3"
BOUNDARY = "step_boundary"
NEVER_RAN = "none"
"""Kernel of a layer that the plan quantises and that was not seen."""


@dataclass
class Seen:
    """Everything noticed about one operation of one layer; work is that of the latest call."""

    kernels: set[str] = field(default_factory=set)
    precisions: set[str] = field(default_factory=set)
    calls: int = 0
    flops: float = 0.0
    moved_bytes: float = 0.0


@dataclass(frozen=True)
class Row:
    """One row of the table.  Shares are in [0, 1]; fallback is "" or why the layer did not run as the plan says."""

    layer: str
    operation: str
    kernel: str
    precision: str
    flops_share: float
    bytes_share: float
    fallback: str = ""


@dataclass(frozen=True)
class RecordedOps(OpTable):
    """An operation table that writes down what it runs."""

    coverage: Coverage


class Coverage:
    """Collects what operations ran.  kernel: the name of calls that no kernel reported."""

    def __init__(self, *, kernel: str) -> None:
        self.kernel = kernel
        self.kernels: dict[str, str] = {}
        self.seen: dict[tuple[str, str], Seen] = {}
        self._reported: list[str] = []

    def record(self, layer: str, operation: str, kernel: str) -> None:
        """A kernel's own report: it was launched for this operation of this layer."""
        self.kernels[f"{layer} {operation}"] = kernel
        self._reported.append(kernel)

    def clear(self) -> None:
        """Forget everything seen so far."""
        self.kernels.clear()
        self.seen.clear()

    def wrap(self, ops: OpTable) -> RecordedOps:
        """`ops`, watched."""
        watched = {one.name: self._watched(one.name, getattr(ops, one.name)) for one in fields(OpTable)}
        return RecordedOps(**watched, coverage=self)

    def _watched(self, operation: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._reported.clear()
            result = run(*arguments)
            self._add(operation, arguments, result)
            return result

        return call

    def _add(self, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        layer, precision, flops = _facts(operation, arguments, result)
        entry = self.seen.setdefault((layer, operation), Seen())
        entry.kernels |= set(self._reported) or {self.kernel}
        entry.precisions.add(precision)
        entry.calls += 1
        entry.flops, entry.moved_bytes = flops, _bytes((*arguments, result))


def rows(
    seen: Coverage, *, steps: int, plan: PrecisionPlan | None = None, layers: Iterable[str] = ()
) -> tuple[Row, ...]:
    """The table, in the order in which things first ran.

    steps   denoise steps of one inference
    plan    what was asked for; None = no layer was to be quantised
    layers  names of all linears of the network: one that the plan quantises and that never ran is a fallback too
    """
    work = _work(seen, steps)
    flops = sum(entry.flops * work[key] for key, entry in seen.seen.items()) or 1.0
    moved = sum(entry.moved_bytes * work[key] for key, entry in seen.seen.items()) or 1.0
    found = [
        Row(
            layer=layer, operation=operation,
            kernel=" + ".join(sorted(entry.kernels)), precision=" + ".join(sorted(entry.precisions)),
            flops_share=entry.flops * work[layer, operation] / flops,
            bytes_share=entry.moved_bytes * work[layer, operation] / moved,
            fallback=_fallback(layer, operation, entry, plan),
        )
        for (layer, operation), entry in seen.seen.items()
    ]  # fmt: skip
    ran = {layer for layer, operation in seen.seen if operation in LINEARS}
    silent = [name for name in layers if plan is not None and plan.quantises(name) and name not in ran]
    return (
        *found,
        *(
            Row(name, "linear", NEVER_RAN, "none", 0.0, 0.0, f"the plan says {plan.format_of(name)}, it never ran")
            for name in silent
            if plan is not None
        ),
    )


def fallbacks(table: Sequence[Row]) -> list[str]:
    """One line per row that fell back."""
    return [f"{row.layer} {row.operation}: {row.fallback}" for row in table if row.fallback]


def layer_flops(seen: Coverage, *, steps: int) -> dict[str, float]:
    """{layer: operations of its matrix product in one inference}; attention belongs to no linear."""
    found: dict[str, float] = {}
    for key, times in _work(seen, steps).items():
        layer, operation = key
        if operation in LINEARS:
            found[layer] = found.get(layer, 0.0) + seen.seen[key].flops * times
    return found


def summary(table: Sequence[Row]) -> dict[str, Any]:
    """In a few numbers: shares of FLOPs and bytes per precision and per kernel, and every fallback."""

    def shares(key: str, of: str) -> dict[str, float]:
        total: dict[str, float] = {}
        for row in table:
            name = getattr(row, key)
            total[name] = total.get(name, 0.0) + getattr(row, of)
        return {name: round(share, 4) for name, share in sorted(total.items()) if share > 0.0}

    return {
        "operations": len(table),
        "flops_by_precision": shares("precision", "flops_share"),
        "flops_by_kernel": shares("kernel", "flops_share"),
        "bytes_by_precision": shares("precision", "bytes_share"),
        "bytes_by_kernel": shares("kernel", "bytes_share"),
        "fallbacks": fallbacks(table),
    }


def grouped(table: Sequence[Row]) -> list[dict[str, Any]]:
    """Layers that ran alike as one row, for people: part, operation, layers (how many), kernel, precision, shares."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in table:
        stack, _, rest = row.layer.partition(".layers.")
        part = f"{stack} {rest.partition('.')[2]}" if rest else row.layer
        groups.setdefault((part, row.operation, row.kernel, row.precision, row.fallback), []).append(row)
    return [
        {
            "part": part, "operation": operation, "layers": len(members), "kernel": kernel, "precision": precision,
            "flops_share": sum(row.flops_share for row in members),
            "bytes_share": sum(row.bytes_share for row in members), "fallback": fallback,
        }
        for (part, operation, kernel, precision, fallback), members in groups.items()
    ]  # fmt: skip


def _fallback(layer: str, operation: str, entry: Seen, plan: PrecisionPlan | None) -> str:
    if plan is None or operation not in LINEARS or not plan.quantises(layer):
        return ""
    wanted = plan.format_of(layer)
    others = sorted(entry.precisions - {wanted})
    return f"the plan says {wanted}, it ran in {', '.join(others)}" if others else ""


def _work(seen: Coverage, steps: int) -> dict[tuple[str, str], int]:
    """How often each operation runs in one inference."""
    joined = any(operation == BOUNDARY for _, operation in seen.seen)

    def times(layer: str, operation: str) -> int:
        if joined and layer.startswith("action_"):
            return steps - 1 if operation == BOUNDARY else 1
        return steps if layer.startswith(IN_THE_LOOP) else 1

    return {key: times(*key) for key in seen.seen}


def _facts(operation: str, arguments: tuple[Any, ...], result: Any) -> tuple[str, str, float]:
    """(layer name, precision, operations of the matrix product) of one call."""
    if operation in LINEARS:
        layer: Linear | QuantisedLinear = arguments[1]
        out, inside = layer.weight.shape
        tokens = result.numel() // out if operation == "patch_embed" else arguments[0].numel() // inside
        if operation == BOUNDARY:  # action_out of this step, action_in of the next
            return layer.name, _format(layer.weight), 2.0 * tokens * (out * inside + arguments[4].weight.numel())
        return layer.name, _format(layer.weight), 2.0 * tokens * out * inside
    if operation in NORMS:
        return arguments[1].name, _through(arguments[0], result), 0.0
    if operation == "vision_attention":
        V, T, packed = arguments[0].shape
        return arguments[2].name, _through(arguments[0], result), 4.0 * V * T * T * (packed // 3)
    q, k, past, into = arguments[0], arguments[1], arguments[4], arguments[5]
    keys = k.shape[1] + (0 if past is None else past[0].shape[1])
    return into.name, _through(q, result), 4.0 * q.numel() * keys


def _through(x: Tensor, out: Tensor) -> str:
    """Precision of an operation without weights: that of its input, and the result's if it is stored in another one."""
    inside, outside = _format(x), _format(out)
    return inside if inside == outside else f"{inside} to {outside}"


def _format(tensor: Tensor) -> str:
    return E4M3 if tensor.dtype == torch.float8_e4m3fn else str(tensor.dtype).removeprefix("torch.")


def _bytes(values: Iterable[Any]) -> float:
    """Bytes of every tensor in a call, weights of layers included; a layer that only names a format (`into`) has none."""
    total = 0.0
    values = tuple(values)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, tuple):
            total += _bytes(item for item in value if isinstance(item, Tensor))
        elif isinstance(value, Linear | QuantisedLinear) and index in (1, 4):
            total += value.weight.numel() * value.weight.element_size()
    return total


def as_json(table: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain JSON types, shares with six digits."""
    return [
        {
            "layer": row.layer, "operation": row.operation, "kernel": row.kernel, "precision": row.precision,
            "flops_share": round(row.flops_share, 6), "bytes_share": round(row.bytes_share, 6),
            "fallback": row.fallback,
        }
        for row in table
    ]  # fmt: skip
