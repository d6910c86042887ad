"""LeRobot's dataset format: what an independent reader finds in the files, and what vivace reads back."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from vivace.check import observations
from vivace.errors import ConfigError, Unsupported
from vivace.robots.dataset import Episode, read_frames, write_dataset
from vivace.sim.record import Demo, Plan, Source
from vivace.train.stored import CHUNK, IMAGES, read_pieces, write_demos


def demo(ticks: int, *, seed: int, success: bool = True) -> Demo:
    rng = np.random.default_rng(seed)
    return Demo(
        task="static", seed=seed, success=success, sigma=0.0, belt_m_s=0.0,
        prompts=("pick up the red cube",) * (ticks - 1) + ("pick up the blue cube",),
        ticks=np.arange(ticks),
        views=rng.integers(0, 256, (ticks, 3, 8, 8, 3), dtype=np.uint8),
        state=rng.normal(size=(ticks, 7)).astype(np.float32),
        action=rng.uniform(-1, 1, (ticks, 4)).astype(np.float32),
        executed=rng.uniform(-1, 1, (ticks, 4)).astype(np.float32),
        chunk=rng.uniform(-1, 1, (ticks, 5, 4)).astype(np.float32),
    )  # fmt: skip


DEMOS = [demo(4, seed=0), demo(9, seed=1, success=False), demo(3, seed=2)]
PLAN = Plan((Source("static", 3),), image_px=8, horizon=5)


@pytest.fixture
def folder(tmp_path):
    write_demos(tmp_path / "set", iter(DEMOS), PLAN)
    return tmp_path / "set"


def test_files_have_the_layout_of_the_format(folder):
    """Checked with json, pyarrow and Pillow alone, against the facts of v3.0. LeRobot itself: test_lerobot_dataset.py."""
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["fps"], info["total_episodes"], info["total_frames"], info["total_tasks"]) == (50, 2, 7, 2)
    assert info["features"][IMAGES[1]] == {
        "dtype": "image",
        "shape": [8, 8, 3],
        "names": ["height", "width", "channels"],
    }
    assert info["features"]["action"]["names"] == ["x", "y", "z", "grip"]
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        assert info["features"][name]["shape"] == [1]
    assert info["splits"] == {"train": "0:2"}
    table = parquet.read_table(folder / info["data_path"].format(chunk_index=0, file_index=0))
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"][IMAGES[0]] == {"_type": "Image"}
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["frame_index"] for row in rows] == [0, 1, 2, 3, 0, 1, 2]
    assert [row["episode_index"] for row in rows] == [0, 0, 0, 0, 1, 1, 1]
    assert rows[2]["timestamp"] == pytest.approx(2 / 50)
    picture = np.asarray(Image.open(io.BytesIO(rows[5][IMAGES[2]]["bytes"])))
    assert (picture == DEMOS[2].views[1, 2]).all()
    assert np.allclose(rows[5]["action"], DEMOS[2].action[1])
    tasks = parquet.read_table(folder / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    by_index = {row["task_index"]: row["task"] for row in tasks.to_pylist()}
    assert [by_index[row["task_index"]] for row in rows] == [*DEMOS[0].prompts, *DEMOS[2].prompts]
    episodes = parquet.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    spans = [(e["length"], e["dataset_from_index"], e["dataset_to_index"], e["data/file_index"]) for e in episodes]
    assert spans == [(4, 0, 4, 0), (3, 4, 7, 0)]
    assert episodes[0]["tasks"] == ["pick up the red cube", "pick up the blue cube"]
    stats = json.loads((folder / "meta/stats.json").read_text())
    action = np.concatenate([DEMOS[0].action, DEMOS[2].action])
    assert np.allclose(stats["action"]["q99"], np.quantile(action, 0.99, axis=0))
    assert stats["action"]["count"] == [7]
    assert np.shape(stats[IMAGES[0]]["mean"]) == (3, 1, 1)


def test_many_episodes_go_to_several_files(tmp_path):
    episodes = (
        Episode({}, {"action": np.full((2, 3), float(i), np.float32)}, ("go", "go")) for i in range(51)
    )  # fmt: skip
    write_dataset(tmp_path / "set", episodes, fps=10, robot_type="toy")
    assert len(list((tmp_path / "set/data").rglob("*.parquet"))) == 2
    frames = list(read_frames(tmp_path / "set"))
    assert [frame.vectors["action"][0] for frame in frames] == [float(i // 2) for i in range(102)]
    assert [frame.index for frame in read_frames(tmp_path / "set", wanted=3)] == [0, 50, 101]


def test_pieces_come_back(folder):
    one, two = read_pieces(folder, horizon=4, image_px=8)
    assert (one.views == DEMOS[0].views).all()
    assert (two.executed == DEMOS[2].executed).all()
    assert (two.chunk == DEMOS[2].chunk[:, :4]).all()
    assert one.prompts == DEMOS[0].prompts
    with pytest.raises(ConfigError, match="too short"):
        read_pieces(folder, horizon=6, image_px=8)
    with pytest.raises(ConfigError, match="images"):
        read_pieces(folder, horizon=4, image_px=16)


def test_without_stored_chunks_the_target_is_the_window_of_actions(tmp_path):
    source = DEMOS[0]
    images = {name: source.views[:, i] for i, name in enumerate(IMAGES)}
    vectors = {"observation.state": source.state, "action": source.action}
    write_dataset(tmp_path / "set", [Episode(images, vectors, source.prompts)], fps=50, robot_type="toy")
    (piece,) = read_pieces(tmp_path / "set", horizon=3, image_px=8)
    assert (piece.chunk[1] == source.action[1:4]).all()
    assert (piece.chunk[3] == source.action[[3, 3, 3]]).all()
    assert (piece.executed == source.action).all()


def test_calibration_reads_datasets(folder):
    requests = observations.recorded(folder)
    assert len(requests) == 7
    assert set(requests[0]) == {*IMAGES, "observation.state", "task"}
    assert (requests[6][IMAGES[0]] == DEMOS[2].views[2, 0]).all()
    assert requests[6]["task"] == "pick up the blue cube"


def test_what_cannot_be_read_is_explained(folder, tmp_path):
    file = folder / "meta/info.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(Unsupported, match="convert"):
        list(read_frames(folder))
    videos = {**info["features"], IMAGES[0]: {"dtype": "video", "shape": [8, 8, 3]}}
    file.write_text(json.dumps({**info, "features": videos}))
    with pytest.raises(Unsupported, match="video"):
        list(read_frames(folder))
    file.write_text(json.dumps({**info, "total_frames": 9}))
    with pytest.raises(ConfigError, match="incomplete"):
        list(read_frames(folder))
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        list(read_frames(folder))
    with pytest.raises(ConfigError, match="exists already"):
        write_demos(folder, iter(DEMOS), PLAN)
    with pytest.raises(ConfigError, match="no episodes"):
        write_demos(tmp_path / "none", iter(DEMOS[1:2]), PLAN)
    with pytest.raises(ConfigError, match="stride"):
        write_demos(tmp_path / "some", iter(DEMOS), Plan(PLAN.sources, stride=5))
    ragged = [Episode({}, {"action": np.zeros((1, n), np.float32)}, ("go",)) for n in (2, 3)]
    with pytest.raises(ConfigError, match="differ"):
        write_dataset(tmp_path / "ragged", ragged, fps=1, robot_type="toy")


def test_a_damaged_picture_is_named(folder):
    file = folder / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    rows = table.to_pylist()
    rows[0][IMAGES[0]] = {"bytes": b"no picture", "path": None}
    parquet.write_table(table.from_pylist(rows, schema=table.schema), file)
    with pytest.raises(ConfigError, match="decoded"):
        list(read_frames(folder))
    assert CHUNK in table.column_names
