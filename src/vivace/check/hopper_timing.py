"""The phase that times our engines at every boundary. Engines of others, in the same rounds as ours: `hopper_rivals`."""

from __future__ import annotations

import time
from typing import Any

from ..precision.coverage import NEVER_RAN, fallbacks, grouped, summary
from ..runtime.coverage import record
from . import bench, hopper_client, hopper_estimate, hopper_proof, hopper_rows, hopper_served, targets
from .hopper_engines import Engine, policy_of
from .hopper_rows import Timed, answering, on_host, with_copies
from .hopper_run import Run, guarded, name_of
from .targets import Size

BY_TORCH = "torch"
"""What coverage calls an operation that no kernel of ours reported: plain PyTorch, its libraries' products among them."""
STAGE_CALLS = 30
"""Of the stages apart, no more than of the whole."""


def rows(run: Run) -> None:
    """B0 of every setting first, then what a frame costs that reuses the prefix, then B1, B2 and B3."""
    ready: list[tuple[Size, list[Engine], hopper_proof.Samples]] = []
    for size in run.options.sizes:
        if run.late("rows", f"{size.name} B0", needs_s=_needs_s(run, size, run.options.calls)):
            continue
        with guarded(run, "rows", f"{size.name} B0"):
            begin, samples = time.perf_counter(), run.held_out(size)
            engines = [engine for plan in run.measured(size) if (engine := _right(run, size, plan, samples))]
            run.tell(f"rows {size.name}: captured and checked in {time.perf_counter() - begin:.0f} s")
            if engines:
                _replays(run, size, engines, samples)
                ready.append((size, [e for e in engines if run.options.is_headline(e.precision)], samples))
    for size, engines, samples in ready:
        if size.horizon == 50 and not run.late("rows", f"{size.name} B0 reuse"):
            with guarded(run, "rows", f"{size.name} B0 reuse"):
                _reuse(run, size, engines, samples)
    for size, engines, samples in ready:
        if not engines or run.late(
            "rows", f"{size.name} B1, B2 and B3", needs_s=_needs_s(run, size, 4 * run.options.host_calls)
        ):
            continue
        with guarded(run, "rows", f"{size.name} B1, B2 and B3"):
            _host_rows(run, size, engines, samples)


def _needs_s(run: Run, size: Size, calls: int) -> float:
    """About what `calls` of the headline engines take."""
    return calls * len([plan for plan in run.plans if run.options.is_headline(name_of(plan))]) * hopper_estimate.CALL_S


def _right(run: Run, size: Size, plan: Any, samples: hopper_proof.Samples) -> Engine | None:
    """The engine of this plan if its first answer is near float32's; otherwise None, and the result says why."""
    name = name_of(plan)
    with guarded(run, "rows", f"{size.name} {name}"):
        engine = run.engine(plan, size)
        actions = engine.backend.infer(samples.inputs[0], samples.noise[0, :1])
        reason = hopper_rows.wrong(engine, actions[0], run.truth[size.name][0, 0])
        if reason is None:
            _covered(run, size, engine, samples)
            return engine
        run.skip("rows", f"{size.name} {name}", reason)
    return None


def _covered(run: Run, size: Size, engine: Engine, samples: hopper_proof.Samples) -> None:
    """What the graph of this setting is made of, as the dispatch wrote it down while it was captured."""
    policy = policy_of(engine, size, run.pipe(size), run.checkpoint)
    table = record(policy, lambda: engine.backend.infer(samples.inputs[0], samples.noise[0, :1]))
    fell, parts = fallbacks(table), grouped(table)
    by_torch = [f"{row['part']} {row['operation']}" for row in parts if row["kernel"] == BY_TORCH]
    run.add("coverage", {
        "setting": size.name, "engine": engine.name, "precision": engine.precision, "summary": summary(table),
        "parts": parts, "kernels": engine.backend.describe().get("kernels", {}), "by_torch": by_torch,
        "targets": targets.of_coverage(ran=sum(row.kernel != NEVER_RAN for row in table), fell=len(fell)),
    })  # fmt: skip
    run.tell(
        f"coverage {size.name} {engine.name}: {len(fell)} fallbacks, plain torch: {', '.join(by_torch) or 'nothing'}"
    )


