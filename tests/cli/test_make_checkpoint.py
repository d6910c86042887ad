"""`vivace make-checkpoint`: the options reach the files, and mistakes do not write anything."""

from __future__ import annotations

import json

import pytest

from vivace.checkpoints.open import open_checkpoint
from vivace.cli.main import main


def make(capsys, *args) -> tuple[int, dict, str]:
    code = main(["make-checkpoint", *map(str, args)])
    out = capsys.readouterr()
    return code, json.loads(out.out) if out.out else {}, out.err


def test_options_reach_the_checkpoint(tmp_path, capsys):
    options = ["--kind", "pi0", "--horizon", 7, "--dtype", "bfloat16", "--seed", 5, "--cameras", "top", "side", "wrist"]
    code, facts, text = make(capsys, tmp_path / "a", *options, "--state-dim", 6, "--action-dim", 4)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert code == 0
    assert facts["parameters"] == checkpoint.parameters()
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert (checkpoint.model.kind, checkpoint.model.horizon, checkpoint.model.declared_dtype) == ("pi0", 7, "bfloat16")
    assert checkpoint.robot.cameras == tuple(f"observation.images.{name}" for name in ("top", "side", "wrist"))
    assert (checkpoint.robot.state_dim, checkpoint.robot.action_dim) == (6, 4)
    assert "pi0 tiny" in text


@pytest.mark.parametrize("fmt", ["openpi", "jax"])
def test_formats_of_openpi(tmp_path, capsys, fmt):
    if fmt == "jax":
        pytest.importorskip("tensorstore", reason="the extra jax-checkpoints is not installed")
    code, _, _ = make(capsys, tmp_path / "a", "--format", fmt, "--robot", "aloha", "--no-tokenizer")
    checkpoint = open_checkpoint(tmp_path / "a")
    assert code == 0
    assert list(checkpoint.robot.stats) == ["trossen"]
    assert checkpoint.robot.tokenizer_dir is None


def test_mistakes(tmp_path, capsys):
    assert make(capsys, tmp_path / "a", "--size", "huge")[0] == 2
    assert make(capsys, tmp_path / "a", "--horizon", 0)[0] == 2
    assert not (tmp_path / "a").exists()
    assert make(capsys, tmp_path / "a")[0] == 0
    code, _, text = make(capsys, tmp_path / "a")
    assert code == 2
    assert "--overwrite" in text
    assert make(capsys, tmp_path / "a", "--overwrite")[0] == 0
