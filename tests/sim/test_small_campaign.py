"""The small campaign of every test run: does it catch a policy that is broken in mask, normalisation, prompt or index?

Today the policy is the scripted expert, broken where a network would be. The packaged policy takes part as soon as it is
there: put it at PACKAGED, and the last tests run with it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import vivace
from vivace.sim.actors import Options
from vivace.sim.arms import EXPERT, Arm
from vivace.sim.campaign import Settings, collect, jobs, run_jobs
from vivace.sim.controls import stored_rate
from vivace.sim.faults import FAULTS
from vivace.sim.statistics import fisher_less

PACKAGED = Path(vivace.__file__).parent / "policies" / "conveyor-small"
needs_packaged = pytest.mark.skipif(not PACKAGED.is_dir(), reason=f"the packaged policy is not there yet: {PACKAGED}")
SLOW_BELT = {"task": "conveyor", "belt": "slow"}
FAST_BELT = {"task": "conveyor", "belt": "fast"}


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
    return campaign(str(PACKAGED), 12, SLOW_BELT)


@needs_packaged
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_broken_conveyor_small_is_caught(packaged, fault):
    assert_caught(packaged, fault)


@needs_packaged
def test_conveyor_small_reproduces_its_stored_rate(packaged):
    assert stored_rate(packaged[None]).status == "passed"
