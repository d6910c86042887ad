"""The one forward against the literal formulas: each exact simplification, and proof that the comparison has power."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from literal import Case, Literal
from tiny import build, random_tensors, tiny_config

from vivace.backends import eager
from vivace.config import EngineConfig
from vivace.model import flow
from vivace.types import ModelInputs, PreviousChunk, Trace

TOLERANCE = 1e-5  # float32 rounding on actions of scale ~2; see the negative controls below
V, L, STEPS = 3, 9, 10


def padded_case(config, *, batch: int = 1, valid_tokens=(6,), masked_view: int = 1, seed: int = 1) -> Case:
    g = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    view_mask = torch.ones(batch, V, dtype=torch.bool)
    view_mask[:, masked_view] = False
    token_mask = torch.arange(L)[None] < torch.tensor(valid_tokens)[:, None]
    return Case(
        images=torch.rand(batch, V, 3, size, size, generator=g) * 2 - 1,
        view_mask=view_mask,
        tokens=torch.randint(0, config.vocab_size, (batch, L), generator=g),
        token_mask=token_mask,
        state=torch.randn(batch, 32, generator=g),
        noise=torch.randn(batch, config.horizon, 32, generator=g),
    )


def compacted(case: Case, row: int = 0) -> ModelInputs:
    views, tokens = case.view_mask[row], case.token_mask[row]
    return ModelInputs(
        images=case.images[row : row + 1, views],
        tokens=case.tokens[row : row + 1, tokens],
        state=case.state[row : row + 1],
    )


def run(config, tensors, inputs, noise, *, previous=None, steps=STEPS):
    backend = eager.create(build(config, tensors), EngineConfig(num_denoise_steps=steps))
    trace = Trace()
    cache = backend.prefill(inputs, trace=trace)
    return backend.denoise(cache, noise, previous=previous, trace=trace), cache, trace


@pytest.mark.parametrize("grid", ["direct", "accumulated"])
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_all_simplifications_together_equal_the_literal_formula(kind, grid):
    """Compaction, pruned last layer, time tables, constant state K/V and packed matrices change nothing."""
    config = tiny_config(kind, time_grid=grid)
    tensors, case = random_tensors(config), padded_case(config)
    times = flow.time_grid(STEPS, grid)
    expected, velocities, past, mask = Literal(config, tensors).sample(case, times)
    actions, cache, trace = run(config, tensors, compacted(case), case.noise)
    assert (actions - expected).abs().max() < TOLERANCE
    for step in range(STEPS):
        assert (trace.velocity[step] - velocities[step]).abs().max() < TOLERANCE
    S = int(mask.sum())
    for layer, (k, v) in enumerate(past):
        assert (cache.k[layer][:, :S] - k[:, mask[0]]).abs().max() < TOLERANCE
        assert (cache.v[layer][:, :S] - v[:, mask[0]]).abs().max() < TOLERANCE
    assert cache.length.item() == S + (kind == "pi0")


MISTAKES = [
    "erf_gelu", "text_not_scaled", "masked_view_left_in", "padding_left_in", "causal_prefix", "suffix_positions_plus_one",
    "time_one_step_early", "padded_dims_zeroed",
]  # fmt: skip
ONLY_PI05 = ["scale_shift_swapped", "gate_ignored"]  # pi0 has no modulation


@pytest.mark.parametrize(
    ("kind", "mistake"), [*itertools.product(["pi0", "pi05"], MISTAKES), *itertools.product(["pi05"], ONLY_PI05)]
)
def test_every_planted_mistake_is_seen(kind, mistake):
    """Negative controls: a comparison at TOLERANCE separates each wrong variant from rounding."""
    config = tiny_config(kind)
    tensors, case = random_tensors(config), padded_case(config)
    wrong, *_ = Literal(config, tensors, mistake).sample(case, flow.time_grid(STEPS, "accumulated"))
    actions, *_ = run(config, tensors, compacted(case), case.noise)
    assert (actions - wrong).abs().max() > 2 * TOLERANCE, mistake


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_masked_batch_equals_each_row_alone(kind):
    """A batch of prompts of different length, padded and masked, gives every row its own answer."""
    config = tiny_config(kind)
    tensors = random_tensors(config)
    case = padded_case(config, batch=3, valid_tokens=(6, 9, 1))
    inputs = ModelInputs(case.images, case.tokens, case.view_mask, case.token_mask, case.state)
    together, *_ = run(config, tensors, inputs, case.noise)
    for row in range(3):
        alone, *_ = run(config, tensors, compacted(case, row), case.noise[row : row + 1])
        assert (together[row] - alone[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("delay", [0, 3, 7])
def test_trained_chunking_equals_per_token_time(kind, delay):
    """Committed actions are clamped and carry flow time 0 in their own token: the indexed table equals the literal MLP."""
    config = tiny_config(kind)
    tensors, case = random_tensors(config), padded_case(config)
    older = torch.randn(1, config.horizon, 32, generator=torch.Generator().manual_seed(5))
    times = flow.time_grid(STEPS, "accumulated")
    expected, *_ = Literal(config, tensors).sample(case, times, clamp=(older, delay))
    previous = PreviousChunk(older, delay, "trained")
    actions, *_ = run(config, tensors, compacted(case), case.noise, previous=previous)
    assert (actions - expected).abs().max() < TOLERANCE
    assert torch.equal(actions[:, :delay], older[:, :delay])
    if delay == 3:  # control: clamping without the per-token time is another policy
        plain, *_ = run(config, tensors, compacted(case), case.noise)
        assert (plain - actions)[:, delay:].abs().max() > 1e-3


@pytest.mark.parametrize(("views", "horizon", "steps", "layers"), [(1, 1, 1, 1), (2, 13, 3, 2), (4, 7, 4, 5)])
def test_any_number_of_views_actions_steps_layers(views, horizon, steps, layers):
    config = tiny_config("pi05", horizon=horizon)
    config = tiny_config(
        "pi05", horizon=horizon,
        prefix=type(config.prefix)(width=32, layers=layers, mlp_width=48, head_dim=16),
        expert=type(config.expert)(width=16, layers=layers, mlp_width=28, head_dim=16),
    )  # fmt: skip
    tensors, g = random_tensors(config), torch.Generator().manual_seed(2)
    size = config.vision.image_size
    case = Case(
        torch.rand(1, views, 3, size, size, generator=g), torch.ones(1, views, dtype=torch.bool),
        torch.randint(0, 64, (1, 4), generator=g), torch.ones(1, 4, dtype=torch.bool),
        torch.zeros(1, 32), torch.randn(1, horizon, 32, generator=g),
    )  # fmt: skip
    expected, *_ = Literal(config, tensors).sample(case, flow.time_grid(steps, "accumulated"))
    actions, *_ = run(config, tensors, compacted(case), case.noise, steps=steps)
    assert (actions - expected).abs().max() < TOLERANCE


def test_uint8_pixels_equal_scaled_floats():
    config = tiny_config("pi05")
    model = build(config, random_tensors(config))
    pixels = torch.randint(0, 256, (1, 2, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.embed_views(pixels), model.embed_views(pixels.float() / 255 * 2 - 1))
