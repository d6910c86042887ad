"""The recorded websocket frames of openpi, and proof that the replay notices each kind of difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vivace.check.golden_wire import replay_wire
from vivace.errors import ConfigError


def test_every_recorded_frame_is_read_and_written_exactly(golden_dir: Path) -> None:
    rows = replay_wire(golden_dir / "websocket")
    assert len(rows) == 18
    assert [row for row in rows if not row.passed] == []
    assert {row.error for row in rows} == {0.0}


@pytest.fixture
def copied(golden_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "websocket"
    folder.mkdir()
    for file in (golden_dir / "websocket").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def test_a_changed_frame_fails(copied: Path) -> None:
    file = copied / "observation_odd.msgpack"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the last value, -3, becomes -4
    file.write_bytes(data)
    failed = [row for row in replay_wire(copied) if not row.passed]
    assert [row.stage for row in failed] == ["observation_odd.msgpack decode", "observation_odd.msgpack encode"]
    assert all(row.error == 1.0 for row in failed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"t": "int", "value": -3}', '{"t": "float", "value": -3.0}'),
        ('"dtype": ">f4"', '"dtype": "<f4"'),
        ('{"t": "npscalar", "dtype": "<f4", "value": 1.5}', '{"t": "float", "value": 1.5}'),
        ('{"t": "bytes", "hex": "726177"}', '{"t": "str", "value": "raw"}'),
        ('"shape": [0, 3]', '"shape": [3, 0]'),
        ('{"t": "bool", "value": true}', '{"t": "int", "value": 1}'),
    ],
)
def test_a_wrong_expectation_fails(copied: Path, old: str, new: str) -> None:
    """Values that Python calls equal, or that hold the same bytes, still differ on the wire."""
    file = copied / "case.json"
    text = json.dumps(json.loads(file.read_text()))
    assert old in text
    file.write_text(text.replace(old, new))
    failed = {row.stage for row in replay_wire(copied) if not row.passed}
    assert failed == {"observation_odd.msgpack decode", "observation_odd.msgpack encode"}


def test_another_kind_of_folder_is_refused(golden_dir: Path) -> None:
    with pytest.raises(ConfigError, match="websocket"):
        replay_wire(golden_dir / "prompts")
