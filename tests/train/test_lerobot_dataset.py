"""LeRobot's own `LeRobotDataset` on what `vivace record` writes. Needs lerobot with its extra dataset, which CI lacks.

How to run this: docs/guides/training.md.
"""

from __future__ import annotations

import numpy as np
import pytest

from vivace.cli.main import main
from vivace.sim.record import Plan, Source, record
from vivace.train.stored import ACTION, CHUNK, EXECUTED, IMAGES, NAMES, STATE

for _package in ("lerobot", "datasets"):
    pytest.importorskip(_package, reason=f"{_package} is not installed; docs/guides/training.md says how to run this")

PX, HORIZON, AHEAD = 16, 4, 3
INDEX = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@pytest.fixture(scope="module")
def demos():
    """Two episodes with undisturbed actions, recorded without any file."""
    plan = Plan((Source("static", 1), Source("conveyor", 1)), image_px=PX, horizon=HORIZON, sigma=(0.0,))
    found = list(record(plan))
    assert all(demo.success for demo in found)
    return found


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The same two from `vivace record`, in LeRobot, as it would train on them: windows of AHEAD actions."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder = tmp_path_factory.mktemp("recorded") / "set"
    numbers = ("--episodes", "1", "--image-px", str(PX), "--horizon", str(HORIZON), "--sigma", "0")
    assert main(["record", str(folder), "--task", "static", "conveyor", *numbers]) == 0
    return LeRobotDataset("local/set", root=folder, delta_timestamps={ACTION: [i / 50 for i in range(AHEAD)]})


def test_lerobot_finds_every_episode_and_feature(opened, demos):
    assert (opened.num_episodes, opened.num_frames, opened.fps) == (2, sum(map(len, demos)), 50)
    assert len(opened) == opened.num_frames
    assert set(opened.meta.features) == {*IMAGES, STATE, ACTION, EXECUTED, CHUNK, *INDEX}
    assert opened.meta.features[ACTION]["names"] == NAMES[ACTION]
    assert set(opened.meta.camera_keys) == set(IMAGES)
    assert [row["length"] for row in opened.meta.episodes] == [len(demo) for demo in demos]
    actions = np.concatenate([demo.action for demo in demos])
    assert np.allclose(opened.meta.stats[ACTION]["q01"], np.quantile(actions, 0.01, axis=0), atol=1e-6)


def test_lerobot_reads_our_frames(opened, demos):
    """First, middle and last frame of both episodes; windows repeat the last action and say so."""
    start = 0
    for number, demo in enumerate(demos):
        for tick in (0, len(demo) // 2, len(demo) - 1):
            row = opened[start + tick]
            assert (int(row["episode_index"]), int(row["frame_index"])) == (number, tick)
            assert float(row["timestamp"]) == pytest.approx(tick / 50)
            assert row["task"] == demo.prompts[tick]
            for view, name in enumerate(IMAGES):
                pixels = (row[name] * 255).round().byte().permute(1, 2, 0).numpy()
                assert np.array_equal(pixels, demo.views[tick, view]), name
            assert np.array_equal(row[STATE], demo.state[tick])
            assert np.array_equal(row[EXECUTED], demo.executed[tick])
            assert np.array_equal(row[CHUNK].reshape(HORIZON, -1), demo.chunk[tick])
            later = np.minimum(tick + np.arange(AHEAD), len(demo) - 1)
            assert np.array_equal(row[ACTION], demo.action[later])
            assert row[f"{ACTION}_is_pad"].tolist() == [tick + i >= len(demo) for i in range(AHEAD)]
        start += len(demo)
    assert demos[0].prompts[0] != demos[1].prompts[0]
    assert not np.array_equal(demos[0].views[0], demos[1].views[0])
