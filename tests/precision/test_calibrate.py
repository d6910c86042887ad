"""Ranges, percentiles and saturation counts against numpy; steps of the expert; activations that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.errors import NumericsError
from vivace.ops.layers import Linear
from vivace.precision.calibrate import Ranges


def linear(name: str) -> Linear:
    return Linear(4, 4, name=name)


def heavy_tailed(seed: int, count: int = 20_000) -> torch.Tensor:
    """bfloat16, so that the bins are exact."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, count).astype(np.float32)).bfloat16()


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentiles_and_counters_equal_numpy(percentile):
    ranges, parts = Ranges(), [heavy_tailed(seed) for seed in range(3)]
    for part in parts:
        ranges.see(linear("a"), part.view(1, -1, 4))
    row = ranges.measured(percentile)["a"]
    values = np.abs(torch.cat(parts).double().numpy())
    assert row.amax == values.max()
    assert row.chosen == np.percentile(values, percentile, method="inverted_cdf")
    assert row.values == values.size
    assert row.saturated == (values > row.chosen).sum()
    assert row.flushed == ((values > 0) & (values <= row.chosen / 448 * 2**-10)).sum()


def test_amax_saturates_nothing_and_half_of_it_does():
    ranges = Ranges()
    ranges.see(linear("a"), heavy_tailed(0).view(1, -1, 4).float())
    assert ranges.measured()["a"].saturated == 0
    assert ranges.measured(99.0)["a"].saturated > 100


def test_float32_values_are_counted_within_a_bfloat16_step():
    ranges, x = Ranges(), torch.from_numpy(np.random.default_rng(1).normal(0, 1, 30_000).astype(np.float32))
    ranges.see(linear("a"), x.view(1, -1, 4))
    row = ranges.measured(99.9)["a"]
    assert row.chosen == pytest.approx(np.percentile(x.abs().numpy(), 99.9), rel=2**-7)
    assert row.amax == x.abs().max()
    assert row.saturated <= 0.001 * row.values


def test_steps_of_the_expert_are_kept_apart():
    ranges, name = Ranges(), "expert.layers.0.mlp.down"
    for observation in (1.0, 2.0):
        ranges.begin_prefill()
        ranges.see(linear("prefix.layers.0.attn.qkv"), torch.full((1, 1, 4), observation))
        ranges.see(linear(name), torch.full((1, 1, 4), 100.0))  # pi0's state token: counts for the range, is no step
        ranges.begin_denoise()
        for step in (1.0, 5.0, 3.0):
            ranges.see(linear(name), torch.full((1, 1, 4), step * observation))
    table = ranges.measured()
    assert table[name].steps == (2.0, 10.0, 6.0)
    assert table[name].step_spread == 5.0
    assert table[name].chosen == 100.0
    assert table["prefix.layers.0.attn.qkv"].steps == ()
    assert table["prefix.layers.0.attn.qkv"].step_spread == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(bad):
    ranges = Ranges()
    ranges.see(linear("prefix.layers.0.mlp.down"), torch.tensor([[[1.0, bad, 0.0, 0.0]]]))
    with pytest.raises(NumericsError, match=r"prefix\.layers\.0\.mlp\.down"):
        ranges.measured()
