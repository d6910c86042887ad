"""The environment: versions, seeds, tasks, cameras, Gymnasium's rules."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vivace.errors import ConfigError, ShapeError, Unsupported
from vivace.robots.embodiment import check, embodiment
from vivace.sim import render, scene, tasks
from vivace.sim.conveyor import VIEWS, ConveyorEnv
from vivace.sim.expert import act
from vivace.sim.world import HISTORY_TICKS, draw

SCENE_SHA256 = "7468277f8e3c783ab2f0d1109beedd054409887eb94faeb2d5e17d1188e679c3"
FORWARD = np.array([0.2, 0.3, -0.4, -1.0], np.float32)


def play(env, seed, ticks=40, **options):
    env.reset(seed=seed, options=options)
    states = []
    for _ in range(ticks):
        env.step(act(env.sight()))
        states.append(np.array(env.world.data.qpos))
    return np.stack(states)


# --- versions and seeds ---------------------------------------------------------------------------------------------


def test_scene_is_the_one_that_stored_results_name():
    """A changed scene is a changed benchmark: change this hash only together with the committed results."""
    assert scene.scene_sha256() == SCENE_SHA256


def test_hash_moves_with_any_file(tmp_path):
    copy = shutil.copytree(scene.ASSETS, tmp_path / "assets")
    assert scene.scene_sha256(copy) == scene.scene_sha256()
    mesh = next(copy.rglob("l6.stl"))
    mesh.write_bytes(mesh.read_bytes()[:-1] + b"\x01")
    assert scene.scene_sha256(copy) != scene.scene_sha256()


def test_assets_are_small_and_carry_their_notice():
    files = [path for path in scene.ASSETS.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 4e6
    assert sum(path.stat().st_size for path in files) < 6e6
    assert "Copyright (c) 2019 Meta-World Team" in (scene.ASSETS / "LICENSE").read_text()


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_equal_seeds_give_equal_episodes_also_in_a_used_environment(name):
    used, fresh = ConveyorEnv(name), ConveyorEnv(name)
    play(used, seed=1)
    assert np.array_equal(play(used, seed=2), play(fresh, seed=2))
    assert not np.array_equal(play(used, seed=3), play(fresh, seed=2))


def test_a_seed_means_the_start_that_it_meant_when_results_were_stored():
    start = draw(tasks.task("conveyor"), (0.05, 0.15), np.random.default_rng(0))
    assert (start.cubes, start.target) == (("green", "red"), "red")
    assert np.allclose([*start.hand_m, start.belt_m_s], [0.0273923, 0.5215829, 0.1632779, -0.131327], atol=1e-6)


def test_every_step_says_which_scene_and_simulator():
    env = ConveyorEnv("static")
    _, info = env.reset(seed=0)
    assert info["scene_sha256"] == SCENE_SHA256
    assert info["mujoco"].count(".") == 2
    assert env.step(FORWARD)[4]["scene_sha256"] == SCENE_SHA256


# --- Gymnasium ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
def test_gymnasium_accepts_the_environment(images):
    env = ConveyorEnv("conveyor", images=images, image_px=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not within the observation space.*spec.*")
        check_env(env, skip_render_check=True)
    env.close()


def test_bad_actions_tasks_and_options_are_named():
    env = ConveyorEnv("static")
    env.reset(seed=0)
    for action in (np.zeros(3), np.full(4, np.nan)):
        with pytest.raises(ShapeError, match="action"):
            env.step(action)
    with pytest.raises(ConfigError, match="bimodal"):
        ConveyorEnv("juggle")
    with pytest.raises(ConfigError, match="unknown reset option"):
        env.reset(options={"evnt": False})


def test_robot_of_the_engine_is_the_environment():
    robot = embodiment("conveyor", "pi05")
    check(robot, where="conveyor")
    env = ConveyorEnv()
    env.reset(seed=0)
    assert tuple(camera.view for camera in robot.cameras) == VIEWS
    assert (robot.action_dim, robot.control_hz) == (env.action_space.shape[0], env.control_hz)
    assert sum(part.size for part in robot.state) == len(env.feel().state)


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_cubes_ride_on_the_belt_and_rest_without_it():
    for name, moves in (("conveyor", True), ("static", False)):
        env = ConveyorEnv(name)
        _, info = env.reset(seed=4)
        x = env.sight().target_m[0]
        for _ in range(50):
            env.step(np.zeros(4))
        assert env.sight().target_m[0] - x == pytest.approx(info["belt_m_s"] if moves else 0.0, abs=0.003)


def test_belt_speed_is_the_difficulty():
    env = ConveyorEnv("conveyor", belt_m_s=tasks.SPEEDS_M_S["fast"])
    speeds = [env.reset(seed=seed)[1]["belt_m_s"] for seed in range(20)]
    assert all(0.25 <= abs(speed) <= 0.35 for speed in speeds)
    assert min(speeds) < 0 < max(speeds)


@pytest.mark.parametrize("name", ["perturb", "perturb-moving"])
def test_the_target_jumps_in_every_episode_to_a_free_place(name):
    env = ConveyorEnv(name)
    for seed in range(30):
        _, info = env.reset(seed=seed)
        x = []
        for _ in range(info["event_tick"] + 1):
            x.append(env.sight().target_m[0])
            env.step(np.zeros(4))
        (other,) = (env.world.cube_m(cube) for cube in env.world.drawn.cubes if cube != env.world.target)
        assert 0.06 < abs(x[-1] - x[-2]) < 0.28, seed
        assert abs(other[0] - env.sight().target_m[0]) > 0.06, seed


@pytest.mark.parametrize("name", ["perturb", "swap"])
def test_the_event_comes_at_its_tick_and_the_twin_has_none(name):
    env, twin = ConveyorEnv(name), ConveyorEnv(name)
    _, info = env.reset(seed=5)
    twin.reset(seed=5, options={"event": False})
    event = info["event_tick"]
    for tick in range(event + 1):
        same = np.allclose(env.sight().target_m, twin.sight().target_m, atol=1e-9)
        assert same == (tick < event), tick
        assert (env.prompt == twin.prompt) == (tick < event or name == "perturb")
        env.step(np.zeros(4))
        twin.step(np.zeros(4))


@pytest.mark.parametrize("name", ["perturb-cube", "perturb-cube-moving"])
def test_a_second_cube_comes_near_the_target_which_stays(name):
    env = ConveyorEnv(name)
    for seed in range(8):
        _, info = env.reset(seed=seed)
        other = next(cube for cube in env.world.drawn.cubes if cube != env.world.target)
        for tick in range(info["event_tick"] + 5):
            there = abs(env.world.cube_m(other)[1] - scene.BELT_Y_M) < 0.07
            assert there == (tick >= info["event_tick"]), (seed, tick)
            env.step(np.zeros(4))
        apart = abs(env.world.cube_m(other)[0] - env.sight().target_m[0])
        assert 0.06 < apart < 0.14
        assert env.world.target == env.world.drawn.target


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name.endswith("-moving")])
def test_moving_variants_are_their_task_on_the_slow_belt(name):
    still = tasks.task(name.removesuffix("-moving"))
    assert tasks.task(name) == replace(still, name=name, belt_m_s=tasks.SPEEDS_M_S["slow"])


def test_gymnasium_makes_the_named_tasks():
    with gymnasium.make("vivace/Conveyor-v0", task="swap", image_px=32) as env:
        observation, info = env.reset(seed=3)
        assert info["task"] == "swap"
        assert observation[VIEWS[0]].shape == (32, 32, 3)
        assert env.observation_space.contains(observation)
        assert env.unwrapped.control_hz == 50.0
    for name in tasks.TASKS:
        with gymnasium.make(f"vivace/Conveyor-{name}-v0", images=False) as env:
            assert env.unwrapped.task == tasks.task(name)
            assert set(env.reset(seed=0)[0]) == {"state", "prompt"}
    with pytest.raises(ConfigError, match="unknown task"):
        gymnasium.make("vivace/Conveyor-v0", task="juggle")


def test_success_before_the_swap_does_not_count():
    """The first cube stays in the hand after the swap: that is the wrong object."""
    env = ConveyorEnv(tasks.Task("late", event="swap", event_ticks=(90, 90)))
    env.reset(seed=0)
    first = env.world.target
    for _ in range(120):
        env.step(act(env.sight()) if env.world.target == first else env.hold(np.ones(4)))
    assert not env.world.score.success
    assert env.world.score.wrong_object


def test_the_post_must_not_be_touched_and_cannot_be_passed_above():
    env = ConveyorEnv("bimodal")
    env.reset(seed=0)
    for _ in range(60):
        ended = env.step(np.array([0.0, 1.0, 1.0, -1.0]))[2]
        if ended:
            break
    assert env.world.score.collision
    assert env.sight().hand_m[2] < 0.25


# --- cameras --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
    """A `distract` episode watched at every tick: [(views, target)], and the environment."""
    env = ConveyorEnv(tasks.Task("flicker", belt_m_s=(0.1, 0.1), blobs=2, flicker=0.4), image_px=64)
    env.reset(seed=1)
    looks = [env.look()]
    for _ in range(HISTORY_TICKS + 3):
        env.step(FORWARD)
        looks.append(env.look())
    yield looks, env
    env.close()


def test_the_third_view_is_the_front_view_of_100_ms_ago(seen):
    looks, _ = seen
    front, before = VIEWS[0], VIEWS[2]
    for tick in range(HISTORY_TICKS, len(looks)):
        assert np.array_equal(looks[tick].views[before], looks[tick - HISTORY_TICKS].views[front])
        assert not np.array_equal(looks[tick].views[before], looks[tick].views[front])
    assert np.array_equal(looks[2].views[before], looks[0].views[front])  # before 100 ms: the first frame


def test_views_are_square_images_and_the_exposure_flickers(seen):
    looks, env = seen
    assert env.renderer in ("egl", "osmesa")
    assert all(view.shape == (64, 64, 3) and view.dtype == np.uint8 for view in looks[0].views.values())
    brightness = [look.views[VIEWS[0]].mean() for look in looks]
    assert max(brightness) > 1.2 * min(brightness)
    assert np.array_equal(env.look().views[VIEWS[0]], env.look().views[VIEWS[0]])


def test_the_front_camera_shows_the_cubes_that_are_there():
    env = ConveyorEnv("static", image_px=96)
    for seed in range(4):
        env.reset(seed=seed)
        view = env.look().views[VIEWS[0]].astype(int)
        belt = view[40:]  # below the arm, which is dark red
        strong = {
            "red": (belt[..., 0] > 150) & (belt[..., 1:].max(-1) < 70),
            "green": (belt[..., 1] > 110) & (belt[..., ::2].max(-1) < 70),
            "blue": (belt[..., 2] > 150) & (belt[..., :2].max(-1) < 110),
        }
        there = {name for name, mask in strong.items() if mask.sum() >= 8}
        assert there == set(env.world.drawn.cubes)
    env.close()


def test_a_library_without_a_driver_is_noticed(monkeypatch):
    """As MuJoCo says it: an ImportError when the context is made, not when the module is loaded."""
    name = render.choose()
    assert render._works(name)

    def context(width, height):
        raise ImportError("Cannot initialize a EGL device display")

    monkeypatch.setattr(f"mujoco.{name}.GLContext", context)
    with pytest.raises(Unsupported, match=f"{name} gives no OpenGL context.*EGL device display"):
        render.Renderer(scene.load(), 8, library=name)
    monkeypatch.setattr(render.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1))
    render._works.cache_clear()
    assert not render._works(name)
    render._works.cache_clear()


def test_the_gl_library_is_chosen_by_what_is_installed(monkeypatch):
    def installed(*names):
        monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so" if name in names else None)

    installed("EGL", "OSMesa")
    monkeypatch.setattr(render, "_works", lambda name: True)
    assert render.choose() == "egl"
    assert render.choose("osmesa") == "osmesa"
    monkeypatch.setattr(render, "_works", lambda name: False)
    assert render.choose() == "osmesa"
    installed("EGL")
    assert render.choose() == "egl"
    installed("OSMesa")
    assert render.choose() == "osmesa"
    installed()
    with pytest.raises(Unsupported, match=r"neither is installed.*make system"):
        render.choose()
    with pytest.raises(Unsupported, match="'glx'"):
        render.choose("glx")
