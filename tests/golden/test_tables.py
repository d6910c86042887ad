"""The fixture tables of openpi and LeRobot, replayed completely; and that a wrong or unknown record fails."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vivace.check.golden_tables import replay_tables
from vivace.errors import ConfigError

TABLES = ("prompts", "transforms", "tokenizer_toy")


def count_outputs(folder: Path) -> int:
    """How many comparisons a table holds, counted from its JSON alone."""
    case = json.loads((folder / "case.json").read_text())
    if case["kind"] == "prompts":
        rows = json.loads((folder / case["file"]).read_text())["rows"]
        return sum(len(row) - len({"id", "task", "state"} & set(row)) for row in rows)
    if case["kind"] == "tokenizer":
        table = json.loads((folder / "samples.json").read_text())
        return len(set(table) - {"note", "samples"}) + sum(len(sample) - 1 for sample in table["samples"])
    return sum(
        len(record["outputs"])
        for name, _ in case["files"]
        for record in json.loads((folder / name).read_text())["records"]
    )


@pytest.mark.parametrize("table", TABLES)
def test_every_record_is_replayed_and_passes(golden_dir: Path, table: str) -> None:
    rows = replay_tables(golden_dir / table)
    assert [row for row in rows if not row.passed] == []
    assert len(rows) == count_outputs(golden_dir / table) > 100


def test_float_resizes_are_an_order_below_their_tolerance(golden_dir: Path) -> None:
    errors = [
        row.error
        for row in replay_tables(golden_dir / "transforms")
        if "resize" in row.stage and "uint8" not in row.note
    ]
    assert max(errors) < 4e-7


@pytest.fixture
def copy(golden_dir: Path, tmp_path: Path):
    def make(table: str) -> Path:
        return Path(shutil.copytree(golden_dir / table, tmp_path / table, copy_function=shutil.copyfile))

    return make


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.chmod(0o644)
    path.write_text(json.dumps(content))


def make_writable(folder: Path) -> None:
    folder.chmod(0o755)


def failing(folder: Path) -> list[str]:
    return [row.stage for row in replay_tables(folder) if not row.passed]


def test_an_unknown_operation_is_a_failed_row(copy) -> None:
    folder = copy("transforms")
    make_writable(folder)
    edit(folder / "openpi.json", lambda c: c["records"][3].update(op="resize_with_love"))
    assert failing(folder) == ["openpi.json 3 resize_with_love"]


def test_a_missing_tensor_is_a_failed_row(copy) -> None:
    folder = copy("transforms")
    make_writable(folder)
    edit(folder / "lerobot.json", lambda c: c["records"][0]["inputs"]["image"].update(tensor="nowhere"))
    assert failing(folder) == ["lerobot.json 0 resize_with_pad_torch_lerobot"]


@pytest.mark.parametrize("kind", ["value", "nan", "dtype", "shape"])
def test_a_wrong_expectation_is_a_failed_row(copy, kind: str) -> None:
    folder = copy("transforms")
    make_writable(folder)
    tensors = load_file(folder / "openpi.safetensors")
    right = tensors["24.out.y"]
    wrong = {
        "value": right * (1 + 1e-9) + 1e-9,
        "nan": np.full_like(right, np.nan),
        "dtype": right.astype(np.float32),
        "shape": right[:1],
    }[kind]
    (folder / "openpi.safetensors").unlink()
    save_file({**tensors, "24.out.y": wrong}, folder / "openpi.safetensors")
    assert failing(folder) == ["openpi.json 24 normalize y"]


def test_one_wrong_pixel_fails(copy) -> None:
    folder = copy("transforms")
    make_writable(folder)
    tensors = load_file(folder / "openpi.safetensors")
    tensors["0.out.image"] = tensors["0.out.image"].copy()
    tensors["0.out.image"][100, 100, 1] ^= 1
    (folder / "openpi.safetensors").unlink()
    save_file(tensors, folder / "openpi.safetensors")
    assert failing(folder) == ["openpi.json 0 resize_with_pad_pil image"]


def test_a_wrong_and_an_unknown_prompt_column_fail(copy) -> None:
    folder = copy("prompts")
    make_writable(folder)
    edit(folder / "prompts.json", lambda c: c["rows"][0].update(lerobot_pi0="other", smolvla="x"))
    assert failing(folder) == ["0 lerobot_pi0", "0 smolvla"]


def test_a_wrong_token_and_fact_fail(copy) -> None:
    folder = copy("tokenizer_toy")
    make_writable(folder)

    def change(content) -> None:
        content["samples"][0]["huggingface"].insert(0, 2)
        content["newline_id"] = 108
        content["mask_id"] = 4

    edit(folder / "samples.json", change)
    assert failing(folder) == ["newline_id", "mask_id", "0 huggingface"]


def test_empty_broken_and_foreign_folders(copy, golden_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a fixture folder"):
        replay_tables(tmp_path)
    with pytest.raises(ConfigError, match="is not a table"):
        replay_tables(golden_dir / "websocket")
    folder = copy("prompts")
    make_writable(folder)
    edit(folder / "prompts.json", lambda c: c.update(rows=[]))
    assert failing(folder) == ["prompts"]
    (folder / "prompts.json").unlink()
    assert failing(folder) == ["prompts"]
