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


OPTIONAL = {
    "openpi_pytorch_pi0_fp32": [
        ("embodiment", "delta_mask"),
        ("embodiment", "output_dims"),
        ("embodiment", "asset_id"),
        ("embodiment", "adapt_to_pi"),
        ("not_inferable",),
        ("num_prefix_tokens",),
        ("prefix_kv_layers",),
        ("name",),
        ("num_steps",),
    ],
    "lerobot_pi05_rtc_guided": [
        ("rtc", "max_guidance_weight"),
        ("rtc", "schedule"),
        ("rtc", "config_execution_horizon"),
        ("max_token_len",),
        ("dims",),
    ],
}


@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name, paths in OPTIONAL.items() for keys in paths])
def test_a_fixture_may_leave_out_what_the_checkpoint_says(copied, name, keys):
    """Fixtures written later need not repeat every key; only vision heads that are not 72 wide must be told."""
    folder = copied(name)
    case = json.loads((folder / "case.json").read_text())
    inner = case
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    if keys == ("prefix_kv_layers",):
        expected = load_file(folder / "expected.safetensors")
        assert len(expected["prefix_k"]) == 2
    (folder / "case.json").write_text(json.dumps(case))
    rows, _ = golden.replay(folder)
    failed = [row for row in rows if not row.passed]
    if keys == ("not_inferable",):
        assert "vision_heads" in failed[0].note.replace("-", "_")
    else:
        assert failed == []


def test_one_damaged_fixture_does_not_hide_the_others(copied, tmp_path, capsys):
    copied("lerobot_pi05_rtc_trained")
    broken = copied("lerobot_pi0_relative_fp32")
    (broken / "expected.safetensors").write_bytes((broken / "expected.safetensors").read_bytes()[:-50])
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "case.json").write_text("[1, 2]")
    assert main(["golden", str(tmp_path)]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    by_case = {case: [row["passed"] for row in rows if row["case"] == case] for case in {row["case"] for row in rows}}
    assert by_case["lerobot_pi0_relative_fp32"] == [False]
    assert by_case["listed"] == [False]
    assert all(by_case["lerobot_pi05_rtc_trained"])


def test_verb_exits_0_and_1_and_2(copied, tmp_path, capsys):
    folder = copied("lerobot_pi05_rtc_trained")
    assert main(["golden", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    expected = load_file(folder / "expected.safetensors")
    save_file({**expected, "actions": expected["actions"] + 0.01}, folder / "expected.safetensors")
    assert main(["golden", str(folder)]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert main(["golden", str(tmp_path / "nothing")]) == 2
