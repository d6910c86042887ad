"""Robots as data: the known ones, and TOML files that are right or wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vivace.errors import ConfigError
from vivace.robots.aloha import gripper_from_angle, gripper_to_angle
from vivace.robots.embodiment import EMBODIMENTS, check, embodiment, from_toml
from vivace.types import Embodiment


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("name", EMBODIMENTS)
def test_known_robots_are_consistent(name: str, kind) -> None:
    robot = embodiment(name, kind)
    check(robot, where=name)
    assert robot.name == name


def test_delta_masks_depend_on_the_kind() -> None:
    assert embodiment("libero", "pi0").delta_mask == (True,) * 6 + (False,)
    assert embodiment("libero", "pi05").delta_mask == ()
    assert not embodiment("libero", "pi05").state_in_prompt
    assert embodiment("droid", "pi05").delta_mask == ()
    assert embodiment("droid_jointpos", "pi0").delta_mask == (True,) * 7 + (False,)
    assert embodiment("aloha", "pi05").delta_mask == ((True,) * 6 + (False,)) * 2
    assert embodiment("aloha_sim", "pi0").delta_mask == ()


def test_unknown_name_suggests() -> None:
    with pytest.raises(ConfigError, match="did you mean 'libero'"):
        embodiment("libreo", "pi0")


def test_gripper_conversions_have_the_documented_end_points() -> None:
    # by hand: 0.01844 m closed, 0.058 m (= horn + rod, arm stretched) open
    closed = np.arcsin((0.022**2 + 0.01844**2 - 0.036**2) / (2 * 0.022 * 0.01844))
    assert gripper_to_angle(np.asarray([0.0]))[0] == pytest.approx((closed - 0.5476) / (1.6296 - 0.5476), abs=1e-12)
    assert gripper_to_angle(np.asarray([1.0]))[0] == pytest.approx((np.pi / 2 - 0.5476) / (1.6296 - 0.5476), abs=1e-7)
    assert gripper_from_angle(np.asarray([0.0]))[0] == pytest.approx((0.5476 + 0.6213) / (1.4910 + 0.6213), abs=1e-12)


def test_example_file(toml: Path) -> None:
    robot = from_toml(toml)
    assert [(c.view, c.key, c.required) for c in robot.cameras] == [
        ("base_0_rgb", "cameras/front", True),
        ("left_wrist_0_rgb", "cameras/wrist", False),
    ]
    assert [(part.key, part.size) for part in robot.state] == [("joints", 5), ("gripper", 1)]
    assert robot.delta_mask == (True,) * 5 + (False,)
    assert robot.control_hz == 30.0
    assert robot.metadata == {"reset_pose": [0.0, -1.0, 1.0, 0.5, 0.0]}
    assert robot.default_prompt == "pick up the cube"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("action_dim = 6", "action_dims = 6"), "unknown key 'action_dims' \\(did you mean 'action_dim'"),
        (('units = "rad"', 'unit = "rad"'), "state\\[0\\]: unknown key 'unit' \\(did you mean 'units'"),
        (('view = "base_0_rgb"', 'veiw = "base_0_rgb"'), "did you mean 'view'"),
        (('name = "so101"', ""), "key 'name' is missing"),
        (("action_dim = 6", 'action_dim = "6"'), "action_dim: wrong type; got '6' \\(str\\); wanted int"),
        (("action_dim = 6", "action_dim = true"), "wrong type"),
        (("size = 5", "size = 5.0"), "state\\[0\\]: size: wrong type"),
        (("true, false]", "true, 0]"), "delta_mask: wrong type"),
        (("action_dim = 6", "action_dim = 5"), "delta_mask is longer"),
        (('view = "left_wrist_0_rgb"', 'view = "base_0_rgb"'), "same view"),
        (('"0 closed .. 1 open"]', "]"), "action_units must have 6"),
        (("control_hz = 30.0", "control_hz = -1"), "control_hz"),
        (("control_hz = 30.0", "gripper_adapter = 'aloha'"), "needs gripper_dims"),
        (("control_hz = 30.0", "gripper_adapter = 'other'\ngripper_dims = [5]"), "'none' or 'aloha'"),
        (("control_hz = 30.0", "gripper_dims = [6]"), "gripper_dims lie outside"),
        (("control_hz = 30.0", "joint_signs = [1, -1]"), "joint_signs must have one number"),
        (("action_dim = 6", "action_dim = "), "cannot read"),
        (("[metadata]", "[[metadata]]"), "metadata: wrong type"),
    ],
)
def test_wrong_files_name_the_key(toml: Path, tmp_path: Path, change: tuple[str, str], match: str) -> None:
    text = toml.read_text()
    assert change[0] in text
    path = tmp_path / "robot.toml"
    path.write_text(text.replace(change[0], change[1], 1))
    with pytest.raises(ConfigError, match=match) as caught:
        from_toml(path)
    assert str(path) in str(caught.value)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        from_toml(tmp_path / "none.toml")


def test_every_field_can_be_written_in_toml(tmp_path: Path) -> None:
    """A new field of the records needs a type in embodiment.py, or TOML files could not name it."""
    path = tmp_path / "all.toml"
    path.write_text(
        """
name = "all"
action_dim = 2
delta_mask = [true, false]
joint_signs = [1, -1.0]
gripper_dims = [1]
gripper_adapter = "aloha"
state_in_prompt = false
prompt_key = "task"
ignored_keys = ["x"]
control_hz = 10
action_units = ["m", "m"]
default_prompt = "go"
cameras = [{ view = "v", key = "k", required = false, chw = true, aliases = ["a"] }]
state = [{ key = "s", size = 2, units = "m", aliases = ["b"] }]
metadata = { a = 1 }
"""
    )
    robot = from_toml(path)
    plain = Embodiment("all", (), (), 1)
    unchanged = [name for name in vars(plain) if name != "name" and getattr(robot, name) == getattr(plain, name)]
    assert unchanged == []
    assert [robot.cameras[0].aliases, robot.state[0].aliases] == [("a",), ("b",)]


def test_check_refuses_a_robot_without_cameras(toml: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        check(replace(from_toml(toml), cameras=()), where="here")


def test_the_guide_shows_the_tested_file(toml: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "adding-a-robot.md").read_text()
    shown = guide.partition("```toml\n")[2].partition("```")[0]
    assert shown.strip() == toml.read_text().partition("\n")[2].strip()
    for field in (*vars(Embodiment("x", (), (), 1)), "view", "chw", "size", "units", "aliases"):
        assert f"`{field}`" in guide, f"the guide does not explain {field}"
