"""Blocks, processes, crashes, pairs, reaction, controls, and the verb."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.cli import simulate
from vivace.cli.main import main
from vivace.sim import campaign, controls, scene, stored
from vivace.sim.arms import Arm, Axes, Delay, product
from vivace.sim.campaign import Block, Job, Settings, collect, comparisons, jobs, run_job, run_jobs
from vivace.sim.conveyor import ACTION_DIM, STATE_DIM, VIEWS, ConveyorEnv
from vivace.sim.expert import ExpertChunk
from vivace.sim.faults import FAULTS, Altered
from vivace.sim.outcomes import outcome, reaction


def run(arms, episodes=6, *, processes=1, **settings):
    settings = Settings(episodes=episodes, **settings)
    work = jobs(arms, settings, processes=processes)
    return collect(arms, list(run_jobs(work, processes=processes)), keep=True)


def delayed(ticks, **kwargs):
    return Arm(**{"task": "conveyor", "belt": "fast", **kwargs}, delay=Delay(f"{ticks * 20} ms", (ticks,)))


# --- running --------------------------------------------------------------------------------------------------------


def test_processes_and_blocks_do_not_change_the_outcome():
    arms = [Arm("perturb"), replace(delayed(0, mode="naive"), delay=Delay("drawn", (2, 6)))]
    alone, split = run(arms, 3, twins=2), run(arms, 3, twins=2, processes=2)
    assert [asdict(one) for one in alone] == [asdict(one) for one in split]
    assert [row["seed"] for row in alone[1].episodes] == [0, 1, 2]
    assert [row["reaction"] is not None for row in alone[0].episodes] == [True, True, False]


def test_blocks_cover_every_seed_once_and_twins_are_the_first():
    work = jobs([Arm("perturb"), Arm("static")], Settings(episodes=50, first_seed=7, twins=30), processes=2)
    assert [seed for job in work if job.index == 0 for seed in job.seeds] == list(range(7, 57))
    assert [job.twins for job in work] == [20, 10, 0, 0, 0, 0]


def failing(monkeypatch, name, answer):
    """A fault that answers normally at the first look and then calls `answer(chunk)`."""

    def broken(whole, env):
        looks = []

        def answered(chunk):
            looks.append(1)
            return chunk if len(looks) < 3 else answer(chunk)

        return Altered(whole, answered=answered)

    monkeypatch.setitem(FAULTS, name, broken)
    return Arm("static", fault=name)


def raises(_):
    raise ZeroDivisionError("a bug of the policy")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raises, "ZeroDivisionError: a bug of the policy"),
        (lambda chunk: ExpertChunk(np.full((16, 4), np.nan)), "not finite"),
        (lambda chunk: ExpertChunk(np.zeros((16, 3))), "got 3 wide"),
        (lambda chunk: ExpertChunk(np.zeros((0, 4))), "actions of a chunk"),
    ],
    ids=["raises", "nan", "width", "empty"],
)
def test_a_crash_is_no_failure_and_the_campaign_goes_on(monkeypatch, answer, message):
    arm = failing(monkeypatch, "crash", answer)
    crashed, fine = run([arm, Arm("static")], 2)
    assert (crashed.outcomes, crashed.crashes, crashed.finished, crashed.rate) == ("CC", 2, 0, None)
    assert message in crashed.crash_messages[0]
    assert fine.outcomes == "SS"


def test_a_bug_of_the_simulator_is_no_crash_of_the_policy(monkeypatch):
    def step(self, action):
        raise RuntimeError("physics")

    monkeypatch.setattr(ConveyorEnv, "step", step)
    with pytest.raises(RuntimeError, match="physics"):
        run_job(Job(0, Arm("static"), (0,)))


# --- counting -------------------------------------------------------------------------------------------------------


def row(seed, success=True, wrong=False, crash=None):
    ages = {0: 1, 5: 98, 50: 1}
    numbers = dict.fromkeys(("seam_step", "step_inside_chunks", "seam_apart", "seam_ahead"), 0.5)
    numbers |= dict.fromkeys(("hand_jump_at_seams_m_s", "hand_jump_inside_m_s", "rms_jerk_m_s3"), 1.0)
    time = {"ticks": 100, "held_ticks": 5, "starved_ticks": 1, "seams": 3, "time_to_success_s": 1.0 + seed}
    flags = {"seed": seed, "success": success, "wrong_object": wrong, "crash": crash}
    return {**flags, **time, **numbers, "ages": ages, "delays": {2: 3, 15: 1}, "inference_ms": (), "reaction": None}


def test_figures_of_an_arm():
    rows = [row(0), row(1), row(2, success=False, wrong=True), row(3, success=False), row(4, crash="x: y")]
    one = outcome(Arm("static"), rows)
    assert (one.outcomes, one.n, one.finished, one.successes, one.wrong_object) == ("SSWFC", 5, 4, 2, 1)
    assert one.rate == 0.5
    assert one.time_to_success_s["median"] == 1.5
    assert one.age_ms["mean"] == pytest.approx((0 + 98 * 100 + 1000) / 100)
    assert one.age_ms["p99"] == pytest.approx(100.0, abs=20)
    assert one.seams["plans_apart_m_s"] == 0.25  # action 0.5 = 0.25 m/s
    assert one.seams["plans_apart_m"] == 0.005
    assert one.delay_ticks == {"2": 12, "15": 4}
    assert one.starved_ticks == 4
    assert one.inference_ms is None
    assert one.episodes == ()


def test_the_slowest_inference_is_kept_with_the_others():
    rows = [{**row(0), "inference_ms": (2.0, 3.0, 4.0)}, {**row(1), "inference_ms": (300.0,)}]
    found = outcome(Arm("static"), rows, engine={}, keep=True)
    assert set(found.inference_ms) == {"p50", "p95", "p99", "max"}
    assert (found.inference_ms["p50"], found.inference_ms["max"]) == (3.5, 300.0)
    assert not {"ages", "delays", "inference_ms"} & set(found.episodes[0])
    crashed = outcome(Arm("static"), [row(0, crash="x: y")], engine={})
    assert crashed.inference_ms["max"] is None


def test_delays_that_were_drawn_are_counted():
    drawn = replace(delayed(0), delay=Delay("drawn", (2, 6)))
    fixed, several = run([delayed(3), drawn], 3)
    assert fixed.delay_ticks == {"3": sum(one["inferences"] for one in fixed.episodes)}
    assert set(several.delay_ticks) == {"2", "6"}
    assert sum(several.delay_ticks.values()) == sum(one["inferences"] for one in several.episodes)


def counted(arm, letters):
    rows = [row(i, c == "S", c == "W", "x" if c == "C" else None) for i, c in enumerate(letters)]
    return outcome(arm, rows)


def test_pairs_leave_out_crashes_and_join_what_differs_in_one_thing():
    arms = [delayed(5, mode="naive"), delayed(5), delayed(5, committed=True), delayed(5, task="static")]
    found = [counted(arm, letters) for arm, letters in zip(arms, ("SFFFC", "SSSCS", "SSSSS", "FFFFF"), strict=True)]
    pairs = {(one.arm, one.reference, one.what): one.result for one in comparisons(found, margin=0.05)}
    assert set(pairs) == {
        (1, 0, "reference"), (2, 0, "reference"), (1, 0, "mode"), (2, 0, "mode"), (2, 1, "committed"),
    }  # fmt: skip
    assert (pairs[1, 0, "mode"].n, pairs[1, 0, "mode"].gained, pairs[1, 0, "mode"].lost) == (3, 2, 0)
    assert pairs[2, 1, "committed"].n == 4


def test_a_pair_is_one_test_whatever_it_is_compared_for():
    arms = [delayed(5), delayed(5, mode="naive")]  # the same pair as reference and, the other way round, as mode
    found = comparisons([counted(arms[0], "S" * 8), counted(arms[1], "F" * 8)], margin=0.05)
    assert [(one.arm, one.reference, one.what) for one in found] == [(1, 0, "reference"), (0, 1, "mode")]
    assert [one.holm_p for one in found] == [2 / 2**8] * 2
    assert [one.result.void for one in found] == ["", "reference too low"]


def test_aligned_beats_naive_at_160_ms_on_a_fast_belt():
    arms = [delayed(8, mode="naive"), delayed(8)]
    found = comparisons(run(arms, 10), margin=0.05)
    assert found[-1].what == "mode"
    assert found[-1].result.mcnemar_p < 0.01
    assert found[-1].result.interval[0] > 0.3


# --- reaction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "ticks"), [("aligned", 0), ("naive", 3), ("pause", 3)])
def test_reaction_is_what_theory_says(mode, ticks):
    (one,) = run([Arm("perturb", mode=mode, delay=Delay("", (ticks,)))], 40)
    assert one.reaction["reacted"] == 40
    assert one.reaction["as_the_looks_imply"] >= 36  # a plan may begin as the old one went on
    assert one.reaction["sooner_than_possible"] == 0
    assert one.reaction["agrees"]
    assert one.reaction["theory_ticks"] == [ticks, ticks + (8 + ticks if mode == "pause" else 8) - 1]


def test_reaction_that_is_late_or_comes_from_nowhere_is_noticed():
    rows = [{"reaction": {"ticks": phase + 4, "expected": phase, "event_tick": 9}} for phase in range(8)] * 5
    late = reaction(Arm("perturb"), rows)
    assert not late["agrees"]
    assert late["as_the_looks_imply"] == late["sooner_than_possible"] == 0
    few = reaction(Arm("perturb"), rows[:19])
    assert few["distance"] > 0
    assert few["agrees"] is None
    assert reaction(Arm("perturb"), rows[:20])["agrees"] is False
    leak = reaction(Arm("perturb"), [{"reaction": {"ticks": 2, "expected": 5, "event_tick": 9}}])
    assert leak["sooner_than_possible"] == 1


# --- controls -------------------------------------------------------------------------------------------------------


def judged(arms, **kwargs):
    settings = Settings(episodes=8, **kwargs)
    work = controls.control_jobs(arms, settings, episodes=6)
    outcomes = collect(arms, list(run_jobs(jobs(arms, settings, processes=1))))
    found = controls.judge(outcomes, work, list(run_jobs(work)), settings)
    return {one.name: one for one in found}


def test_controls_of_the_expert_pass():
    found = judged([Arm("static"), Arm("conveyor")])
    wanted = {"stored rate": "passed", "blanked": "passed", "mask": "void", "delay": "passed"}
    assert {name: one.status for name, one in found.items()} == wanted
    assert found["delay"].numbers["injected_ticks"] == 3


def test_a_control_says_which_arm_it_was_of_and_what_ran():
    settings, arms = Settings(episodes=6), [Arm("static"), Arm("static", policy="p"), Arm("conveyor", policy="p")]
    work = controls.control_jobs(arms, settings, episodes=6)
    blocks = [Block(job.index, tuple(row(i, success=False) for i in range(6)), None) for job in work]
    found = controls.judge([counted(arm, "S" * 6) for arm in arms], work, blocks, settings)
    assert [(one.name, one.arm) for one in found if one.policy == "p"] == [
        (name, 1) for name in ("stored rate", "blanked", "mask", "delay")
    ]
    said = {one.name: one.found for one in found if one.policy == "p"}
    assert "0/6 broken on the eager backend, 6/6 whole" in said["mask"]
    assert "eager" not in said["blanked"]


def test_a_policy_that_does_not_need_its_images_fails_the_control(monkeypatch):
    monkeypatch.setitem(FAULTS, "blanked", lambda whole, env: whole)
    assert judged([Arm("static")])["blanked"].status == "failed"


def test_a_policy_that_never_succeeds_makes_controls_void():
    whole, block = counted(Arm("static"), "FFFFFF"), Block(0, tuple(row(i, False) for i in range(6)), None)
    assert controls.must_fail("blanked", whole, block).status == "void"


def test_a_broken_policy_that_crashes_shows_nothing():
    whole, block = counted(Arm("static"), "SSSSSS"), Block(0, tuple(row(i, crash="x: y") for i in range(6)), None)
    found = controls.must_fail("mask", whole, block)
    assert found.status == "failed"
    assert "x: y" in found.found


def test_a_rate_that_is_not_reproduced_fails():
    assert controls.stored_rate(counted(Arm("static"), "SSSSSSSSFF")).status == "failed"
    assert controls.stored_rate(counted(Arm("static"), "S" * 40)).status == "passed"
    assert controls.stored_rate(counted(Arm("static", delay=Delay("", (3,))), "S" * 40)).status == "void"
    assert controls.stored_rate(counted(Arm("static"), "CCC")).status == "failed"


def test_a_rate_of_another_scene_is_not_reproduced(monkeypatch):
    for sha, status in ((scene.scene_sha256(), "passed"), ("0" * 64, "failed")):
        rate = stored.Rate("static", 40, 40, scene_sha256=sha)
        monkeypatch.setattr(controls, "read", lambda policy, rate=rate: stored.Stored(rates=(rate,)))
        assert controls.stored_rate(counted(Arm("static"), "S" * 40)).status == status


def test_a_delay_that_does_not_move_the_reaction_fails():
    def block(*reactions):
        return Block(0, tuple({"reaction": None if r is None else {"ticks": r}} for r in reactions), None)

    assert controls.delay_moves("x", (0, block(1, 4)), (3, block(4, 7))).status == "passed"
    assert controls.delay_moves("x", (0, block(1, 4)), (3, block(4, 6))).status == "failed"
    assert controls.delay_moves("x", (0, block(1, 4)), (3, block(4, None))).status == "passed"
    assert controls.delay_moves("x", (0, block(None)), (3, block(3))).status == "failed"


# --- the verb -------------------------------------------------------------------------------------------------------


def test_verb_writes_one_row_for_each_arm(capsys, tmp_path):
    path = tmp_path / "simulate.json"
    asked = ["--task", "conveyor", "--belt-speed", "fast", "--mode", "pause", "aligned", "--delay-ms", "0", "150"]
    assert main(["simulate", *asked, "--episodes", "5", "--control-episodes", "5", "-o", str(path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads(path.read_text()) == document
    rows = {(row["arm"]["mode"], row["arm"]["delay"]["name"]): row["outcomes"] for row in document["arms"]}
    assert rows == {
        ("pause", "0 ms"): "SSSSS", ("pause", "150 ms"): "FFFFF",
        ("aligned", "0 ms"): "SSSSS", ("aligned", "150 ms"): "SSSSS",
    }  # fmt: skip
    assert set(document["simulator"]) == {"scene_sha256", "mujoco", "renderer", "control_hz"}
    assert document["simulator"]["renderer"] is None  # the expert looks at nothing
    assert document["environment"]["python"]
    assert [one["name"] for one in document["controls"]] == ["stored rate", "blanked", "mask", "delay"]
    assert document["passed"]


def test_a_crash_makes_the_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(campaign, "actor", lambda *args, **kwargs: Altered(None))
    assert main(["simulate", "--task", "static", "--episodes", "2", "--no-controls"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["arms"][0]["crashes"] == 2
    assert not document["passed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "juggle"], "unknown task 'juggle'"),
        (["--episodes", "0"], "must be at least 1"),
        (["--delay-ms", "-5"], "--delay-ms"),
        (["--margin", "0"], "non-inferiority margin"),
        (["--policy", "no-such-folder"], "wanted expert, a checkpoint folder, or one of"),
        (["--latency", "no-such-file.json"], "cannot read latencies from no-such-file.json"),
        (["--real-clock", "--processes", "2"], "--real-clock with --processes"),
        (["--steps", "0"], "--steps"),
        (["--execute-ticks", "0"], "execute_ticks"),
        (["--execute-ticks", "49"], "--execute-ticks; got 49; wanted at most 48, the actions of a chunk of expert"),
        (["--engine", "eager"], "--engine with --policy expert"),
        (["--engine", "auto", "eager"], "--engine with --policy expert"),
        (["--policy", "expert", "--precision", "float32", "plan.json"], "--precision with --policy expert"),
        (["--plan", "plan.json"], "expert, the default; got ('plan.json',); wanted nothing"),
        (["--steps", "5"], "--steps with --policy expert"),
        (["--horizon", "10"], "--horizon with --policy expert"),
        (["--device", "cpu"], "--device with --policy expert"),
        (["--lerobot-version", "0.5"], "--lerobot-version with --policy expert"),
        (["--video", "clip.avi"], "wanted a name that ends in .mp4"),
        (["--store"], "nothing to store"),
        (["-o", "a-file/out.json"], "cannot write a-file/out.json"),
        (["-o", "a-folder"], "cannot write a-folder"),
        (["--video", "a-file/clip.gif"], "cannot write a-file/clip.gif"),
        (["--rerun", "a-folder"], "cannot write a-folder"),
    ],
)
def test_verb_names_what_is_wrong(capsys, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    (tmp_path / "a-folder").mkdir()
    monkeypatch.setattr(campaign, "run_jobs", None)  # refused before the first episode
    assert main(["simulate", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_expert_beside_a_policy_leaves_the_engines_to_it(capsys, monkeypatch):
    """Options at their defaults, or of another policy, are not refused."""
    monkeypatch.setattr(campaign, "run_jobs", lambda *_, **__: [])
    options = ["--task", "static", "--no-controls", "--precision", "float32", "bfloat16", "--steps", "5"]
    main(["simulate", "--policy", "expert", "conveyor-small", *options])
    rows = json.loads(capsys.readouterr().out)["arms"]
    assert [(row["arm"]["policy"], row["arm"]["precision"]) for row in rows] == [
        ("expert", "auto"), ("conveyor-small", "float32"), ("conveyor-small", "bfloat16"),
    ]  # fmt: skip
    assert main(["simulate", "--task", "static", "--no-controls", "--engine", "auto", "--device", "auto"]) == 0


def test_more_actions_than_a_chunk_has_are_refused_before_the_first_episode(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(campaign, "run_jobs", None)
    short = Recipe(size="tiny", format="lerobot", horizon=5, cameras=VIEWS, state_dim=STATE_DIM, action_dim=ACTION_DIM)
    make_checkpoint(tmp_path / "short", short)
    for policy, options, message in (
        ("conveyor-small", ["--execute-ticks", "25"], "got 25; wanted at most 24, the actions of a chunk of conveyor"),
        ("conveyor-small", ["--execute-ticks", "1000", "--video", "clip.gif"], "got 1000"),
        (str(tmp_path / "short"), [], "got 8; wanted at most 5"),  # the default, too
    ):
        assert main(["simulate", "--task", "static", "--policy", policy, *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_waiting_for_actions_that_no_chunk_has_is_in_the_table(capsys):
    """An answer that comes 40 ticks late leaves 8 actions of a chunk of 48, and the next one comes after 40."""
    asked = ["simulate", "--task", "conveyor", "--no-controls", "--episodes", "2"]
    assert main([*asked, "--delay-ms", "0", "800"]) == 0
    said = capsys.readouterr()
    without, starved = (row["starved_ticks"] for row in json.loads(said.out)["arms"])
    assert (without, starved > 0) == (0, True)
    lines = [line for line in said.err.splitlines() if "│" in line and "ms" in line]
    cells = {line.split("│")[2].strip(): line.split("│")[-2].strip() for line in lines[:2]}
    assert cells == {"0 ms": "", "800 ms": str(starved)}
    assert main(asked) == 0
    assert "starved" not in capsys.readouterr().err


def killed(job):
    """Plays two blocks and dies at the third, as if for want of memory."""
    if job.seeds[0] >= 4:
        time.sleep(2.0)  # the others are reported meanwhile
        os._exit(9)
    return run_job(job)


def test_a_killed_process_is_named_and_what_was_finished_is_kept(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(campaign, "run_job", killed)
    monkeypatch.setattr(campaign, "BLOCK", 2)
    file = tmp_path / "out.json"
    asked = ["--task", "static", "--episodes", "6", "--processes", "2", "--no-controls", "-o", str(file)]
    assert main(["simulate", *asked]) == 2
    assert "a process of the campaign was killed" in capsys.readouterr().err
    document = json.loads(file.read_text())
    assert document["arms"][0]["outcomes"] == "SSSS"
    assert "killed" in document["unfinished"]
    assert not document["passed"]


def storing(capsys, monkeypatch, tmp_path, *options):
    """`simulate --store` of a policy that is the expert under another name; (exit code, what was said, stored rates)."""
    monkeypatch.setattr(stored, "EXPERT", "nobody")
    monkeypatch.setattr(stored, "LEAST", 2)
    monkeypatch.setattr(simulate, "check_horizons", lambda *_: None)
    monkeypatch.setattr(
        "vivace.cli.simulate._played", lambda work, processes: ([played(job) for job in work], None)
    )  # fmt: skip

    def played(job):
        done = run_job(replace(job, arm=replace(job.arm, policy="expert")))
        return replace(done, engine={"num_denoise_steps": 5, "backend": "eager", "precision": "float32"})

    code = main(["simulate", "--policy", str(tmp_path), "--task", "static", "--store", *options])
    return code, " ".join(capsys.readouterr().err.split()), stored.read(str(tmp_path)).rates


def test_store_writes_a_rate_with_what_ran(capsys, monkeypatch, tmp_path):
    code, _, rates = storing(capsys, monkeypatch, tmp_path, "--episodes", "2", "--no-controls")
    assert code == 0
    assert [(one.successes, one.n, one.steps, one.engine, one.precision) for one in rates] == [
        (2, 2, 5, "eager", "float32")
    ]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--episodes", "1", "--no-controls"), 2, "too few episodes"),
        (("--episodes", "2", "--no-controls", "--steps", "1", "5"), 2, "same conditions"),
        (("--episodes", "2", "--no-controls", "--real-clock"), 2, "nothing to store"),
        (("--episodes", "2", "--control-episodes", "1"), 1, "control blanked failed"),
        (("--episodes", "2", "--no-controls"), 1, "episodes crashed"),
    ],
)
def test_what_may_not_be_stored_is_not(capsys, monkeypatch, tmp_path, options, code, message):
    if "crashed" in message:
        monkeypatch.setattr(campaign, "actor", lambda *args, **kwargs: Altered(None))
    if "control" in message:
        bad = controls.Control("blanked", str(tmp_path), "failed", "", {})
        monkeypatch.setattr(controls, "judge", lambda *_: [bad])
        monkeypatch.setattr(controls, "control_jobs", lambda *_, **__: [])
    got, said, rates = storing(capsys, monkeypatch, tmp_path, *options)
    assert (got, rates) == (code, ())
    assert message in said


def test_axes_make_a_product_and_the_expert_has_no_engine():
    axes = Axes(tasks=("static",), policies=("expert", "p"), engines=("eager", "compiled"), steps=(5, 10))
    assert len(product(axes)) == 1 + 4
    assert len(product(Axes(tasks=("all",)))) == 13
