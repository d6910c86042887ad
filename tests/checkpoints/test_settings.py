"""Processor files and statistics: found by name, not by step number; odd ones refused with the reason."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from vivace.checkpoints.norm_stats import load_assets, load_norm_stats
from vivace.checkpoints.open import open_checkpoint
from vivace.errors import CheckpointError

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made(format="lerobot"), tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder, name, change):
    table = json.loads((folder / name).read_text())
    change(table)
    (folder / name).write_text(json.dumps(table))


def step(table, name):
    return next(entry for entry in table["steps"] if entry.get("registry_name") == name)


def test_the_statistics_are_found_by_state_file(folder):
    before = open_checkpoint(folder).robot.stats[""][0]
    old, new = "policy_preprocessor_step_3_normalizer_processor.safetensors", "elsewhere.safetensors"
    (folder / old).rename(folder / new)
    with pytest.raises(
        CheckpointError, match=r"statistics of normalizer_processor are missing.*step_3.*; copy the whole"
    ):
        open_checkpoint(folder)
    edit(folder, PRE, lambda t: step(t, "normalizer_processor").update(state_file=new))
    assert np.array_equal(open_checkpoint(folder).robot.stats[""][0].q01, before.q01)
    edit(folder, PRE, lambda t: step(t, "normalizer_processor").update(state_file="../elsewhere.safetensors"))
    with pytest.raises(CheckpointError, match="outside"):
        open_checkpoint(folder)


def test_steps_named_by_class(folder):
    def by_class(table):
        entry = step(table, "normalizer_processor")
        del entry["registry_name"]
        entry["class"] = "lerobot.processor.normalize_processor.NormalizerProcessorStep"

    want = open_checkpoint(folder).robot.stats[""][0]
    edit(folder, PRE, by_class)
    assert np.array_equal(open_checkpoint(folder).robot.stats[""][0].q99, want.q99)


def test_an_unknown_step_is_refused_not_skipped(folder):
    edit(folder, PRE, lambda t: t["steps"].insert(2, {"registry_name": "crop_processor", "config": {}}))
    with pytest.raises(CheckpointError, match="crop_processor"):
        open_checkpoint(folder)


def test_modes_eps_rename_and_length_come_from_the_steps(folder):
    def change(table):
        step(table, "normalizer_processor")["config"].update(
            eps=1e-5, norm_map={"STATE": "MIN_MAX", "ACTION": "IDENTITY"}
        )
        step(table, "rename_observations_processor")["config"]["rename_map"] = {"observation.images.cam": "front"}
        step(table, "tokenizer_processor")["config"]["max_length"] = 123

    edit(folder, PRE, change)
    robot = open_checkpoint(folder).robot
    assert (robot.state_mode, robot.action_mode, robot.eps, robot.max_prompt_tokens) == (
        "min_max",
        "quantiles",
        1e-5,
        123,
    )
    assert robot.rename == {"observation.images.cam": "front"}
    edit(folder, PRE, lambda t: step(t, "normalizer_processor")["config"].update(norm_map={"STATE": "LOG"}))
    with pytest.raises(CheckpointError, match="LOG"):
        open_checkpoint(folder)


def test_pictures_scaled_by_statistics_are_refused(folder):
    def visual(mode):
        return lambda t: step(t, "normalizer_processor")["config"]["norm_map"].update(VISUAL=mode)

    edit(folder, PRE, visual("MEAN_STD"))
    with pytest.raises(
        CheckpointError, match="normalisation of VISUAL cannot be used; got 'MEAN_STD'; wanted IDENTITY"
    ):
        open_checkpoint(folder)
    edit(folder, PRE, visual("NormalizationMode.IDENTITY"))
    open_checkpoint(folder)
    edit(folder, PRE, lambda t: step(t, "normalizer_processor")["config"]["norm_map"].pop("VISUAL"))
    open_checkpoint(folder)
    for file in folder.glob("policy_*"):
        file.unlink()
    edit(folder, "config.json", lambda t: t["normalization_mapping"].update(VISUAL="MIN_MAX"))
    with pytest.raises(CheckpointError, match="VISUAL cannot be used; got 'MIN_MAX'"):
        open_checkpoint(folder)


def test_without_processors_the_folder_opens_and_says_so(folder):
    for file in folder.glob("policy_*"):
        file.unlink()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.robot.stats == {}
    assert checkpoint.robot.state_mode == "quantiles"  # from config.json
    assert any("no normalisation statistics" in note for note in checkpoint.notes)


@pytest.mark.parametrize("name", ["relative_actions_processor", "delta_actions_processor"])
def test_relative_actions(folder, name):
    """A joint is absolute when an excluded word is part of its lower-cased name; without names all are relative."""
    joints = ["a", "b", "Left_Gripper.pos", "c", "d", "e", "wrist"]

    def enable(table):
        entry = step(table, "relative_actions_processor")
        entry.update(registry_name=name)
        entry["config"] = {"enabled": True, "exclude_joints": ["gripper", "WRIST"], "action_names": joints}

    edit(folder, PRE, enable)
    with pytest.raises(CheckpointError, match="disagree"):
        open_checkpoint(folder)
    edit(folder, POST, lambda t: step(t, "absolute_actions_processor")["config"].update(enabled=True))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.robot.relative_mask == (True, True, False, True, True, True, False)
    assert any("use_relative_actions" in note for note in checkpoint.notes)  # config.json still says false
    edit(folder, PRE, lambda t: step(t, name)["config"].update(action_names=joints[:3]))
    with pytest.raises(CheckpointError, match="3 names"):
        open_checkpoint(folder)
    edit(folder, PRE, lambda t: step(t, name)["config"].update(action_names=None))
    assert open_checkpoint(folder).robot.relative_mask == (True,) * 7


@pytest.mark.parametrize(
    ("both_embeddings", "relative_step", "version"), [(False, True, "0.6"), (True, False, "0.5"), (False, False, "0.4")]
)
def test_which_lerobot_wrote_it(made, rewritten, both_embeddings, relative_step, version):
    prefix = "model.paligemma_with_expert.paligemma."
    embed = prefix + "model.language_model.embed_tokens.weight"

    def change(tensors):
        others = {key: tensor for key, tensor in tensors.items() if key != prefix + "lm_head.weight"}
        return {**others, prefix + "lm_head.weight": tensors[embed] + 1} if both_embeddings else others

    folder = rewritten(change, format="lerobot")
    if not relative_step:
        edit(folder, PRE, lambda t: t["steps"].remove(step(t, "relative_actions_processor")))
    checkpoint = open_checkpoint(folder)
    old = version == "0.4"
    assert checkpoint.robot.image_pad == (-1.0 if old else 0.0)
    assert checkpoint.robot.pad_state_to == (32 if old else 0)
    assert checkpoint.model.flavour == ("openpi_torch" if old else "lerobot")
    assert checkpoint.guesses.get("lerobot_version", "0.6").startswith(version)


def test_empty_camera_slots_are_left_out(folder):
    feature = {"type": "VISUAL", "shape": [3, 224, 224]}
    edit(folder, "config.json", lambda t: t["input_features"].update({"observation.images.empty_camera_0": feature}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.robot.cameras == ("observation.images.front", "observation.images.wrist")
    assert any("empty camera" in note for note in checkpoint.notes)


def test_unknown_config_keys_are_tolerated(folder):
    edit(folder, "config.json", lambda t: t.update(some_new_option=[1, 2]))
    open_checkpoint(folder)


def stats(**changes):
    vector = {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": None, "q99": None}
    return {"state": {**vector, **changes}, "actions": vector}


def test_norm_stats_wrapped_unwrapped_nested_and_null(tmp_path):
    for asset, table in {"a/b": {"norm_stats": stats()}, "c": stats(q01=[-1.0, -1.0], q99=[1.0, 1.0])}.items():
        place = tmp_path / "assets" / asset
        place.mkdir(parents=True)
        (place / "norm_stats.json").write_text(json.dumps(table))
    (tmp_path / "norm_stats.json").write_text(json.dumps(stats()))
    assets = load_assets(tmp_path)
    assert list(assets) == ["", "a/b", "c"]
    assert assets["a/b"][0].q01 is None
    assert assets["c"][0].q99.tolist() == [1.0, 1.0]
    assert assets["a/b"][1].std.dtype == np.float64


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"norm_stats": {"state": {}}},
        {"norm_stats": 3},
        stats(mean=[0.0]),
        stats(std=[float("nan"), 1.0]),
        stats(mean="x"),
        stats(mean=[[1.0], [2.0]]),
        {"state": {"mean": []}, "actions": {"mean": []}},
    ],
)
def test_norm_stats_that_cannot_be_used(tmp_path, table):
    (tmp_path / "norm_stats.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"norm_stats\.json.*; copy the file again"):
        load_norm_stats(tmp_path / "norm_stats.json")
