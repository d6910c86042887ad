"""All steps as one call (`step=None`) against step by step: the same bits with the reference operations, on a CPU."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from tiny import build, random_tensors, tiny_config

from vivace.backends.loop import run_flow
from vivace.model import flow
from vivace.ops import reference
from vivace.types import ModelInputs, PreviousChunk, Trace


def prepared(kind):
    config = tiny_config(kind)
    model, size = build(config, random_tensors(config)), config.vision.image_size
    g = torch.Generator().manual_seed(0)
    inputs = ModelInputs(
        torch.rand(1, 2, 3, size, size, generator=g), torch.arange(5)[None], state=torch.randn(1, 32, generator=g)
    )
    embeds, mask = model.embed_prefix(inputs, model.embed_views(inputs.images))
    cache = model.prefill(embeds, mask, state=inputs.state)
    boundaries = []

    def counted(*arguments):
        boundaries.append(arguments)
        return reference.step_boundary(*arguments)

    model.ops = dataclasses.replace(model.ops, step_boundary=counted)
    return model, cache, torch.randn(1, config.horizon, 32, generator=g), boundaries


@torch.no_grad()
def test_chunk_equals_its_steps_bit_by_bit():
    model, cache, noise, boundaries = prepared("pi05")
    table, one, other = model.time_table(4), Trace(), Trace()
    wanted = run_flow(model, model.denoise_step, table, cache, noise, previous=None, trace=one)
    assert boundaries == []
    got = run_flow(model, None, table, cache, noise, previous=None, trace=other)
    assert len(boundaries) == 3
    assert torch.equal(got, wanted)
    for kind in ("x", "velocity", "velocity_used"):
        mine, theirs = getattr(other, kind), getattr(one, kind)
        assert len(mine) == len(theirs)
        assert all(map(torch.equal, mine, theirs)), kind


@torch.no_grad()
@pytest.mark.parametrize("mode", ["trained", "guided"])
def test_an_older_chunk_goes_step_by_step(mode):
    model, cache, noise, boundaries = prepared("pi05")
    weights = flow.prefix_weights("exp", delay=1, end=3, horizon=noise.shape[1]) if mode == "guided" else None
    previous = PreviousChunk(torch.randn(noise.shape, generator=torch.Generator().manual_seed(5)), 1, mode, weights)
    table = model.time_table(3)
    answers = [
        run_flow(model, step, table, cache, noise, previous=previous, trace=None) for step in (None, model.denoise_step)
    ]
    assert torch.equal(*answers)
    assert boundaries == []


@torch.no_grad()
def test_pi0_goes_step_by_step():
    model, cache, noise, boundaries = prepared("pi0")
    table = model.time_table(3)
    answers = [
        run_flow(model, step, table, cache, noise, previous=None, trace=None) for step in (None, model.denoise_step)
    ]
    assert torch.equal(*answers)
    assert boundaries == []


@torch.no_grad()
def test_only_the_first_step_waits_for_keys():
    model, cache, noise, _ = prepared("pi05")
    for previous in (None, PreviousChunk(noise, 0, "trained")):
        asked = []
        run_flow(model, None, model.time_table(3), cache, noise, previous=previous, trace=None, await_keys=asked.append)
        assert asked == list(range(model.config.expert.layers))
