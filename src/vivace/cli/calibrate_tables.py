"""What `vivace calibrate` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from .output import console

if TYPE_CHECKING:
    from ..precision.calibrate import LayerRange
    from ..precision.sensitivity import Alone

SHOWN = 24


def show(name: str, quantised: Sequence[LayerRange], rows: Sequence[Alone], body: Mapping[str, Any]) -> None:
    """Print the layers' ranges, each layer alone in 8 bits if that was measured (`rows`), the mixed plan, and remarks.

    name  of the plan that was measured; body: of the result, see `cli.calibrate.run`
    """
    ordered = sorted(quantised, key=lambda row: (-row.saturated / row.values, -row.flushed / row.values))
    shown = f"{min(SHOWN, len(ordered))} of {len(ordered)} layers, most saturated first"
    table = Table(title=escape(f"{name}, {body['observations']['source']}"), caption=shown)
    for head in ("layer", "largest |x|", "range", "saturated", "flushed to 0", "steps max/min"):
        table.add_column(head, justify="left" if head == "layer" else "right", no_wrap=True)
    for row in ordered[:SHOWN]:
        spread = f"{row.step_spread:.2f}" if row.steps else ""
        parts = f"{row.saturated / row.values:.2e}", f"{row.flushed / row.values:.2e}"
        table.add_row(row.layer, f"{row.amax:.4g}", f"{row.chosen:.4g}", *parts, spread)
    console.print(table)
    if rows:
        _show_alone(rows)
    if "mixed" in body:
        mixed, held = body["mixed"], body["mixed"]["held_out"]
        left_out = ", ".join(row.layer for row in mixed["left_out"]) or "nothing"
        console.print(
            f"{mixed['flops_share']:.1%} of the FLOPs of {escape(name)} run in 8 bits; "
            f"action error {held.rel_l2:.2e}, cosine {held.cosine:.6f} "
            f"on {mixed['held_out_observations']} held-out observations (bound {mixed['max_action_error']:g}); "
            f"left out: {left_out}",
            highlight=False,
        )
    for remark in body["remarks"]:
        console.print(escape(remark), style="yellow", highlight=False)


def _show_alone(rows: Sequence[Alone]) -> None:
    table = Table(title="each layer alone in 8 bits: error of the actions", caption=f"worst first, {len(rows)} layers")
    for head in ("layer", "relative L2", "cosine", "share of 8-bit FLOPs"):
        table.add_column(head, justify="left" if head == "layer" else "right", no_wrap=True)
    total = sum(row.flops for row in rows) or 1.0
    for row in rows[:SHOWN]:
        cells = f"{row.score.rel_l2:.2e}", f"{row.score.cosine:.7f}", f"{row.flops / total:.2%}"
        table.add_row(row.layer, *cells)
    console.print(table)
