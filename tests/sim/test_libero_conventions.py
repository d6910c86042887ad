"""What openpi and LeRobot each do around LIBERO: images, state, gripper, settling, limits."""

from __future__ import annotations

import numpy as np
import pytest
from fake_libero import Process

from vivace.errors import ConfigError, ObservationError, ShapeError
from vivace.sim.libero.conventions import (
    ACTION_DIM,
    CAMERAS,
    CLOSE,
    CONVENTIONS,
    LEROBOT,
    OPEN,
    OPENPI,
    SUITES,
    axis_angle,
    convention,
)  # fmt: skip
from vivace.sim.libero.environment import LiberoEnv, tasks_of

BOTH = pytest.mark.parametrize("chosen", [OPENPI, LEROBOT], ids=lambda one: one.name)


@BOTH
def test_images_are_rotated_by_180_degrees(chosen):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    seen = chosen.view(pixels)
    assert seen.shape == pixels.shape
    assert seen.flags.c_contiguous
    assert all((seen[i, j] == pixels[4 - i, 6 - j]).all() for i in range(5) for j in range(7))
    assert not np.array_equal(seen, pixels[::-1])  # upright alone is another picture


@BOTH
@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4), np.uint8)]
)
def test_other_images_are_refused(chosen, bad):
    with pytest.raises(ShapeError):
        chosen.view(bad)


@BOTH
def test_state_is_position_axis_angle_fingers(chosen):
    half = np.sin(np.pi / 4)
    state = chosen.state([0.1, 0.2, 0.3], [0.0, half, 0.0, half], [0.04, -0.04])
    assert state.dtype == chosen.state_dtype
    np.testing.assert_allclose(state, [0.1, 0.2, 0.3, 0, np.pi / 2, 0, 0.04, -0.04], atol=1e-6)


def test_the_two_families_differ_in_the_width_of_the_state():
    assert (OPENPI.state_dtype, LEROBOT.state_dtype) == (np.float64, np.float32)


@pytest.mark.parametrize("bad", [([0, 0], [0, 0, 0, 1], [0, 0]), ([0, 0, np.nan], [0, 0, 0, 1], [0, 0])])
def test_a_broken_state_is_refused(bad):
    with pytest.raises(ObservationError):
        OPENPI.state(*bad)


def matrix(quat):
    x, y, z, w = quat
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rodrigues(vector):
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def test_axis_angle_is_the_rotation_of_the_quaternion():
    for quat in np.random.default_rng(1).standard_normal((100, 4)):
        quat /= np.linalg.norm(quat)
        np.testing.assert_allclose(rodrigues(axis_angle(quat)), matrix(quat), atol=1e-12)


def test_axis_angle_is_not_the_shortest_one():
    """q and -q are one rotation and two states, as in the data: the hand of LIBERO hangs at about pi and crosses it."""
    angle = 3.3
    quat = np.array([np.sin(angle / 2), 0, 0, np.cos(angle / 2)])
    assert quat[3] < 0
    np.testing.assert_allclose(axis_angle(quat), [3.3, 0, 0], atol=1e-12)
    np.testing.assert_allclose(axis_angle(-quat), [3.3 - 2 * np.pi, 0, 0], atol=1e-12)


@pytest.mark.parametrize("w", [1.0, -1.0, 1.0 + 1e-9])
def test_no_rotation_has_no_axis(w):
    assert (axis_angle([0.0, 0.0, 0.0, w]) == 0).all()


@BOTH
def test_actions_pass_as_they_are_and_minus_one_opens(chosen):
    action = np.array([0.1, -0.2, 1.7, 0, 0, 0.5, 0.9], np.float32)
    np.testing.assert_array_equal(chosen.command(action), action.astype(np.float64))  # the controller clips
    assert (OPEN, CLOSE) == (-1.0, 1.0)
    assert chosen.idle.tolist() == [0, 0, 0, 0, 0, 0, OPEN]


def test_a_policy_of_the_other_sign_is_turned_round():
    other = OPENPI.__class__(**{**vars(OPENPI), "gripper_sign": -1.0})
    assert other.command(np.array([0.0] * 6 + [1.0]))[-1] == OPEN
    env = LiberoEnv("libero_object", 0, convention=other, process=Process())
    env.reset(seed=0)
    assert other.command(env.hold(None))[-1] == OPEN


@pytest.mark.parametrize("bad", [np.zeros(4), np.zeros((1, 7))])
def test_actions_of_another_robot_are_refused(bad):
    with pytest.raises(ShapeError):
        OPENPI.command(bad)


def test_limits_of_the_suites():
    limits = {name: tuple(one.limit(suite) for suite in SUITES) for name, one in CONVENTIONS.items()}
    assert SUITES == ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    assert limits == {"openpi": (220, 280, 300, 520, 400), "lerobot": (280, 280, 300, 520, 400)}
    assert [tasks_of(suite) for suite in SUITES] == [10, 10, 10, 10, 90]


def test_sizes_and_horizons():
    assert (OPENPI.image_px, OPENPI.execute_ticks, OPENPI.settle_ticks) == (256, 5, 10)
    assert (LEROBOT.image_px, LEROBOT.execute_ticks, LEROBOT.settle_ticks) == (360, 10, 10)
    assert ACTION_DIM == 7
    assert CAMERAS == {"base_0_rgb": "agentview", "left_wrist_0_rgb": "robot0_eye_in_hand"}


def test_unknown_names():
    with pytest.raises(ConfigError, match="openpi"):
        convention("gr00t")
    with pytest.raises(ConfigError, match="libero_object"):
        OPENPI.limit("libero_object_with_mug")


@BOTH
def test_an_episode_begins_settled_with_the_no_op(chosen):
    process = Process()
    env = LiberoEnv("libero_object", 3, convention=chosen, process=process)
    env.reset(seed=17)
    assert process.scene.resets == [(17, 24, 10, (0, 0, 0, 0, 0, 0, -1))]
    assert process.scene.settled == 10


@BOTH
def test_a_look_is_what_the_policy_expects(chosen):
    process = Process()
    env = LiberoEnv("libero_object", 3, convention=chosen, process=process)
    env.reset(seed=0)
    seen, size = env.look(), chosen.image_px
    assert seen.prompt == "pick up thing 3"
    assert list(seen.views) == list(CAMERAS)
    for i, view in enumerate(seen.views.values()):
        assert view.shape == (size, size, 3)
        assert view[0, 0].tolist() == [(size - 1) % 256, (size - 1) % 256, i]  # the last pixel of that camera
    np.testing.assert_allclose(seen.state[3:6], [np.pi, 0, 0], atol=1e-6)
    assert env.feel().views == {}
