"""Time grids, embeddings, guidance weights and guidance: values from the originals and from the formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vivace.errors import ConfigError, ShapeError
from vivace.model import flow
from vivace.types import PreviousChunk


def test_grids_are_those_of_openpi_and_lerobot():
    """Values printed by openpi (float32 accumulation) and LeRobot (direct); pi05.md section 1.11."""
    openpi = [1, 0.8999999762, 0.7999999523, 0.6999999285, 0.5999999046, 0.4999999106, 0.3999999166, 0.2999999225,
              0.1999999285, 0.0999999269]  # fmt: skip
    assert flow.time_grid(10, "accumulated") == pytest.approx(openpi, abs=1e-10)
    assert flow.time_grid(10, "direct") == [float(torch.tensor(1 - s / 10, dtype=torch.float32)) for s in range(10)]
    assert flow.time_grid(10, "accumulated") != flow.time_grid(10, "direct")
    with pytest.raises(ConfigError):
        flow.time_grid(0, "direct")


def test_time_embedding_is_the_formula():
    t = torch.tensor([1.0, 0.3])
    got = flow.time_embedding(t, 8, min_period=4e-3, max_period=4.0, dtype=torch.float64)
    for row, now in enumerate(t.tolist()):
        for i in range(4):
            angle = 2 * math.pi * float(torch.tensor(now, dtype=torch.float32)) / (4e-3 * 1000 ** (i / 3))
            assert got[row, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert got[row, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_guidance_weights_match_the_published_values():
    """start 3, end 8, horizon 12: pi05.md section 4.4, run in LeRobot and in the authors' code."""
    linear = [1, 1, 1, 0.8333, 0.6667, 0.5, 0.3333, 0.1667, 0, 0, 0, 0]
    exp = [1, 1, 1, 0.6309, 0.3677, 0.1888, 0.0767, 0.0176, 0, 0, 0, 0]
    for schedule, wanted in (
        ("linear", linear),
        ("exp", exp),
        ("ones", [1] * 8 + [0] * 4),
        ("zeros", [1] * 3 + [0] * 9),
    ):
        got = flow.prefix_weights(schedule, delay=3, end=8, horizon=12)
        assert got.tolist() == pytest.approx(wanted, abs=5e-5), schedule
    with pytest.raises(ConfigError, match="exp"):
        flow.prefix_weights("cubic", delay=1, end=2, horizon=3)


@pytest.mark.parametrize(("t", "strength"), [(1.0, 10.0), (0.9, 9.11), (0.5, 2.0), (0.1, 9.11)])
def test_guidance_strength_over_time(t, strength):
    """The pull of a unit error at weight 1: bounded at both ends of the flow."""
    x, v = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    previous = PreviousChunk(torch.ones(1, 4, 2), 2, "guided", torch.ones(4), 10.0)
    got = flow.guided_velocity(x, v, t, previous)
    assert got.mean().item() == pytest.approx(-strength, abs=5e-3)
    as_data = flow.guided_velocity(x, v, t, replace(previous, max_guidance=torch.tensor(10.0)))
    assert torch.equal(as_data, got), "a bound that lies on the device gives other bits"
    lower = flow.guided_velocity(x, v, t, replace(previous, max_guidance=torch.tensor(1.5)))
    assert lower.mean().item() == pytest.approx(-1.5)


def test_integrating_a_straight_flow_is_exact():
    """With the true velocity noise - action, Euler lands on the action for any number of steps."""
    noise, action = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    for steps in (1, 3, 10):
        got = flow.sample(lambda x, s: noise - action, noise, flow.time_grid(steps, "direct"))
        assert (got - action).abs().max() < 1e-5


def test_committed_actions_beyond_the_chunk_are_refused():
    with pytest.raises(ShapeError, match=r"0\.\.4"):
        flow.committed_mask(PreviousChunk(torch.zeros(1, 4, 2), 5, "trained"), 4, torch.device("cpu"))
