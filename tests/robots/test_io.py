"""How a checkpoint's facts and the user's choice become one RobotIO, and every way in which they may not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from vivace.errors import ConfigError
from vivace.robots.embodiment import embodiment, from_toml
from vivace.robots.io import from_features, infer_embodiment, resolve
from vivace.types import NormStats, RobotFacts


def with_assets(facts: RobotFacts, *assets: str) -> RobotFacts:
    (pair,) = facts.stats.values()
    return replace(facts, stats=dict.fromkeys(assets, pair))


def wide_enough(n: int) -> tuple[NormStats, NormStats]:
    import numpy as np

    stats = NormStats(mean=np.zeros(n), std=np.ones(n), q01=-np.ones(n), q99=np.ones(n))
    return stats, stats


@pytest.mark.parametrize(
    ("asset", "robot"),
    [
        ("droid", "droid"),
        ("trossen", "aloha"),
        ("physical-intelligence/libero", "libero"),
        ("libero", "libero"),
        ("lerobot/aloha_sim_transfer_cube_human", "aloha_sim"),
        ("me/my_robot", None),
        ("libero_mine", None),
    ],
)
def test_inference_from_the_asset_id(asset: str, robot: str | None) -> None:
    assert infer_embodiment(asset) == robot


def test_openpi_defaults(openpi_facts: RobotFacts, toml: Path) -> None:
    io = resolve(openpi_facts, "pi05", embodiment=toml)
    assert (io.image, io.image_pad, io.max_prompt_tokens, io.action_width) == ("pil", 0.0, 200, 32)
    assert io.normalization.flavour == "openpi"
    assert resolve(openpi_facts, "pi0", embodiment=str(toml)).max_prompt_tokens == 48
    assert resolve(openpi_facts, "pi0", embodiment=toml, max_prompt_tokens=100).max_prompt_tokens == 100
    assert resolve(replace(openpi_facts, max_prompt_tokens=64), "pi0", embodiment=toml).max_prompt_tokens == 64


def test_the_vocabulary_is_handed_through(openpi_facts: RobotFacts, toml: Path) -> None:
    assert resolve(openpi_facts, "pi05", embodiment=toml).vocab_size == 0
    assert resolve(openpi_facts, "pi05", embodiment=toml, vocab_size=512).vocab_size == 512


def test_openpi_needs_an_embodiment(openpi_facts: RobotFacts) -> None:
    with pytest.raises(ConfigError, match=r"which robot.*'so101'.*aloha.*droid.*libero.*--embodiment"):
        resolve(openpi_facts, "pi05")


def test_openpi_chooses_statistics(openpi_facts: RobotFacts, toml: Path) -> None:
    robot = from_toml(toml)
    several = with_assets(openpi_facts, "so101", "other")
    with pytest.raises(ConfigError, match=r"several robots.*'other', 'so101'.*--asset-id"):
        resolve(several, "pi05", embodiment=robot)
    with pytest.raises(ConfigError, match="several robots"):
        resolve(several, "pi05")
    assert resolve(several, "pi05", embodiment=robot, asset_id="other").embodiment == robot
    with pytest.raises(ConfigError, match=r"no such asset id; got 'third'.*--asset-id"):
        resolve(several, "pi05", embodiment=robot, asset_id="third")
    with pytest.raises(ConfigError, match=r"no normalisation statistics.*; copy the assets folder"):
        resolve(replace(openpi_facts, stats={}), "pi05", embodiment=robot)


def test_a_known_robot_finds_its_own_statistics(openpi_facts: RobotFacts) -> None:
    facts = replace(openpi_facts, stats={"droid": wide_enough(8), "trossen": wide_enough(14)})
    io = resolve(facts, "pi05", embodiment="droid")
    assert len(io.normalization.state.mean) == 8
    assert len(resolve(facts, "pi05", embodiment="aloha").normalization.state.mean) == 14


def test_sizes_must_fit_the_statistics(openpi_facts: RobotFacts) -> None:
    with pytest.raises(ConfigError, match="does not fit the checkpoint's state statistics; got state of 14; wanted 6"):
        resolve(openpi_facts, "pi05", embodiment="aloha")
    padded = replace(openpi_facts, stats={"x": wide_enough(32)})
    assert resolve(padded, "pi05", embodiment="aloha").embodiment.name == "aloha"


def test_missing_statistics_are_found_at_once(openpi_facts: RobotFacts, toml: Path) -> None:
    facts = replace(openpi_facts, stats={"x": (NormStats(), replace(wide_enough(6)[0], q99=None))})
    with pytest.raises(ConfigError, match=r"statistics of action lack .*q01 and q99"):
        resolve(facts, "pi05", embodiment=toml)


def test_lerobot_builds_its_robot(lerobot_facts: RobotFacts) -> None:
    io = resolve(lerobot_facts, "pi05")
    robot = io.embodiment
    assert (io.image, io.normalization.flavour) == ("torch", "lerobot")
    assert [camera.view for camera in robot.cameras] == ["front", "wrist"]
    assert not any(camera.required for camera in robot.cameras)
    assert robot.delta_mask == (True,) * 5 + (False,)
    assert robot.action_dim == 6


def test_lerobot_rename_map(lerobot_facts: RobotFacts) -> None:
    swap = {
        "observation.images.front": "observation.images.wrist",
        "observation.images.wrist": "observation.images.front",
    }
    front, wrist = from_features(replace(lerobot_facts, rename=swap)).cameras
    assert (front.view, front.key) == ("front", "observation.images.wrist")
    assert "front" not in front.aliases
    assert "wrist" not in wrist.aliases
    added = from_features(replace(lerobot_facts, rename={"observation.images.cam0": "observation.images.front"}))
    assert added.cameras[0].key == "observation.images.cam0"
    assert {"front", "cam0", "observation.images.front"} <= set(added.cameras[0].aliases)


def test_lerobot_single_image_feature(lerobot_facts: RobotFacts) -> None:
    (camera,) = from_features(replace(lerobot_facts, cameras=("observation.image",))).cameras
    assert (camera.view, camera.key) == ("image", "observation.image")
    assert "image" in camera.aliases


def test_lerobot_without_features(lerobot_facts: RobotFacts) -> None:
    with pytest.raises(ConfigError, match="does not describe its robot"):
        resolve(replace(lerobot_facts, cameras=()), "pi05")


def test_lerobot_toml_override_keeps_the_checkpoints_actions(lerobot_facts: RobotFacts, toml: Path) -> None:
    io = resolve(lerobot_facts, "pi05", embodiment=toml)
    assert io.embodiment.name == "so101"
    assert io.embodiment.delta_mask == lerobot_facts.relative_mask
    with pytest.raises(ConfigError, match="contradicts the checkpoint's relative actions"):
        resolve(replace(lerobot_facts, relative_mask=()), "pi05", embodiment=toml)
    plain = replace(from_toml(toml), delta_mask=())
    assert resolve(lerobot_facts, "pi05", embodiment=plain).embodiment.delta_mask == lerobot_facts.relative_mask
    with pytest.raises(ConfigError, match="LeRobot policies do not have"):
        resolve(lerobot_facts, "pi05", embodiment=replace(plain, state_in_prompt=False))


def test_lerobot_with_a_known_name_takes_no_openpi_conventions(lerobot_facts: RobotFacts) -> None:
    facts = replace(lerobot_facts, stats={"": wide_enough(14)}, relative_mask=())
    robot = resolve(facts, "pi05", embodiment="aloha").embodiment
    assert robot.cameras == embodiment("aloha", "pi05").cameras
    assert (robot.delta_mask, robot.joint_signs, robot.gripper_adapter, robot.state_in_prompt) == ((), (), "none", True)


def test_lerobot_statistics_must_fit_exactly(lerobot_facts: RobotFacts) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        resolve(replace(lerobot_facts, stats={"": wide_enough(32)}), "pi05")
    assert resolve(replace(lerobot_facts, stats={}), "pi05").normalization.state == NormStats()
