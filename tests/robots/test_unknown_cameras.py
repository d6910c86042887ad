"""A misspelt camera must not turn into a missing one, which a policy would answer without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vivace.errors import ObservationError
from vivace.robots.io import resolve
from vivace.robots.pipeline import RobotPipeline
from vivace.types import NormStats, RobotFacts

IMAGE = np.zeros((60, 80, 3), dtype=np.uint8)


@pytest.fixture
def lerobot(lerobot_facts: RobotFacts, characters) -> RobotPipeline:
    return RobotPipeline(resolve(lerobot_facts, "pi05"), characters)


def request(**changes) -> dict:
    return {"front": IMAGE, "state": np.zeros(6), "task": "x", **changes}


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("wirst", "wrist"),
        ("observation/wrist_image", "observation/images/wrist"),
        ("observation/images/wirst", "observation/images/wrist"),
        ("observation.images.wirst", "observation.images.wrist"),
        ("observation.wirst", "wrist"),
    ],
)
def test_any_spelling_of_an_unknown_camera_is_refused(lerobot: RobotPipeline, name: str, suggested: str) -> None:
    with pytest.raises(ObservationError, match=f"unknown camera '{name}' .did you mean '[a-z./]*{suggested}'"):
        lerobot.prepare(request(**{name: IMAGE}))


@pytest.mark.parametrize(
    "picture",
    [IMAGE, IMAGE.ravel(), IMAGE[..., 0], IMAGE.astype(np.float32), np.moveaxis(IMAGE, -1, 0) / 255.0],
    ids=["uint8", "encoded", "grey", "float", "chw"],
)
def test_any_form_of_picture_is_refused(lerobot: RobotPipeline, picture) -> None:
    with pytest.raises(ObservationError, match=r"unknown camera 'top'.*ignored_keys"):
        lerobot.prepare(request(top=picture))


def test_a_nested_picture_is_refused_by_its_path(lerobot: RobotPipeline) -> None:
    with pytest.raises(ObservationError, match="unknown camera 'observation/wrist_image'"):
        lerobot.prepare(request(observation={"wrist_image": IMAGE}))


def test_one_camera_under_two_names_is_refused(lerobot: RobotPipeline) -> None:
    with pytest.raises(ObservationError, match=r"'observation\.images\.front' was sent twice; got also as 'front'"):
        lerobot.prepare(request(**{"observation.images.front": IMAGE}))


def test_what_is_no_picture_passes(lerobot: RobotPipeline) -> None:
    extras = {"reward": 1.0, "done": np.uint8(0), "torque": np.zeros(6), "noise": np.zeros((1, 4, 32)), "wrist": None}
    assert lerobot.prepare(request(**extras)).views == ("front",)


def known(name: str, facts: RobotFacts, characters) -> RobotPipeline:
    stats = NormStats(q01=-np.ones(32), q99=np.ones(32))
    return RobotPipeline(resolve(replace(facts, stats={"x": (stats, stats)}), "pi05", embodiment=name), characters)


def test_pictures_that_clients_of_droid_also_send_pass(openpi_facts: RobotFacts, characters) -> None:
    pipeline = known("droid", openpi_facts, characters)
    sent = {
        "observation/exterior_image_1_left": IMAGE,
        "observation/exterior_image_2_left": IMAGE,
        "observation/wrist_image_left": IMAGE,
        "observation/wrist_image_right": IMAGE,
        "observation/joint_position": np.zeros(7),
        "observation/gripper_position": 0.0,
        "prompt": "x",
    }
    assert pipeline.prepare(sent).views == ("base_0_rgb", "left_wrist_0_rgb")
    with pytest.raises(ObservationError, match="unknown camera 'observation/exterior_image_3_left'"):
        pipeline.prepare({**sent, "observation/exterior_image_3_left": IMAGE})


def test_openpi_robots_refuse_them_too(openpi_facts: RobotFacts, characters) -> None:
    pipeline = known("libero", openpi_facts, characters)
    sent = {"observation/image": IMAGE, "observation/wrist_image": IMAGE, "prompt": "x"}
    assert pipeline.prepare(sent).views == ("base_0_rgb", "left_wrist_0_rgb")
    with pytest.raises(ObservationError, match="unknown camera 'observation/wirst_image'"):
        pipeline.prepare({**sent, "observation/wirst_image": IMAGE})


def test_a_misspelt_name_is_said_before_the_picture_that_is_missing_then(lerobot: RobotPipeline) -> None:
    sent = request()
    right = next(key for key, value in sent.items() if isinstance(value, np.ndarray) and value.dtype == np.uint8)
    sent[f"{right}x"] = sent.pop(right)
    with pytest.raises(ObservationError, match=f"unknown camera '{right}x' .did you mean"):
        lerobot.see(sent)
