"""Delays and latency files, what a policy stores about itself, and who is told the committed actions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vivace.errors import ConfigError
from vivace.sim import stored
from vivace.sim.arms import Arm, Delay, delays, references
from vivace.sim.latency import read_latencies


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "latency.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


BENCH = {
    "kind": "bench",
    "engines": {name: {"samples": {"total_ms": [ms, ms + 1]}} for name, ms in (("a", 5), ("b:x", 90))},
}


@pytest.mark.parametrize(
    ("content", "engine", "wanted"),
    [
        ([71, 95.5], "", (71.0, 95.5)),
        ({"samples_ms": [40.0]}, "", (40.0,)),
        (BENCH, "#b:x", (90.0, 91.0)),
        ({"engines": {"only": {"samples": {"total_ms": [3.0]}}}}, "", (3.0,)),
    ],
)
def test_latency_files_of_every_kind(file, content, engine, wanted):
    given = file(content) + engine
    read = read_latencies(given)
    assert (read.name, read.milliseconds) == (given, wanted)


@pytest.mark.parametrize(
    ("content", "engine", "message"),
    [
        ([], "", "no latencies"),
        ({"ms": [1]}, "", "no latencies"),
        ("{", "", "cannot read latencies"),
        ([10, -1], "", "got -1"),
        ([10, "nan"], "", "got 'nan'"),
        ([10, float("nan")], "", "got nan"),
        ([1e9], "", "below a minute"),
        (BENCH, "", "none named"),
        (BENCH, "#c", r"#one of \['a', 'b:x'\]"),
        ([10], "#a", "has no engines"),
    ],
)
def test_bad_latency_files_are_named(file, content, engine, message):
    with pytest.raises(ConfigError, match=message):
        read_latencies(file(content) + engine)


def test_delays_are_rounded_up_to_ticks_and_stored_as_counts(file):
    fixed, drawn = delays([50.0], [read_latencies(file([20.0, 20.1, 39.0]))])
    assert (fixed.name, fixed.ticks) == ("50 ms", (3,))
    assert drawn.ticks == (1, 2, 2)
    assert Arm("static", delay=drawn).named()["delay"]["ticks"] == {"1": 1, "2": 2}
    assert delays([0.0, 40.0], measured=True)[1] == Delay("real clock + 40 ms", (2,), measured=True)


def test_references_are_the_first_of_their_scene():
    arms = [
        Arm("static"),
        Arm("conveyor", "slow"),
        Arm("static", mode="naive"),
        Arm("conveyor", "fast"),
        Arm("conveyor", "slow"),
    ]
    assert references(arms) == [0, 1, 0, 3, 1]


# --- simulation.json ------------------------------------------------------------------------------------------------


def test_rates_are_stored_beside_the_policy_and_other_keys_stay(tmp_path):
    policy, file = str(tmp_path), tmp_path / "simulation.json"
    file.write_text(json.dumps({"schema": 1, "image_px": 64, "made_by": "recipe 3"}))
    stored.write_rates(policy, (stored.Rate("static", 80, 100), stored.Rate("conveyor", 70, 100)))
    stored.write_rates(policy, (stored.Rate("static", 90, 100),))
    read = stored.read(policy)
    assert read.image_px == 64
    assert sorted((rate.task, rate.successes) for rate in read.rates) == [("conveyor", 70), ("static", 90)]
    assert json.loads(file.read_text())["made_by"] == "recipe 3"


def test_a_rate_is_not_replaced_by_less(tmp_path):
    policy = str(tmp_path)
    stored.write_rates(policy, (stored.Rate("static", 80, 100),))
    for rates, message in (
        ((stored.Rate("static", 81, 99),), "at least 100"),
        ((stored.Rate("conveyor", 49, 49),), "at least 50"),
        ((stored.Rate("conveyor", 0, 0),), "at least 50"),
        ((stored.Rate("swap", 60, 60, steps=1), stored.Rate("swap", 60, 60, steps=5)), "same conditions"),
    ):
        with pytest.raises(ConfigError, match=message):
            stored.write_rates(policy, rates)
    assert stored.read(policy).rates == (stored.Rate("static", 80, 100),)
    with pytest.raises(ConfigError, match="beside a policy"):
        stored.write_rates("expert", (stored.Rate("static", 80, 100),))


def test_a_rate_says_what_ran_and_fits_its_steps_only(tmp_path):
    arm = Arm("static", policy=str(tmp_path))
    ran = {"num_denoise_steps": 5, "backend": "eager", "precision": "bfloat16"}
    rate = stored.rate_of(arm, successes=40, n=50, first_seed=900, engine=ran)
    assert (rate.steps, rate.engine, rate.precision, rate.first_seed) == (5, "eager", "bfloat16", 900)
    stored.write_rates(arm.policy, (rate,))
    assert stored.read(arm.policy).rates == (rate,)
    assert rate.fits(arm, steps=5)
    assert rate.fits(arm)
    assert not rate.fits(arm, steps=1)
    assert stored.Rate("static", 40, 50).fits(arm, steps=1)  # an older file does not say


def test_a_rate_fits_its_own_conditions_only():
    rate = stored.Rate("static", 80, 100)
    assert rate.fits(Arm("static", engine="compiled", precision="bfloat16"))
    for other in (Arm("conveyor"), Arm("static", "slow"), Arm("static", mode="naive"), Arm("static", fault="mask"),
                  Arm("static", delay=Delay("", (1,))), Arm("static", delay=Delay("", (0,), measured=True))):  # fmt: skip
        assert not rate.fits(other)


def test_a_belt_that_is_the_tasks_own_is_no_other_condition(tmp_path):
    own, named = stored.Rate("conveyor", 80, 100), stored.Rate("conveyor", 90, 100, belt="slow")
    assert own.fits(Arm("conveyor", "slow"))
    assert named.fits(Arm("conveyor"))
    assert not named.fits(Arm("conveyor", "middle"))
    assert stored.Rate("static", 80, 100).fits(Arm("static", "off"))
    with pytest.raises(ConfigError, match="unknown belt speed 'warp'"):
        stored.Rate("conveyor", 80, 100, belt="warp").fits(Arm("conveyor"))
    stored.write_rates(str(tmp_path), (own,))
    stored.write_rates(str(tmp_path), (named,))
    assert stored.read(str(tmp_path)).rates == (named,), "one rate for one condition"


def test_the_experts_rates_are_those_of_its_result():
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "conveyor-tasks-expert-2026-11-25.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    found = {rate.task: rate for rate in stored.expert().rates}
    assert {arm["arm"]["task"] for arm in document["arms"]} == set(found)
    for arm in document["arms"]:
        rate = found[arm["arm"]["task"]]
        assert (rate.successes, rate.n, rate.first_seed) == (arm["successes"], arm["n"], document["seeds"]["first"])
        assert (rate.scene_sha256, rate.mujoco) == tuple(
            document["simulator"][key] for key in ("scene_sha256", "mujoco")
        )


@pytest.mark.parametrize("content", ["[1]", "{", '{"schema": 2}', '{"rates": [{"tusk": 1}]}', '{"image_px": "64"}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "simulation.json").write_text(content)
    with pytest.raises(ConfigError, match=r"simulation\.json"):
        stored.read(str(tmp_path))


def test_committed_actions_are_told_where_they_were_trained(tmp_path):
    (tmp_path / "simulation.json").write_text(json.dumps({"committed_max_ticks": 5}))
    policy = str(tmp_path)
    arms = [Arm("static", policy=policy, delay=Delay("", (ticks,))) for ticks in (0, 5, 6)]
    arms += [Arm("static", policy=policy, mode="naive", delay=Delay("", (5,))), Arm("static", delay=Delay("", (5,)))]

    def told(*wishes):
        return [arm.committed for arm in stored.with_committed(arms, wishes)]

    assert told("auto") == [False, True, False, False, False]
    assert told("always") == [False, True, True, False, True]
    assert told("never") == [False] * 5
    arms = [Arm("static", policy=one, delay=Delay("", (0,), measured=True)) for one in (policy, "expert")]
    assert told("auto") == [True, False]
    pairs = ((policy, 5), ("expert", 5), (policy, 6))
    arms = [Arm("static", policy=one, delay=Delay("", (ticks,))) for one, ticks in pairs]
    assert told("never", "always") == [False, True] * 3
