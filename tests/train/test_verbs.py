"""`vivace record` and `vivace train` from end to end at toy size: data, steps, corrections, folder, rates, resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vivace.check.report_training import read_log, section
from vivace.checkpoints.open import open_checkpoint
from vivace.cli.main import main
from vivace.robots.dataset import read_frames
from vivace.train import closed_loop, loop

RECIPE = """
name = "toy"
[network]
vision = {width=16, layers=1, mlp_width=32, num_heads=2, patch_size=8, image_size=16}
prefix = {width=32, layers=2, mlp_width=32, num_heads=2, head_dim=16}
expert = {width=16, layers=2, mlp_width=32, num_heads=2, head_dim=16}
horizon = 12
[data]
DATA
[optimise]
steps = 6
batch = 4
flows = 2
warmup_steps = 2
max_committed = 4
log_every = 2
save_every = 3
[closed_loop]
execute_ticks = 8
sources = [{task="static", episodes=1}]
corrections = [{at=0.5, delay_ticks=3, sources=[{task="conveyor", episodes=1}]}]
processes = 1
"""
RECORDED = 'sources = [{task="static", episodes=1}, {task="conveyor", episodes=1}]\nstride = 10\nprocesses = 1'


def call(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out.strip() else None, captured.err


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_recipe_becomes_a_policy(tmp_path, capsys, monkeypatch):
    delays = []  # of every look, as the policy is told
    answering = loop.answering

    def noted(policy):
        answer = answering(policy)

        def told(looks):
            delays.append([look.ticks for look in looks])
            return answer(looks)

        return told

    monkeypatch.setattr(loop, "answering", noted)
    (tmp_path / "toy.toml").write_text(RECIPE.replace("DATA", RECORDED))
    code, facts, text = call(
        capsys, "train", tmp_path / "toy.toml", "--out", tmp_path / "run", "--device", "cpu", "--also", "openpi"
    )
    assert code == 0
    assert "static" in text
    assert facts["success"][0]["n"] == 1
    assert facts["success"][0]["failed_seeds"] == [0], "success is measured on seeds that nothing was recorded on"
    rows = log_of(tmp_path / "run")
    events = [row["event"] for row in rows]
    assert events[-2:] == ["exported", "success"]
    assert events.index("corrected") > events.index("step")
    assert [row["step"] for row in rows if row["event"] == "step"] == [2, 4, 6]
    assert rows[-1]["simulator"]["mujoco"]
    page = section(read_log(tmp_path / "run" / "log.jsonl"))
    assert page.count("<svg") == 2, "loss, and success"
    assert "corrections, 3 ticks late" in page
    corrected = next(row for row in rows if row["event"] == "corrected")
    assert corrected["examples"] > 0
    assert corrected["delay_ticks"] == 3
    first, *others = [ticks for (ticks,) in delays[: corrected["examples"] // 2]]  # examples with two instructions each
    assert first == 0
    assert set(others) == {3}, "in corrections"
    assert {ticks for (ticks,) in delays[corrected["examples"] // 2 :]} == {0}, "when success is measured"
    assert corrected["rates"][0]["failed_seeds"] == [closed_loop.CORRECTION_SEED + 4000 * 50]
    opened = open_checkpoint(tmp_path / "run/policy")
    assert (opened.origin, opened.model.horizon, opened.rtc.training_max_delay) == ("lerobot", 12, 4)
    assert open_checkpoint(tmp_path / "run/policy_openpi").origin == "openpi_torch"

    code, _, text = call(capsys, "train", tmp_path / "toy.toml", "--out", tmp_path / "run", "--device", "cpu")
    assert code == 2
    assert "exists already" in text


def test_resumed_from_half_way_is_the_whole_run(tmp_path, capsys):
    whole = RECIPE.replace("DATA", RECORDED).replace(
        'corrections = [{at=0.5, delay_ticks=3, sources=[{task="conveyor", episodes=1}]}]', ""
    )
    whole = whole.replace('sources = [{task="static", episodes=1}]\n\nprocesses', "processes")
    (tmp_path / "whole.toml").write_text(whole)
    (tmp_path / "half.toml").write_text(whole.replace("save_every = 3", "save_every = 4"))
    weights = {}
    for name in ("whole", "half"):
        code, _, _ = call(capsys, "train", tmp_path / f"{name}.toml", "--out", tmp_path / name, "--device", "cpu")
        assert code == 0
        weights[name] = (tmp_path / name / "policy/model.safetensors").read_bytes()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "half/state.safetensors").rename(tmp_path / "resumed/state.safetensors")  # of step 4
    code, _, _ = call(
        capsys, "train", tmp_path / "whole.toml", "--out", tmp_path / "resumed", "--device", "cpu", "--resume"
    )
    assert code == 0
    assert [row["step"] for row in log_of(tmp_path / "resumed") if row["event"] == "step"] == [6]
    assert (tmp_path / "resumed/policy/model.safetensors").read_bytes() == weights["whole"] == weights["half"]
    code, _, text = call(capsys, "train", tmp_path / "whole.toml", "--out", tmp_path / "nothing", "--resume")
    assert code == 2
    assert "nothing to resume" in text


def test_a_recorded_dataset_trains_and_starts_from_a_policy(tmp_path, capsys):
    code, facts, _ = call(
        capsys, "record", tmp_path / "set", "--task", "static", "--episodes", 2, "--image-px", 16, "--horizon", 12,
        "--sigma", 0.0, "--seed", 1,
    )  # fmt: skip
    assert code == 0
    assert facts["episodes"] == facts["attempted"] == 2
    frames = list(read_frames(tmp_path / "set"))
    assert len(frames) == facts["frames"]
    assert np.abs(frames[3].vectors["action"] - frames[3].vectors["executed"]).max() == 0
    text = RECIPE.replace("DATA", f'folder = "{tmp_path / "set"}"')
    text = text[: text.index("[closed_loop]")]
    (tmp_path / "one.toml").write_text(text)
    assert call(capsys, "train", tmp_path / "one.toml", "--out", tmp_path / "one", "--device", "cpu")[0] == 0
    later = text.replace('name = "toy"', f'name = "toy"\nstart = "{tmp_path / "one/policy"}"')
    (tmp_path / "two.toml").write_text(later)
    assert call(capsys, "train", tmp_path / "two.toml", "--out", tmp_path / "two", "--device", "cpu")[0] == 0
    first, second = (next(r["loss"] for r in log_of(tmp_path / n) if r["event"] == "step") for n in ("one", "two"))
    assert first != second
    (tmp_path / "other.toml").write_text(later.replace("vision = {width=16", "vision = {width=32"))
    code, _, said = call(capsys, "train", tmp_path / "other.toml", "--out", tmp_path / "three", "--device", "cpu")
    assert code == 2
    assert "another network" in said
    code, _, said = call(capsys, "record", tmp_path / "set")
    assert code == 2
    assert "exists already" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "missing.toml"), "cannot read recipe"),
        (("record", "x", "--task", "nonsense"), "unknown task"),
        (("record", "x", "--processes", "0"), "processes"),
        (("record", "x", "--image-px", "100000"), "image_px from 8 to"),
        (("record", "x", "--sigma", "nan"), "noise levels"),
        (("record", "a-file/x"), "cannot be written to"),
        (("record", "a-file"), "cannot be written to"),
    ],
)
def test_bad_use_is_explained(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    code, _, text = call(capsys, *arguments)
    assert code == 2
    assert message in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "foo"), "--device"), (("--device", "meta"), "--device"), (("--device", "cuda:99"), "CUDA device"),
        (("--seconds", "nan"), "--seconds"), (("--seconds", "-3"), "--seconds"), (("--out", "toy.toml"), "written to"),
    ],
)  # fmt: skip
def test_options_of_train_are_checked_before_the_work(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("toy.toml").write_text(RECIPE.replace("DATA", RECORDED))
    code, _, text = call(capsys, "train", "toy.toml", *options)
    assert code == 2
    assert message in text


def test_the_module_trains_on_bare_machines(tmp_path, capsys):
    from vivace.train.__main__ import main as bare

    text = RECIPE.replace("DATA", RECORDED)
    (tmp_path / "toy.toml").write_text(text[: text.index("[closed_loop]")])
    assert bare([str(tmp_path / "toy.toml"), str(tmp_path / "run")]) == 0
    assert open_checkpoint(tmp_path / "run/policy").model.horizon == 12
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["event"] for row in lines] == [row["event"] for row in log_of(tmp_path / "run")]
    assert bare([str(tmp_path / "toy.toml"), str(tmp_path / "run")]) == 2
    assert bare([]) == 2
    assert bare([str(tmp_path / "toy.toml"), str(tmp_path / "other"), "soon"]) == 2
    assert bare([str(tmp_path / "toy.toml"), str(tmp_path / "toy.toml")]) == 2


def test_a_bundled_policy_is_found_by_name_and_hides_nothing(tmp_path, monkeypatch):
    from vivace.checkpoints import bundled
    from vivace.errors import CheckpointError

    monkeypatch.setattr(bundled, "POLICIES", tmp_path / "policies")
    monkeypatch.chdir(tmp_path)
    assert bundled.names() == []
    (tmp_path / "policies/one").mkdir(parents=True)
    assert bundled.find(Path("one")) == tmp_path / "policies/one"
    assert bundled.find(Path("two")) == Path("two")
    (tmp_path / "one").mkdir()
    assert bundled.find(Path("one")) == Path("one")
    with pytest.raises(CheckpointError, match="one of \\['one'\\]"):
        open_checkpoint("two")
