"""Demonstrations: labels, noise, looks, processes; and episodes with a policy at the other end of a pipe."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vivace.errors import ConfigError, WorkerDied
from vivace.sim import expert
from vivace.sim.conveyor import VIEWS, ConveyorEnv
from vivace.sim.record import Plan, Source, record, record_episode
from vivace.sim.rollout import Execution
from vivace.train import closed_loop
from vivace.train.simulator import Answered

PX = 16


@pytest.fixture(scope="module")
def env():
    env = ConveyorEnv("conveyor", image_px=PX)
    yield env
    env.close()


@pytest.fixture(scope="module")
def noisy(env):
    return record_episode(env, seed=1_000_003, sigma=(0.5,), horizon=6, stride=5)


def test_labels_are_the_experts_in_the_states_that_the_noise_led_to(env, noisy):
    """Replayed: the executed actions lead to the recorded states, and there the expert says what was recorded."""
    env.reset(seed=noisy.seed)
    for tick in range(len(noisy)):
        assert np.array_equal(env.feel().state, noisy.state[tick])
        assert np.array_equal(expert.act(env.sight()), noisy.action[tick])
        assert np.array_equal(expert.chunk(env.sight(), 6), noisy.chunk[tick])
        assert env.prompt == noisy.prompts[tick]
        env.step(noisy.executed[tick])
    assert np.abs(noisy.executed - noisy.action).max() > 0.2
    assert np.abs(noisy.executed).max() <= 1.0


def test_every_look_is_what_a_policy_would_see(env, noisy):
    assert noisy.ticks[0] == 0
    assert (np.diff(noisy.ticks[2:]) == 5).all()
    env.reset(seed=noisy.seed)
    seen = dict(zip(noisy.ticks.tolist(), noisy.views, strict=True))
    for tick in range(30):
        if tick in seen:
            views = env.look().views
            assert all(np.array_equal(views[name], seen[tick][i]) for i, name in enumerate(VIEWS)), tick
        env.step(noisy.executed[tick])


def test_every_look_is_labelled_for_another_cube_too(env, noisy):
    """Same picture, other instruction, other answer: the hand's place must not stand in for the instruction."""
    env.reset(seed=noisy.seed)
    at = dict(zip(noisy.ticks.tolist(), range(len(noisy.ticks)), strict=True))
    apart = []
    for tick in range(len(noisy)):
        if tick in at:
            text, other = noisy.other_prompts[at[tick]], noisy.other_chunk[at[tick]]
            named = text.split()[3]
            assert named in env.world.drawn.cubes
            assert named != env.world.target
            assert text == f"pick up the {named} cube"
            mine, env.world.target = env.world.target, named
            assert np.array_equal(expert.chunk(env.sight(), 6), other)
            env.world.target = mine
            apart.append(np.abs(other - noisy.chunk[tick]).max())
        env.step(noisy.executed[tick])
    assert np.median(apart) > 0.3


@pytest.mark.parametrize("stride", [1, 3])
def test_other_strides_see_the_same(env, stride):
    demo = record_episode(env, seed=1_000_004, sigma=(0.25,), horizon=2, stride=stride)
    env.reset(seed=demo.seed)
    seen = dict(zip(demo.ticks.tolist(), demo.views, strict=True))
    assert stride > 1 or list(seen) == list(range(len(demo)))
    for tick in range(12):
        if tick in seen:
            assert np.array_equal(env.look().views[VIEWS[2]], seen[tick][2]), tick
        env.step(demo.executed[tick])


def test_without_noise_what_is_labelled_is_executed(env):
    demo = record_episode(env, seed=1_000_005, sigma=(0.0,), horizon=2, stride=50)
    assert np.array_equal(demo.action, demo.executed)
    assert demo.success


def test_processes_do_not_change_the_data():
    plan = Plan((Source("static", 1), Source("conveyor", 2)), image_px=PX, horizon=2, stride=25, seed=3)
    counted = []
    one = list(record(plan))
    two = list(record(plan, processes=2, progress=counted.append))
    assert len(one) == len(two) == 3
    assert counted == [1, 1, 1]
    assert sorted(demo.task for demo in one) == ["conveyor", "conveyor", "static"]
    for a, b in zip(one, two, strict=True):
        assert (a.seed, a.task, a.success) == (b.seed, b.task, b.success)
        assert np.array_equal(a.views, b.views)
        assert np.array_equal(a.executed, b.executed)
    other = next(iter(record(Plan(plan.sources, image_px=PX, horizon=2, stride=25, seed=4))))
    assert other.seed != one[0].seed


def test_bad_plans_are_explained():
    with pytest.raises(ConfigError, match="unknown task"):
        Source("nothing", 3)
    with pytest.raises(ConfigError, match="belt"):
        Source("static", 3, "ludicrous")
    with pytest.raises(ConfigError, match="at least 1"):
        Source("static", 0)
    with pytest.raises(ConfigError, match="no sources"):
        Plan(())
    with pytest.raises(ConfigError, match="stride 0"):
        Plan((Source("static", 1),), stride=0)
    with pytest.raises(ConfigError, match="noise"):
        Plan((Source("static", 1),), sigma=(-1.0,))
    with pytest.raises(ConfigError, match="processes"):
        list(record(Plan((Source("static", 1),)), processes=0))


def answered(actions):
    """A policy's answer whose model space is ten times as wide as the robot's units."""
    return Answered(actions, 10 * actions)


