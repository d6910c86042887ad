"""Controls: what a campaign must get right before its other numbers mean anything.

They run on the first arm of every policy and on no other: they say nothing about the other arms' engines and precisions.

    stored rate   the arm reproduces the rate that is stored beside the policy (stored.py), on whatever seeds
    blanked       with black images it fails
    mask          with the image tokens masked it fails, always on the eager backend, which takes every mask, whatever the
                  arm's own is (a served policy: the expert has no mask)
    delay         a delay made longer by 3 ticks moves the reaction to a jump by exactly 3 ticks

A control that cannot be decided (nothing stored, or a policy that never succeeds anyway) is void and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from . import scene
from .arms import EXPERT, Arm, Delay
from .campaign import Block, Job, Settings
from .outcomes import Outcome, letter
from .statistics import fisher, fisher_less
from .stored import read
from .tasks import Task

Status = Literal["passed", "failed", "void"]
LEVEL = 0.01
"""A stored rate that a campaign's rate would miss by chance less often than this is not reproduced."""
INJECTED_TICKS = 3
REACTION = Task("reaction", event="jump", event_ticks=(15, 22), max_ticks=60)
"""At rest, short, the jump in mid-approach."""
REACTION_SEEDS = tuple(range(4))


@dataclass(frozen=True)
class Control:
    """One control and what was found. arm: its place in the result, the first one of its policy; no other is controlled."""

    name: str
    policy: str
    status: Status
    found: str
    numbers: dict[str, Any]
    arm: int = 0


def first_arms(arms: Sequence[Arm]) -> dict[str, int]:
    """{policy: place of its first arm}; that one is controlled."""
    places: dict[str, int] = {}
    for i, arm in enumerate(arms):
        places.setdefault(arm.policy, i)
    return places


def control_jobs(arms: Sequence[Arm], settings: Settings, *, episodes: int) -> list[Job]:
    """Blocks of all controls. Their index is that of the controlled arm; the arm's fault and delay tell them apart."""
    work = []
    for policy, place in first_arms(arms).items():
        arm, seeds = arms[place], tuple(settings.seeds[:episodes])
        faults = ("blanked",) if policy == EXPERT else ("blanked", "mask")
        for fault in faults:
            work.append(Job(place, replace(arm, fault=fault), seeds, options=settings.options))
        for injected in (0, min(INJECTED_TICKS, arm.execute_ticks)):
            probe = probe_arm(arm, injected)
            work.append(
                Job(place, probe, REACTION_SEEDS, twins=len(REACTION_SEEDS), options=settings.options, task=REACTION)
            )
    return work


def probe_arm(arm: Arm, injected: int) -> Arm:
    """The arm with a fixed delay; pause becomes aligned, because a pausing robot's looks move with the delay."""
    mode = "aligned" if arm.mode == "pause" else arm.mode
    return replace(arm, task="perturb", belt="off", mode=mode, committed=False, delay=Delay(f"{injected}", (injected,)))


def judge(
    outcomes: Sequence[Outcome], work: Sequence[Job], blocks: Sequence[Block], settings: Settings
) -> list[Control]:
    """What the control blocks say, in the order of `control_jobs`."""
    found: list[Control] = []
    for policy, place in first_arms([one.arm for one in outcomes]).items():
        ours = [stored_rate(outcomes[place])]
        mine = [(job, block) for job, block in zip(work, blocks, strict=True) if job.index == place]
        for job, block in mine:
            if job.arm.fault is not None:
                ours.append(must_fail(job.arm.fault, outcomes[place], block))
        if policy == EXPERT:
            ours.append(Control("mask", policy, "void", "the expert has no attention mask", {}))
        probes = [(job.arm.delay.ticks[0], block) for job, block in mine if job.task is not None]
        ours.append(delay_moves(policy, probes[0], probes[1]))
        found += [replace(one, arm=place) for one in ours]
    return found


def stored_rate(one: Outcome) -> Control:
    """Fisher's exact test of the arm's rate against the stored one."""
    policy = one.arm.policy
    steps = (one.engine or {}).get("num_denoise_steps")
    rate = next((rate for rate in read(policy).rates if rate.fits(one.arm, steps=steps)), None)
    if rate is None:
        return Control("stored rate", policy, "void", "no rate is stored for these conditions", {})
    if not one.finished:
        return Control("stored rate", policy, "failed", "every episode crashed", {})
    p = fisher((one.successes, one.finished), (rate.successes, rate.n))
    numbers = {"here": [one.successes, one.finished], "stored": [rate.successes, rate.n], "p": p}
    other = rate.scene_sha256 not in ("", scene.scene_sha256())
    note = "; stored for another scene" if other else ""
    found = f"{one.successes}/{one.finished} here, {rate.successes}/{rate.n} stored (p = {p:.2g}){note}"
    return Control("stored rate", policy, "passed" if p >= LEVEL and not other else "failed", found, numbers)


def must_fail(fault: str, whole: Outcome, block: Block) -> Control:
    """The broken policy's success must be lower, one-sided Fisher at 5 %. It has to act for that: a crash shows nothing."""
    policy, letters = whole.arm.policy, "".join(letter(row) for row in block.rows)
    n, successes = len(letters), letters.count("S")
    where = " on the eager backend" if fault == "mask" else ""
    numbers: dict[str, Any] = {"broken": [successes, n], "whole": [whole.successes, whole.finished]}
    if crashes := [str(row["crash"]) for row in block.rows if row["crash"] is not None]:
        found = f"{len(crashes)} of {n} episodes of the broken policy crashed{where}: {crashes[0]}"
        return Control(fault, policy, "failed", found, {"crashes": len(crashes)})
    said = f"{successes}/{n} broken{where}, {whole.successes}/{whole.finished} whole"
    if not whole.finished or fisher_less((0, n), (whole.successes, whole.finished)) >= 0.05:
        why = "the whole policy succeeds too rarely, or there are too few episodes, to tell"
        return Control(fault, policy, "void", f"{said}: {why}", numbers)
    p = fisher_less((successes, n), (whole.successes, whole.finished))
    return Control(fault, policy, "passed" if p < 0.05 else "failed", f"{said} (p = {p:.2g})", {**numbers, "p": p})


def delay_moves(policy: str, none: tuple[int, Block], longer: tuple[int, Block]) -> Control:
    """Seed by seed, the longer delay's reaction minus the other's must be the difference of the delays."""
    injected = longer[0] - none[0]
    both = [
        (a["reaction"]["ticks"], b["reaction"]["ticks"])
        for a, b in zip(none[1].rows, longer[1].rows, strict=True)
        if a.get("reaction") and b.get("reaction")
    ]
    numbers = {"injected_ticks": injected, "reactions": [list(pair) for pair in both]}
    moved = [None if None in pair else pair[1] - pair[0] for pair in both]
    if not both:
        return Control("delay", policy, "failed", "no episode lived to see the jump", numbers)
    found = f"{injected} ticks injected, reaction moved by {moved}"
    return Control("delay", policy, "passed" if all(m == injected for m in moved) else "failed", found, numbers)
