"""The served policy, whole, in the loop: a random network sees the cameras, gives chunks, and picks up nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vivace
from vivace.backends.eager import EagerBackend
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.cli.main import main
from vivace.errors import ConfigError
from vivace.runtime.policy import Policy as ServedPolicy
from vivace.sim import campaign, controls, film, tasks
from vivace.sim.actors import ExpertActor, Options, ServedActor, load, previous
from vivace.sim.arms import Arm, Delay
from vivace.sim.campaign import Job, run_job
from vivace.sim.conveyor import ACTION_DIM, STATE_DIM, VIEWS, ConveyorEnv
from vivace.sim.expert import chunk
from vivace.sim.faults import FAULTS, broken
from vivace.sim.rollout import Committed, Execution, rollout
from vivace.sim.tasks import Task

SHORT = Task("short", max_ticks=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("conveyor") / "policy"
    recipe = Recipe(
        size="tiny", format="lerobot", horizon=16, cameras=VIEWS, state_dim=STATE_DIM, action_dim=ACTION_DIM
    )
    make_checkpoint(path, recipe)
    (path / "simulation.json").write_text(json.dumps({"image_px": 48, "committed_max_ticks": 8}))
    return path


@pytest.fixture(scope="module")
def served(folder):
    return load(str(folder), "eager", "float32", 2, Options(device="cpu"))


@pytest.fixture(scope="module")
def scene():
    env = ConveyorEnv("conveyor", image_px=48)
    env.reset(seed=0)
    yield env, env.look()
    env.close()


def test_a_checkpoint_of_the_conveyor_drives_the_arm(folder):
    policy = vivace.load_policy(folder, embodiment="conveyor")
    env = ConveyorEnv(SHORT, image_px=64)
    execution = Execution("aligned", execute_ticks=8, delay_ticks=2)
    runs = [rollout(env, policy.infer, seed=0, execution=execution) for _ in range(2)]
    env.close()
    assert runs[0].looks == (0, 8, 16)
    assert not runs[0].success
    assert np.ptp(runs[0].actions[2:], axis=0).min() > 0
    assert np.array_equal(runs[0].actions, runs[1].actions)


def test_noise_belongs_to_the_episode_and_the_look(served, scene):
    _, seen = scene
    first, again, other = ServedActor(served, 5), ServedActor(served, 5), ServedActor(served, 6)
    a, b = first.policy(seen).actions, first.policy(seen).actions
    assert not np.array_equal(a, b)
    assert np.array_equal(again.policy(seen).actions, a)
    assert np.array_equal(again.policy(seen).actions, b)
    assert not np.array_equal(other.policy(seen).actions, a)


def test_committed_actions_come_back_as_the_beginning_of_the_next_chunk(served, scene):
    _, seen = scene
    actor = ServedActor(served, 1)
    old = actor.policy(seen)
    new = actor.continuing(seen, Committed(old, start=8, ticks=3))
    assert np.allclose(new.actions_normalized[:3], old.actions_normalized[8:11], atol=1e-6)
    assert not np.allclose(new.actions_normalized[3:8], old.actions_normalized[11:16], atol=1e-2)
    told = previous(Committed(old, start=8, ticks=3))
    assert (told.inference_delay, told.mode) == (3, "trained")
    assert not told.actions[0, 8:].any()
    with pytest.raises(ConfigError, match="another policy"):
        previous(Committed(chunk_of(np.zeros((4, 4))), 0, 1))


def chunk_of(actions):
    return type("Chunk", (), {"actions": actions})()


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_every_fault_changes_what_a_served_policy_does(served, scene, name):
    env, seen = scene
    whole, hurt = ServedActor(served, 1), broken(name, ServedActor(served, 1), env)
    a, b = whole.policy(seen).actions, hurt.policy(seen).actions
    assert a.shape == b.shape
    assert np.abs(a - b).max() > 1e-6
    assert np.array_equal(ServedActor(served, 1).policy(seen).actions, a)  # the whole one stayed whole


def test_a_policy_of_another_robot_and_an_unknown_fault_are_named(tmp_path, scene, served):
    make_checkpoint(tmp_path / "libero", Recipe(size="tiny"))
    with pytest.raises(ConfigError, match="7 action dims"):
        load(str(tmp_path / "libero"), "eager", "float32", 1, Options(embodiment="libero", device="cpu"))
    with pytest.raises(ConfigError, match="unknown fault"):
        broken("gremlins", ServedActor(served, 0), scene[0])


def test_the_real_clock_turns_inference_time_into_ticks(folder):
    arm = Arm(
        "short", policy=str(folder), engine="eager", precision="float32", steps=2, delay=Delay("", (2,), measured=True)
    )
    (row,) = run_job(Job(0, arm, (0,), options=Options(device="cpu"), task=SHORT)).rows
    assert len(row["inference_ms"]) == row["inferences"]
    # two injected, and at least one for the inference itself; a machine so busy that nothing came in time has no ages
    assert all(age >= 3 for age in row["ages"])
    assert row["ages"] or row["inference_ms"][0] > 260  # with the 2 ticks, older than the chunk of 16 is long


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_nothing_is_run_for_the_first_time_under_an_episodes_clock(folder, monkeypatch, measured, told):
    """A backend records or compiles once more for committed actions, up to a minute: not while the world goes on."""
    done = []
    infer, began = ServedPolicy.infer, rollout

    def run(policy, *args, previous=None, **kwargs):
        kinds.append(previous.mode if previous else None)
        return backend_infer(policy, *args, previous=previous, **kwargs)

    def answered(policy, request, *, previous=None, **kwargs):
        done.append("told look" if previous else "look")
        return infer(policy, request, previous=previous, **kwargs)

    def episode(*args, **kwargs):
        done.append("episode")
        return began(*args, **kwargs)

    kinds, backend_infer = [], EagerBackend.infer
    monkeypatch.setattr(EagerBackend, "infer", run)
    monkeypatch.setattr(ServedPolicy, "infer", answered)
    monkeypatch.setattr(
        campaign, "rollout", lambda *args, **kwargs: (kinds.append("episode"), episode(*args, **kwargs))[1]
    )
    arm = Arm(
        "short", policy=str(folder), engine="eager", precision="float32", steps=2, committed=told,
        delay=Delay("", (2,), measured=measured),
    )  # fmt: skip
    run_job(Job(0, arm, (0, 1), options=Options(device="cpu"), task=SHORT))
    before = done[: done.index("episode")]
    assert before == (["look", "told look"] if told else ["look"]) * measured
    assert ("trained" in kinds[: kinds.index("episode")]) == told
    assert done.count("episode") == 2


def test_a_film_of_a_real_clock_is_warm_too(folder, monkeypatch, tmp_path):
    warmed = []
    monkeypatch.setattr(
        film, "warm", lambda served, arm, env, *, seed: warmed.append((served.engine.backend, arm, seed))
    )
    monkeypatch.setitem(tasks.TASKS, "short", SHORT)
    arm = Arm("short", policy=str(folder), engine="eager", precision="float32", steps=2)
    film.record(arm, seed=3, options=Options(device="cpu"), video=tmp_path / "clip.gif", rerun=None)
    assert warmed == [("eager", arm, 3)]


def test_a_policy_that_cannot_answer_is_a_crash_under_a_real_clock_too(folder, monkeypatch):
    monkeypatch.setattr(ServedPolicy, "infer", lambda *args, **kwargs: 1 / 0)
    arm = Arm("short", policy=str(folder), engine="eager", precision="float32", steps=2, delay=Delay("", measured=True))
    (row,) = run_job(Job(0, arm, (0,), options=Options(device="cpu"), task=SHORT)).rows
    assert "division by zero" in row["crash"]


def test_the_expert_told_what_is_committed_plans_from_where_that_leads():
    env = ConveyorEnv("conveyor")
    env.reset(seed=3)
    plan = chunk(env.sight(), 48)
    follow = ExpertActor(env.sight).continuing(None, Committed(chunk_of(plan), 0, 10)).actions
    assert follow.shape == (48, 4)
    assert np.array_equal(follow[:10], plan[:10])
    assert np.allclose(follow, plan, atol=1e-5)  # the same plan: it began with these actions
    other = np.tile(np.float32([0.3, 0.3, 0.3, -1.0]), (48, 1))
    assert not np.allclose(
        ExpertActor(env.sight).continuing(None, Committed(chunk_of(other), 0, 10)).actions[10:], plan[10:]
    )


def test_committed_actions_save_the_expert_at_300_ms_on_a_fast_belt():
    def successes(committed):
        arm = Arm("conveyor", "fast", committed=committed, delay=Delay("300 ms", (15,)))
        return sum(row["success"] for row in run_job(Job(0, arm, tuple(range(6)))).rows)

    assert successes(False) <= 1
    assert successes(True) >= 5


def test_verb_runs_a_policy_with_controls_that_it_cannot_meet(folder, capsys, monkeypatch):
    """A random policy never succeeds: its controls are void, its reaction is still exact, and nothing crashes."""
    monkeypatch.setitem(tasks.TASKS, "short", SHORT)
    monkeypatch.setattr(controls, "REACTION_SEEDS", (0,))
    asked = ["--policy", str(folder), "--task", "short", "--engine", "eager", "--precision", "float32", "--steps", "2"]
    asked += ["--delay-ms", "40", "--episodes", "1", "--control-episodes", "1", "--device", "cpu"]
    assert main(["simulate", *asked]) == 0
    document = json.loads(capsys.readouterr().out)
    (arm,) = document["arms"]
    assert arm["outcomes"] == "F"
    assert arm["arm"]["committed"]
    assert arm["engine"]["precision"] == "float32"
    assert document["simulator"]["renderer"] in ("egl", "osmesa")
    assert 0 < arm["inference_ms"]["p50"] <= arm["inference_ms"]["p99"] <= arm["inference_ms"]["max"]
    assert list(arm["delay_ticks"]) == ["2"]
    status = {one["name"]: one["status"] for one in document["controls"]}
    assert status == {"stored rate": "void", "blanked": "void", "mask": "void", "delay": "passed"}