def test_closed_loop_counts_and_collects_what_the_expert_would_do():
    """A policy that stands still fails everywhere; its corrections are the expert's chunks at its looks."""
    sources = (Source("static", 2), Source("conveyor", 1))
    work = closed_loop.jobs(
        sources, first_seed=0, image_px=PX, horizon=6, execution=Execution("aligned", 50, 0), correct=True
    )  # fmt: skip
    sizes = []

    def still(looks):
        sizes.append(len(looks))
        assert all(look.older is None and look.ticks == 0 for look in looks)
        return [answered(np.tile(np.array([0.0, 0, 0, -1], np.float32), (60, 1))) for _ in looks]

    ended = list(closed_loop.run(work, still, processes=2))
    rows = {row["task"]: row for row in closed_loop.rates(ended)}
    assert (rows["static"]["n"], rows["static"]["successes"]) == (2, 0)
    assert rows["static"]["interval"][0] == 0.0
    assert sorted(rows["static"]["failed_seeds"]) == [0, 1]
    assert max(sizes) <= 2
    one = next(item for item in ended if item.job.source.task == "static" and item.job.seed == 0)
    env = ConveyorEnv("static", image_px=PX)
    env.reset(seed=0)
    assert np.array_equal(one.piece.chunk[0], expert.chunk(env.sight(), 6))
    assert np.array_equal(one.piece.views[0, 1], env.look().views[VIEWS[1]])
    assert one.piece.ticks.tolist() == [0, 50, 100, 150, 200]
    assert len(one.piece.executed) == len(one.piece.chunk) == one.ticks, (
        "a plan for every tick, so later ones can follow"
    )
    env.close()


def test_with_a_delay_the_policy_is_told_what_is_executed_meanwhile():
    work = closed_loop.jobs(
        (Source("static", 1),), first_seed=0, image_px=PX, horizon=6, execution=Execution("aligned", 8, 3), correct=True
    )  # fmt: skip
    looks, answers, rng = [], [], np.random.default_rng(0)

    def wander(asked):
        looks.extend(asked)
        answers.extend(answered(rng.uniform(-0.1, 0.1, (20, 4)).astype(np.float32)) for _ in asked)
        return answers[-1:]

    (ended,) = closed_loop.run(work, wander, processes=1)
    piece = ended.piece
    assert looks[0].older is None
    assert looks[0].ticks == 0, "the robot waits for its first chunk"
    for index, look in enumerate(looks[1:]):
        before = answers[index].actions_normalized
        assert look.ticks == 3
        assert np.array_equal(look.older, np.concatenate([before[8:], np.zeros_like(before[:8])]))
        tick = piece.ticks[index + 1]
        assert tick == 8 * (index + 1)
        meanwhile = piece.executed[tick : tick + 3]
        assert np.array_equal(meanwhile, answers[index].actions[8 : 8 + len(meanwhile)])
    env = ConveyorEnv("static", image_px=PX)
    env.reset(seed=0)
    for tick in range(12):
        assert np.array_equal(piece.chunk[tick], expert.chunk(env.sight(), 6)), "the plan from each tick, as it came"
        env.step(piece.executed[tick])
    env.close()


def test_a_simulator_that_dies_is_named():
    work = closed_loop.jobs((Source("static", 1),), first_seed=7, image_px=PX, horizon=6, execution=Execution())

    def killed(looks):
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        return [answered(np.zeros((60, 4), np.float32)) for _ in looks]

    with pytest.raises(WorkerDied, match="exit code -9, task static, seed 7"):
        list(closed_loop.run(work, killed, processes=1))
    with pytest.raises(ConfigError, match="processes"):
        list(closed_loop.run(work, killed, processes=0))


def test_each_thread_may_record():
    """OpenGL contexts belong to threads: what one run opened may not be in the way of the next one's."""
    plan = Plan((Source("static", 1),), image_px=PX, horizon=2, stride=25, seed=3)

    def run():
        return [demo.views for demo in record(plan)]

    with ThreadPoolExecutor(1) as first:
        once = first.submit(run).result()
    with ThreadPoolExecutor(1) as second:
        again = second.submit(run).result()
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_coin_decides_the_way_round_the_post_and_nothing_shown_tells_it():
    near, coin = Source("bimodal", 40), Source("bimodal", 40, way="coin")
    ways = [coin.way_of(seed) for seed in range(200)]
    assert near.way_of(0) is None
    assert 70 < sum(way == 1.0 for way in ways) < 130
    assert ways == [coin.way_of(seed) for seed in range(200)]
    seed = 1_000_000
    env = ConveyorEnv("bimodal", image_px=PX)
    left, right = (record_episode(env, seed=seed, sigma=(0.0,), horizon=8, stride=50, way=way) for way in (-1.0, 1.0))
    assert np.array_equal(left.views[0], right.views[0])
    assert np.array_equal(left.state[0], right.state[0])
    assert left.chunk[0, :, 0].mean() < -0.2 < 0.2 < right.chunk[0, :, 0].mean()
    plain, *_ = record(Plan((Source("bimodal", 1, way="coin"),), image_px=PX, horizon=8, stride=50, sigma=(0.0,)))
    assert np.array_equal(plain.chunk[0], (right if coin.way_of(plain.seed) > 0 else left).chunk[0])
    with pytest.raises(ConfigError, match="no post to pass"):
        Source("static", 1, way="coin")
    with pytest.raises(ConfigError, match="wanted near or coin"):
        Source("bimodal", 1, way="dice")
