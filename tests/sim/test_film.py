"""Clips and logs: what is in them, and what is said where a library is missing."""

from __future__ import annotations

import importlib.util
import types

import av
import numpy as np
import pytest
from PIL import Image

from vivace.errors import ConfigError, Unsupported
from vivace.sim import film, tasks
from vivace.sim.actors import Options
from vivace.sim.arms import Arm, Delay
from vivace.sim.campaign import play
from vivace.sim.conveyor import ConveyorEnv
from vivace.sim.rollout import Moment
from vivace.sim.tasks import Task
from vivace.types import Observation

ARM = Arm("conveyor", "fast", delay=Delay("60 ms", (3,)))
FRAMES = [np.full((64, 96, 3), value, np.uint8) for value in (0, 90, 180, 250)]


def seen():
    views = {name: np.full((32, 32, 3), 60 * (i + 1), np.uint8) for i, name in enumerate(("a", "b", "c"))}
    return Observation(views=views, state=np.zeros(7), prompt="pick up the red cube")


def moment(tick=10, age=4, chunk=1, index=7):
    return Moment(tick, np.zeros(4), age, chunk, index)


def test_a_frame_shows_the_views_and_the_chunk_in_use():
    frames = [
        film.annotate(seen(), moment(chunk=chunk, age=age), title="x") for chunk, age in ((1, 4), (2, 4), (2, -1))
    ]
    assert frames[0].shape == (256 + 64, 3 * 256, 3)
    assert [int(frames[0][200, 256 * i + 200, 0]) for i in range(3)] == [60, 120, 180]
    bars = [tuple(frame[258, 10]) for frame in frames]
    assert bars == [film.CHUNK_COLOURS[1], film.CHUNK_COLOURS[2], film.WAITING]
    assert not np.array_equal(frames[0][290:], film.annotate(seen(), moment(age=5), title="x")[290:])


def test_an_mp4_can_be_read_back(tmp_path):
    path = tmp_path / "clip.mp4"
    film.video_writer(path)(FRAMES, path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        read = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 25)
    assert read == pytest.approx([0, 90, 180, 250], abs=4)


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_animations_need_no_library(tmp_path, ending):
    path = tmp_path / f"clip.{ending}"
    film.video_writer(path)(FRAMES, path)
    with Image.open(path) as image:
        assert (image.n_frames, image.size) == (4, (96, 64))


def test_an_episode_becomes_a_clip_and_watching_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "conveyor", Task("conveyor", max_ticks=16))
    path = tmp_path / "new" / "clip.gif"
    filmed = film.record(ARM, seed=1, options=Options(), video=path, rerun=None)
    env = ConveyorEnv(tasks.task("conveyor"), belt_m_s=tasks.SPEEDS_M_S["fast"])
    assert np.array_equal(filmed.actions, play(env, ARM, seed=1, options=Options()).actions)
    with Image.open(path) as image:
        assert image.n_frames == 16 // film.EVERY  # equal frames at the end are joined in a .gif


def test_missing_libraries_and_bad_names_are_told_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"needs PyAV.*vivace\[video\]"):
        film.record(ARM, seed=0, options=Options(), video=tmp_path / "a.mp4", rerun=None)
    with pytest.raises(Unsupported, match=r"rerun-sdk.*vivace\[rerun\]"):
        film.record(ARM, seed=0, options=Options(), video=None, rerun=tmp_path / "a.rrd")
    with pytest.raises(ConfigError, match=r"\.mp4, \.webp or \.gif"):
        film.video_writer(tmp_path / "a.avi")
    with pytest.raises(ConfigError, match=r"\.rrd"):
        film.RerunLog(tmp_path / "a.txt")


class Recorder:
    """Stands in for rerun, which is too large for the test environment; checked once by hand against rerun-sdk 0.41."""

    def __init__(self):
        self.logged, self.times = [], []

    def module(self):
        stream = types.SimpleNamespace(
            save=lambda path: self.logged.append(path), flush=lambda: None, disconnect=lambda: None,
            set_time=lambda name, duration: self.times.append(duration),
            log=lambda name, value: self.logged.append((name, value)),
        )  # fmt: skip
        return types.SimpleNamespace(
            RecordingStream=lambda name: stream, Image=np.shape, Scalars=float, TextLog=str
        )  # fmt: skip


def test_the_rerun_log_has_every_view_and_number(monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: recorder.module())
    log = film.RerunLog(tmp_path / "a.rrd")
    log.log(seen(), moment(tick=10, age=4))
    log.close()
    path, *rows = recorder.logged
    assert path.endswith("a.rrd")
    assert recorder.times == [0.2]
    assert dict(rows)["observation_age_ms"] == 80.0
    assert dict(rows)["views/b"] == (32, 32, 3)
    assert dict(rows)["instruction"] == "pick up the red cube"
    assert {name for name, _ in rows if name.startswith("action/")} == {
        f"action/{dim}" for dim in ("x", "y", "z", "grip")
    }
