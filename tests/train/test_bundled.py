"""The policies that come with vivace: found by name, small, and reading what they are shown and told."""

from __future__ import annotations

import numpy as np
import pytest

import vivace
from vivace.checkpoints import bundled
from vivace.config import EngineConfig
from vivace.sim.conveyor import ConveyorEnv
from vivace.types import Observation


@pytest.mark.parametrize("name", bundled.names())
def test_a_bundled_policy_loads_and_reads_picture_state_and_instruction(name):
    folder = bundled.find(bundled.POLICIES / name)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 12e6
    policy = vivace.load_policy(name, config=EngineConfig(device="cpu"))
    assert policy.engine.horizon >= 16
    assert (policy.io.embodiment.action_dim, len(policy.io.embodiment.cameras)) == (4, 3)
    assert policy.checkpoint.rtc.training_max_delay >= 5
    env = ConveyorEnv("static", image_px=policy.io.image_size)
    env.reset(seed=3)
    seen = env.look()
    env.close()
    noise = np.random.default_rng(0).normal(size=(policy.engine.horizon, policy.io.action_width)).astype(np.float32)
    other = next(colour for colour in env.world.drawn.cubes if colour != env.world.target)
    black = {view: np.zeros_like(image) for view, image in seen.views.items()}
    changed = {
        "instruction": Observation(seen.views, seen.state, f"pick up the {other} cube"),
        "pictures": Observation(black, seen.state, seen.prompt),
        "state": Observation(seen.views, seen.state - np.float32(0.05), seen.prompt),
    }
    actions = policy.infer(seen, noise=noise).actions
    assert actions.shape == (policy.engine.horizon, 4)
    assert np.abs(actions).max() < 2.5
    for what, observation in changed.items():
        difference = np.abs(policy.infer(observation, noise=noise).actions - actions).max()
        assert difference > 0.05, f"{what} does not matter ({difference:.3f})"
