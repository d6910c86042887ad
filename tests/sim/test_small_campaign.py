"""The small campaign of every test run: does it catch a policy that is broken in mask, normalisation, prompt or index?

Twice: with the scripted expert, broken where a network would be, and with the policy that comes with vivace.
"""

from __future__ import annotations

import pytest

from vivace.sim.actors import Options
from vivace.sim.arms import EXPERT, Arm
from vivace.sim.campaign import Settings, collect, jobs, run_jobs
from vivace.sim.controls import stored_rate
from vivace.sim.faults import FAULTS
from vivace.sim.statistics import fisher_less

PACKAGED = "conveyor-small"
FAST_BELT = {"task": "conveyor", "belt": "fast"}
"""On the middle one the policy lifts 4 of 8 cubes with actions that are 160 ms late."""


def campaign(policy, episodes, scene):
    """{fault or None: Outcome} on equal seeds."""
    arms = [Arm(**scene, policy=policy, fault=fault) for fault in (None, *sorted(FAULTS))]
    work = jobs(arms, Settings(episodes=episodes, first_seed=900, options=Options(device="cpu")), processes=1)
    found = collect(arms, list(run_jobs(work)))
    return {one.arm.fault: one for one in found}


def assert_caught(found, fault):
    whole, hurt = found[None], found[fault]
    assert hurt.crashes == whole.crashes == 0
    p = fisher_less((hurt.successes, hurt.finished), (whole.successes, whole.finished))
    assert p < 0.01, f"{fault}: {hurt.successes}/{hurt.finished} broken, {whole.successes}/{whole.finished} whole"


@pytest.fixture(scope="module")
def expert():
    return campaign(EXPERT, 10, FAST_BELT)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_broken_expert_is_caught(expert, fault):
    assert_caught(expert, fault)


def test_the_whole_expert_succeeds_and_the_wrong_prompt_takes_the_wrong_cube(expert):
    assert expert[None].outcomes == "S" * 10
    assert expert["prompt"].wrong_object >= 7  # in the others the wrong cube left the belt in time
    assert not any(expert[fault].wrong_object for fault in FAULTS if fault != "prompt")


@pytest.fixture(scope="module")
def packaged():
    return campaign(PACKAGED, 8, FAST_BELT)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_broken_conveyor_small_is_caught(packaged, fault):
    assert_caught(packaged, fault)


def test_conveyor_small_reproduces_its_stored_rate(packaged):
    assert stored_rate(packaged[None]).status == "passed"
