"""Every policy fixture, stage by stage, and proof that a wrong policy would not pass."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vivace.check import golden
from vivace.cli.main import main

POLICIES = [
    "lerobot04_pi05_fp32", "lerobot_pi05_bf16", "lerobot_pi05_fp32", "lerobot_pi05_rtc_guided", "lerobot_pi05_rtc_trained",
    "lerobot_pi0_fp32", "lerobot_pi0_relative_fp32", "openpi_jax_pi05", "openpi_jax_pi0_lora", "openpi_pytorch_pi05_bf16",
    "openpi_pytorch_pi05_fp32", "openpi_pytorch_pi0_fp32",
]  # fmt: skip


def test_no_fixture_is_left_out(golden_dir):
    kinds = {f.name: json.loads((f / "case.json").read_text())["kind"] for f in golden.folders(golden_dir)}
    assert sorted(name for name, kind in kinds.items() if kind == "policy") == sorted(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_policy_fixture(golden_dir, name):
    rows = golden.replay_policy(golden_dir / name)
    stages = {row.stage for row in rows}
    assert stages == set(load_file(golden_dir / name / "expected.safetensors")), "a stored stage was not compared"
    assert [row for row in rows if not row.passed] == []


@pytest.fixture
def copied(golden_dir, tmp_path):
    """A fixture that a test may damage, with the tokenizer where the case looks for it."""
    shutil.copytree(golden_dir / "tokenizer_toy", tmp_path / "tokenizer_toy")

    def copy(name: str):
        shutil.copytree(golden_dir / name, tmp_path / name)
        for path in (tmp_path / name).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (tmp_path / name).chmod(0o755)
        return tmp_path / name

    return copy


@pytest.mark.parametrize("stage", ["prefix_k", "velocity", "actions", "vision_tokens.1", "tokens", "images.0"])
def test_a_moved_expectation_fails(copied, stage):
    """One element moved by 1e-4 of the scale (or by one) is seen, and only its own stage fails."""
    folder = copied("lerobot_pi05_fp32")
    expected = load_file(folder / "expected.safetensors")
    value = expected[stage].copy()
    flat = value.reshape(-1)
    flat[flat.size // 3] += 1 if value.dtype == np.int64 else 1e-4 * np.abs(value).max()
    save_file({**expected, stage: value}, folder / "expected.safetensors")
    failed = {row.stage for row in golden.replay_policy(folder) if not row.passed}
    assert failed == {stage}


def test_an_unknown_stage_fails(copied):
    folder = copied("lerobot_pi05_rtc_guided")
    expected = load_file(folder / "expected.safetensors")
    save_file({**expected, "something_new": np.zeros(3, np.float32)}, folder / "expected.safetensors")
    failed = [row for row in golden.replay_policy(folder) if not row.passed]
    assert [row.stage for row in failed] == ["something_new"]


@pytest.mark.parametrize(("key", "value"), [("horizon", 9), ("num_steps", 9), ("task", "another task")])
def test_a_wrong_setting_fails(copied, key, value):
    folder = copied("lerobot_pi05_fp32")
    case = json.loads((folder / "case.json").read_text())
    (folder / "case.json").write_text(json.dumps({**case, key: value}))
    rows, _ = golden.replay(folder)
    assert any(not row.passed for row in rows)


def test_a_damaged_checkpoint_is_a_failed_row_not_a_crash(copied):
    folder = copied("openpi_pytorch_pi05_fp32")
    model = folder / "checkpoint" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1000])
    rows, _ = golden.replay(folder)
    assert [row.passed for row in rows] == [False]
    assert "CheckpointError" in rows[0].note


def test_verb_exits_0_and_1_and_2(copied, tmp_path, capsys):
    folder = copied("lerobot_pi05_rtc_trained")
    assert main(["golden", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    expected = load_file(folder / "expected.safetensors")
    save_file({**expected, "actions": expected["actions"] + 0.01}, folder / "expected.safetensors")
    assert main(["golden", str(folder)]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert main(["golden", str(tmp_path / "nothing")]) == 2
