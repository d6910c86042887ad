"""Made-up observations fit the robot they were made for; recorded ones are read as they are."""

import numpy as np
import pytest

import vivace
from vivace.check import observations
from vivace.config import EngineConfig
from vivace.errors import ConfigError, ObservationError
from vivace.types import Camera, Embodiment, Normalization, NormStats, RobotIO, StatePart

ROBOT = Embodiment(
    name="two arms",
    cameras=(Camera("top", "images/top"), Camera("wrist", "images/wrist", chw=True)),
    state=(StatePart("state/joints", 3), StatePart("state/gripper", 1)),
    action_dim=4,
    prompt_key="task",
)


def robot_io(stats):
    return RobotIO(
        embodiment=ROBOT,
        normalization=Normalization("openpi", "quantiles", "quantiles", stats, NormStats(), 1e-6),
        prompt="openpi_pi05",
        image="pil",
    )


def test_requests_fit_the_robot_and_its_statistics():
    stats = NormStats(q01=np.array([0.0, 10, 20, 30]), q99=np.array([1.0, 11, 21, 31]))
    first, second = observations.synthetic(robot_io(stats), 2, seed=3)
    assert set(first) == {"images/top", "images/wrist", "state/joints", "state/gripper", "task"}
    assert first["images/top"].shape == (240, 320, 3)
    assert first["images/wrist"].shape == (3, 240, 320)
    assert first["images/top"].dtype == np.uint8
    state = np.concatenate([first["state/joints"], first["state/gripper"]])
    assert ((state > [0, 10, 20, 30]) & (state < [1, 11, 21, 31])).all()
    assert first["task"] != second["task"]
    assert not np.array_equal(first["images/top"], second["images/top"])


def test_the_same_seed_gives_the_same_bytes():
    a, b, c = (observations.synthetic(robot_io(NormStats()), 1, seed=seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(a["images/wrist"], b["images/wrist"])
    assert np.array_equal(a["state/joints"], b["state/joints"])
    assert not np.array_equal(a["images/wrist"], c["images/wrist"])


def test_images_have_structure_that_noise_has_not():
    image = observations.scene(np.random.default_rng(0), 240, 320).astype(float)
    neighbours = np.corrcoef(image[:, 1:].ravel(), image[:, :-1].ravel())[0, 1]
    assert neighbours > 0.9, "neighbouring pixels of a camera image are alike"
    assert np.abs(np.diff(image, axis=1)).max() > 40, "and there are edges"
    assert image.std() > 20


def test_recorded_requests_are_read_in_name_order(tmp_path):
    for name, prompt in (("b", "second"), ("a", "first")):
        np.savez(
            tmp_path / f"{name}.npz", **{"observation/image": np.zeros((4, 4, 3), np.uint8), "prompt": np.array(prompt)}
        )
    rows = observations.recorded(tmp_path)
    assert [row["prompt"] for row in rows] == ["first", "second"]
    assert isinstance(rows[0]["prompt"], str)
    assert rows[0]["observation/image"].dtype == np.uint8


def test_pickles_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\.npz"):
        observations.recorded(tmp_path)
    np.savez(tmp_path / "x.npz", evil=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ConfigError, match="pickled"):
        observations.recorded(tmp_path)


def test_stand_ins_for_recordings_are_doubted_and_camera_images_are_not():
    g = np.random.default_rng(0)
    scene = observations.scene(g, 48, 64)
    for image in (scene, np.ascontiguousarray(scene.transpose(2, 0, 1)), scene.astype(np.float32) / 255):
        assert observations.doubts([{"image": image, "prompt": "x"}]) == []
    noise = g.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for image, said in ((np.zeros_like(scene), "constant"), (noise, "noise"), (noise.transpose(2, 0, 1), "noise")):
        assert said in observations.doubts([{"image": image}])[0]
    assert observations.doubts([{"prompt": "x"}]) == ["observation 0 has no image"]
    other = observations.scene(g, 48, 64)
    assert observations.doubts([{"image": scene}] * 3) == ["all 3 observations are the same"]
    assert observations.doubts([{"image": scene}, {"image": other}]) == []


def test_a_digest_follows_keys_types_and_values():
    a = {"image": np.zeros((2, 3), np.uint8), "prompt": "x"}
    known = observations.digest([a])
    assert observations.digest([dict(reversed(a.items()))]) == known, "order of keys"
    changed = [
        {**a, "prompt": "y"}, {**a, "more": 1}, {**a, "image": np.zeros((3, 2), np.uint8)},
        {**a, "image": np.zeros((2, 3), np.int8)}, {**a, "image": np.ones((2, 3), np.uint8)},
    ]  # fmt: skip
    assert known not in [observations.digest([one]) for one in changed]
    assert observations.digest([a, a]) != known


def test_made_up_instructions_fit_the_policy():
    policy = vivace.load_policy("conveyor-small", config=EngineConfig(device="cpu"))
    with pytest.raises(ObservationError, match="too long"):
        policy.prepare(observations.synthetic(policy.io, 1)[0])
    fitted = observations.synthetic(policy.io, 3, prepare=policy.prepare)
    for request, plain in zip(fitted, observations.synthetic(policy.io, 3), strict=True):
        policy.prepare(request)
        assert plain["task"].startswith(request["task"])
        assert all(np.array_equal(request[key], plain[key]) for key in plain if key != "task")


def test_what_is_wrong_with_more_than_the_instruction_is_still_an_error():
    policy = vivace.load_policy("conveyor-small", config=EngineConfig(device="cpu"))

    def refuse(request):
        raise ObservationError("the state is missing")

    with pytest.raises(ObservationError, match="state"):
        observations.synthetic(policy.io, 1, prepare=refuse)


def test_a_camera_that_is_dark_throughout_is_named_once():
    g = np.random.default_rng(0)
    scenes = [observations.scene(g, 48, 64) for _ in range(3)]
    dark = np.zeros_like(scenes[0])
    requests = [{"wrist": dark, "base": scene} for scene in scenes]
    assert observations.doubts(requests) == ["camera wrist: the image is constant in every observation"]
    once = [{"base": scenes[0]}, {"wrist": dark, "base": scenes[1]}, {"wrist": scenes[0], "base": scenes[2]}]
    assert observations.doubts(once) == ["observation 1, wrist: the image is constant"]


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed"):
        observations.synthetic(None, 1, seed=-1)