def _replays(run: Run, size: Size, engines: list[Engine], samples: hopper_proof.Samples) -> None:
    """B0, with stages and rates; all engines in the same rounds."""
    o, inputs, drawn = run.options, samples.inputs[0], samples.noise[0, :1]
    timed = [
        Timed(
            e,
            e.backend.graph_of(inputs, drawn),
            o.calls if o.is_headline(e.precision) else min(o.few_calls, o.calls),
            judged=o.is_headline(e.precision),
        )
        for e in engines
    ]
    for row, engine in zip(hopper_rows.time_rows(size, "B0", timed), engines, strict=True):
        stages = hopper_rows.stage_ms(engine, inputs, drawn, calls=min(STAGE_CALLS, o.calls))
        row |= {"stages_ms": stages, "rates": hopper_rows.rates(engine, size, stages, run.document["ceilings"])}
        said(run, row)


def _reuse(run: Run, size: Size, engines: list[Engine], samples: hopper_proof.Samples) -> None:
    for engine in engines:
        inputs, drawn = samples.inputs[0], samples.noise[0, :1]
        said(run, hopper_rows.reuse_row(size, engine, inputs, drawn, calls=run.options.reuse_calls))


def _host_rows(run: Run, size: Size, engines: list[Engine], samples: hopper_proof.Samples) -> None:
    """B1, B2 and B3 of the headline engines."""
    calls = run.options.host_calls
    pinned = on_host(samples.inputs[0], samples.noise[0, :1])
    for row in hopper_rows.time_rows(size, "B1", [Timed(e, with_copies(e, *pinned), calls) for e in engines]):
        said(run, row)
    if not size.prompt_tokens:
        run.remark(f"no B2 and B3 for {size.name}: policies refuse a prompt without tokens")
        return
    one = run.request(size)
    policies = [policy_of(engine, size, run.pipe(size), run.checkpoint) for engine in engines]
    timed = [Timed(e, answering(policy, one), calls) for e, policy in zip(engines, policies, strict=True)]
    found = hopper_rows.time_rows(size, "B2", timed)
    replay = {
        row["engine"]: row["latency"]["p50_ms"]
        for row in run.document["rows"]
        if row["boundary"] == "B0" and row["setting"] == size.name
    }
    for row, policy in zip(found, policies, strict=True):
        row["parts_ms"] = hopper_rows.parts_ms(policy, one)
        added = row["latency"].p50_ms - replay[row["engine"]]
        row["targets"] = [targets.at_most("B2 - B0, ms", added, targets.HOST_MS), *row["targets"]]
        said(run, row)
    by_name = {engine.name: policy for engine, policy in zip(engines, policies, strict=True)}
    alone = {name: policy.infer(one).actions for name, policy in by_name.items()}
    inner = {row["engine"]: row["latency"].p50_ms for row in found}
    for client in hopper_client.CLIENTS:
        judged = client == "vivace"  # of openpi's client most of the difference is its own
        if reason := hopper_served.why_not(client):
            run.skip("rows", f"{size.name} {hopper_rows.BOUNDARIES[client]}", reason, informational=not judged)
            continue
        seen = hopper_served.round_trips(
            by_name, one, alone, calls=calls, client=client, timeout_s=max(30.0, run.left_s)
        )
        for engine in engines:
            row = hopper_rows.served_row(size, engine, *seen[engine.name], client=client)
            row["added_ms"] = row["latency"].p50_ms - inner[engine.name]
            if judged:
                mark = targets.at_most("B3 - B2, ms", row["added_ms"], targets.SERVED_MS)
                row["targets"] = [mark, *row["targets"]]
            said(run, row)


def said(run: Run, row: dict[str, Any]) -> None:
    """Store a row of latencies, and say it in one line."""
    run.add("rows", row)
    t: bench.Summary = row["latency"]
    marks = ", ".join(f"{one.what} {'met' if one.must_met else 'MISSED'}" for one in row.get("targets", []))
    what = f"{row['setting']} {row['engine']} {row['boundary']}"
    run.tell(f"{what}: p50 {t.p50_ms:.2f} p95 {t.p95_ms:.2f} p99 {t.p99_ms:.2f} n {t.samples}; {marks}")
