"""`vivace inspect`: facts as JSON, a table for people, and an exit code that says whether the checkpoint can run."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.cli.main import main
from vivace.runtime.policy import load_policy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    make_checkpoint(root / "lerobot", Recipe(format="lerobot", kind="pi0", horizon=9))
    make_checkpoint(root / "openpi", Recipe(format="openpi", robot="droid"))
    make_checkpoint(root / "libero", Recipe(format="openpi", robot="libero", kind="pi0"))
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
    assert len(facts["dead"]) == 3  # the last norm of the prefix and two word heads
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


def row(table: str, name: str) -> str:
    """The cell beside `name` in the printed table, its lines joined."""
    lines = [line.strip("│┃ ") for line in table.splitlines() if "│" in line]
    cells = [tuple(part.strip() for part in line.split("│")) for line in lines]
    begin = next(index for index, cell in enumerate(cells) if cell[0] == name)
    end = next((i for i in range(begin + 1, len(cells)) if len(cells[i]) > 1), len(cells))
    return " ".join(cell[-1] for cell in cells[begin:end])


def test_the_robot_of_an_openpi_folder_is_the_one_that_would_run(folders, capsys):
    code, facts, table = inspect(capsys, folders / "libero")
    assert code == 0
    wanted = load_policy(folders / "libero").io.embodiment
    assert facts["embodiment"] == wanted.name == "libero"
    assert facts["relative_actions"] == list(wanted.delta_mask) == [True] * 6 + [False]
    assert facts["cameras"] == [camera.key for camera in wanted.cameras]
    assert (facts["state_dim"], facts["action_dim"]) == (8, 7)
    assert [part["key"] for part in facts["state_parts"]] == ["observation/state"]
    assert "inferred: libero from the norm stats of asset 'physical-intelligence/libero'" in row(table, "robot")
    assert row(table, "relative actions") == "6 of 7 dims: 0, 1, 2, 3, 4, 5"
    assert row(table, "cameras") == "observation/image, observation/wrist_image"
    assert row(table, "actions").startswith("50 x 7")
    assert "observation/state [8]" in row(table, "state")


def test_the_embodiment_can_be_told(folders, capsys):
    code, facts, table = inspect(capsys, folders / "openpi", "--embodiment", "droid_jointpos")
    assert code == 0
    assert facts["relative_actions"] == [True] * 7 + [False]
    assert row(table, "robot") == "droid_jointpos, as told"
    _, facts, table = inspect(capsys, folders / "openpi")
    assert facts["relative_actions"] == []
    assert row(table, "relative actions") == "no"
    assert facts["state_use"] == "digits in the prompt"
    code, facts, text = inspect(capsys, folders / "openpi", "--embodiment", "driod")
    assert (code, facts) == (2, {})
    assert "did you mean 'droid'" in text


def test_what_depends_on_an_unknown_embodiment_is_not_denied(folders, tmp_path, capsys):
    shutil.copytree(folders / "openpi", tmp_path / "mine")
    (tmp_path / "mine" / "assets" / "droid").rename(tmp_path / "mine" / "assets" / "my_robot")
    code, facts, table = inspect(capsys, tmp_path / "mine")
    assert code == 1
    assert [text.split(":")[0] for text in facts["missing"]] == ["embodiment"]
    assert "my_robot" in facts["missing"][0]
    assert "--embodiment" in facts["missing"][0]
    for key in ("embodiment", "cameras", "state_parts", "state_dim", "action_dim", "relative_actions"):
        assert facts[key] is None, key
    for name in ("cameras", "state", "actions", "relative actions"):
        assert "depends on --embodiment" in row(table, name), name
    assert row(table, "robot").startswith("not known: cannot tell which robot")
    assert inspect(capsys, tmp_path / "mine", "--embodiment", "droid")[0] == 0


def test_cameras_that_may_be_missing_are_marked(folders, capsys):
    _, facts, table = inspect(capsys, folders / "lerobot")
    assert facts["optional_cameras"] == facts["cameras"]
    assert row(table, "cameras").count("(optional)") == 2
    assert row(table, "robot") == "as config.json describes it"
