"""`vivace inspect`: facts as JSON, a table for people, and an exit code that says whether the checkpoint can run."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.cli.main import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    make_checkpoint(root / "lerobot", Recipe(format="lerobot", kind="pi0", horizon=9))
    make_checkpoint(root / "openpi", Recipe(format="openpi", robot="droid"))
    return root


def inspect(capsys, *args) -> tuple[int, dict, str]:
    code = main(["inspect", *map(str, args)])
    out = capsys.readouterr()
    return code, json.loads(out.out) if out.out else {}, out.err


def test_a_complete_checkpoint(folders, capsys):
    code, facts, table = inspect(capsys, folders / "lerobot")
    assert code == 0
    assert facts["missing"] == []
    assert facts["guesses"] == {}
    assert (facts["kind"], facts["origin"], facts["horizon"]) == ("pi0", "lerobot", 9)
    assert facts["cameras"] == ["observation.images.front", "observation.images.wrist"]
    assert (facts["state_dim"], facts["action_dim"], facts["state_use"]) == (8, 7, "one continuous token")
    assert (facts["normalization"]["state"], facts["prompt"]) == ("mean_std", "lerobot_pi0")
    assert facts["parameters"] == Recipe(kind="pi0").parameters() == sum(facts["stored_dtypes"].values())
    assert facts["model"]["expert"]["width"] == 24
    assert len(facts["dead"]) == 1
    for word in ("pi0", "vision", "mean_std", "front", "9 x 7"):
        assert word in table


def test_what_is_missing_gives_exit_code_1(folders, tmp_path, capsys):
    shutil.copytree(folders / "openpi", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "tokenizer")
    code, facts, table = inspect(capsys, tmp_path / "bare")
    assert code == 1
    assert [text.split(":")[0] for text in facts["missing"]] == ["tokenizer"]
    shutil.rmtree(tmp_path / "bare" / "assets")
    (tmp_path / "bare" / "config.json").unlink()
    code, facts, table = inspect(capsys, tmp_path / "bare", "--vision-heads", "2")
    assert code == 1
    assert [text.split(":")[0] for text in facts["missing"]] == ["normalisation statistics", "tokenizer"]
    assert "horizon" in facts["guesses"]
    assert "missing" in table
    code, facts, _ = inspect(capsys, tmp_path / "bare", "--vision-heads", "2", "--horizon", "16")
    assert (facts["horizon"], facts["guesses"]) == (16, {})


def test_quantiles_that_pi05_needs(folders, tmp_path, capsys):
    shutil.copytree(folders / "openpi", tmp_path / "copy")
    file = tmp_path / "copy" / "assets" / "droid" / "norm_stats.json"
    table = json.loads(file.read_text())
    table["norm_stats"]["state"].update(q01=None, q99=None)
    file.write_text(json.dumps(table))
    code, facts, _ = inspect(capsys, tmp_path / "copy")
    assert code == 1
    assert facts["missing"] == ["state statistics of asset 'droid': q01, q99, which quantiles needs"]


def test_what_is_no_checkpoint_gives_exit_code_2(folders, tmp_path, capsys):
    code, facts, text = inspect(capsys, tmp_path)
    assert (code, facts) == (2, {})
    assert "not a checkpoint" in text
    shutil.copytree(folders / "openpi", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert inspect(capsys, tmp_path / "cut")[0] == 2


def test_check_values_finds_nan(folders, tmp_path, capsys):
    shutil.copytree(folders / "openpi", tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["time_mlp_in.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    assert inspect(capsys, tmp_path / "copy")[0] == 0  # values are not read unless asked
    code, _, text = inspect(capsys, tmp_path / "copy", "--check-values")
    assert code == 2
    assert "time_mlp_in.bias" in text
    assert inspect(capsys, folders / "openpi", "--check-values")[0] == 0
