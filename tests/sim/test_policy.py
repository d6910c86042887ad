"""The served policy, whole, in the loop: a random network sees the cameras, gives chunks, and picks up nothing."""

from __future__ import annotations

import numpy as np

import vivace
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.sim.conveyor import ACTION_DIM, STATE_DIM, VIEWS, ConveyorEnv
from vivace.sim.rollout import Execution, rollout
from vivace.sim.tasks import Task


def test_a_checkpoint_of_the_conveyor_drives_the_arm(tmp_path):
    recipe = Recipe(
        size="tiny", format="lerobot", horizon=16, cameras=VIEWS, state_dim=STATE_DIM, action_dim=ACTION_DIM
    )
    make_checkpoint(tmp_path / "policy", recipe)
    policy = vivace.load_policy(tmp_path / "policy", embodiment="conveyor")
    env = ConveyorEnv(Task("short", max_ticks=20), image_px=64)
    execution = Execution("aligned", execute_ticks=8, delay_ticks=2)
    runs = [rollout(env, policy.infer, seed=0, execution=execution) for _ in range(2)]
    env.close()
    assert runs[0].looks == (0, 8, 16)
    assert not runs[0].success
    assert np.ptp(runs[0].actions[2:], axis=0).min() > 0
    assert np.array_equal(runs[0].actions, runs[1].actions)
