"""The phases of the full-size benchmark, each a function of one `Run`; every row is written to the file at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import hopper_estimate, hopper_machine, hopper_proof, hopper_soak, targets
from .hopper_engines import Engine, policy_of
from .hopper_rivals import rivals
from .hopper_run import Run, guarded, name_of
from .hopper_timing import rows
from .targets import Size


def accuracy(run: Run) -> None:
    """Final actions of every engine, headline plans first; ours answer as they are timed, with one call of `infer`."""
    o = run.options
    wanted = [(size, plan) for size in o.sizes for plan in run.measured(size)]
    for size, plan in sorted(wanted, key=lambda one: not o.is_headline(name_of(one[1]))):
        name = name_of(plan)
        count = o.observations if o.is_headline(name) else min(o.few_observations, o.observations)
        if run.late(
            "accuracy", f"{size.name} {name}", needs_s=count * (o.draws + hopper_estimate.WAYS) * hopper_estimate.CALL_S
        ):
            continue
        with guarded(run, "accuracy", f"{size.name} {name}"):
            _accuracy(run, size, run.engine(plan, size), count)


def _accuracy(run: Run, size: Size, engine: Engine, count: int) -> None:
    samples, truth = run.held_out(size).first(count), run.truth[size.name][:count]
    plain = hopper_proof.scores(run.plain[size.name][:count], truth)
    row = hopper_proof.accuracy_row(size, engine, hopper_proof.actions_of(engine, samples), truth, plain)
    row["infer_is_two_calls"] = hopper_proof.two_calls(engine, samples)
    row["targets"] = [*row["targets"], targets.of_two_calls(**row["infer_is_two_calls"])]
    run.add("accuracy", row)
    run.tell(f"accuracy {size.name} {row['precision']}: cosine mean {row['cosine_mean']:.5f} "
             f"worst {row['cosine_worst']:.5f}, relative L2 {row['rel_l2']:.4f} "
             f"(plain bfloat16 {plain['rel_l2']:.4f})")  # fmt: skip


def soak(run: Run) -> None:
    """Ten thousand calls of the headline engine in the first setting, a tenth of them through the policy."""
    o, size = run.options, run.options.sizes[0]
    if run.late("soak", size.name, needs_s=hopper_estimate.seconds(o, ["soak"])["soak"]):
        return
    with guarded(run, "soak", size.name):
        engine, samples = run.headline(size)[-1], run.held_out(size)
        work = hopper_soak.work_of(engine, samples.inputs[0], samples.noise[0, :1])
        if size.prompt_tokens:
            policy, one = policy_of(engine, size, run.pipe(size), run.checkpoint), run.request(size)
            work = work.with_policy(lambda: policy.infer(one).actions_normalized)
        row = hopper_soak.soak_row(size, engine, work, calls=o.soak_calls)
        run.add("soak", row)
        run.tell(f"soak: p50 {row['latency'].p50_ms:.3f}, p99 {row['latency'].p99_ms:.3f}, {row['targets']}")


def proof(run: Run) -> None:
    """Freshness and poisoned memory; last of those that share engines: one that does not stand poison is broken by it."""
    for size in run.options.sizes:
        if run.late("proof", size.name, needs_s=hopper_estimate.FIXED_S["proof"]):
            continue
        samples = run.held_out(size)
        for engine in run.headline(size):
            with guarded(run, "proof", f"{size.name} {engine.name}"):
                inputs, drawn = samples.inputs[0], samples.noise[0, :1]
                row: dict[str, Any] = {"setting": size.name, "engine": engine.name}
                row["fresh"] = hopper_proof.fresh(engine, inputs, drawn)
                if size.prompt_tokens:
                    policy = policy_of(engine, size, run.pipe(size), run.checkpoint)
                    row["fresh_policy"] = hopper_proof.fresh_policy(policy, run.request(size), drawn[0].cpu().numpy())
                # chunking has graphs of its own, which take seconds to capture
                chunking = hopper_proof.CHUNKING if size == run.options.sizes[0] else ()
                row["poisoned"] = hopper_proof.poisoned(engine, inputs, drawn, chunking=chunking)
                row["targets"] = targets.of_proof(row)
                row["passed"] = all(one.must_met for one in row["targets"])
                run.add("proof", row)
                run.tell(f"proof {size.name} {engine.name}: {'passed' if row['passed'] else row}")


def memory(run: Run) -> None:
    """What one plan alone keeps on the device, in a process of its own; everything here is let go first."""
    run.drop_networks()
    for plan in (one for one in run.plans if one is None or one.name == run.options.headline):
        if run.late("memory", name_of(plan), needs_s=hopper_estimate.FIXED_S["memory"]):
            continue
        with guarded(run, "memory", name_of(plan)):
            o = run.options
            row = hopper_machine.memory_row(
                o.sizes[0], plan, seed=o.seed, outliers=o.outliers, timeout_s=max(30.0, run.left_s)
            )
            run.add("memory", row)
            run.tell(f"memory {row['engine']}: {row['ratio']:.3f} of weights + K,V reserved "
                     f"({row['peak_reserved_bytes'] / 1e9:.2f} GB), {row['ratio_allocated']:.3f} allocated")  # fmt: skip


def start(run: Run) -> None:
    """Cold and warm start of the headline plan in processes of their own."""
    run.drop_networks()
    o = run.options
    if run.late("start", o.headline, needs_s=hopper_estimate.FIXED_S["start"]):
        return
    plan = next((one for one in run.plans if one is not None and one.name == o.headline), None)
    with guarded(run, "start", o.headline):
        timeout_s = max(30.0, run.left_s)
        for row in hopper_machine.start_rows(o.sizes[0], plan, seed=o.seed, outliers=o.outliers, timeout_s=timeout_s):
            run.add("start", row)
            run.tell(f"start {row['caches']}: first action after {row['first_action_s']:.1f} s, "
                     f"every bucket after {row['every_bucket_s']:.1f} s")  # fmt: skip


PHASES: dict[str, Callable[[Run], None]] = {
    "rows": rows, "accuracy": accuracy, "rivals": rivals, "soak": soak, "proof": proof,
    "memory": memory, "start": start,
}  # fmt: skip
"""In the order in which they run. Those after "proof" need the device for themselves."""
