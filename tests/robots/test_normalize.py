"""Scaling: round trips (properties), and the places where the two flavours differ."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vivace.errors import ConfigError, ShapeError
from vivace.robots.actions import relative_mask, to_absolute, to_delta
from vivace.robots.normalize import (
    normalize_lerobot,
    normalize_openpi,
    normalize_state,
    unnormalize_actions,
    unnormalize_lerobot,
    unnormalize_openpi,
)
from vivace.types import Normalization, NormStats

MODES = ["identity", "mean_std", "min_max", "quantiles", "quantile10"]
numbers = st.floats(-10, 10, allow_nan=False, width=32)


@st.composite
def vectors(draw):
    n = draw(st.integers(1, 14))
    low = draw(arrays(np.float64, n, elements=numbers))
    span = draw(arrays(np.float64, n, elements=st.floats(0.125, 8)))
    stats = NormStats(low, span, low, low + span, low, low + span, low, low + span)
    return stats, draw(arrays(np.float64, (3, n), elements=numbers))


@given(vectors(), st.sampled_from(["identity", "mean_std", "quantiles"]))
def test_openpi_round_trip(drawn, mode) -> None:
    stats, x = drawn
    back = unnormalize_openpi(normalize_openpi(x, stats, mode=mode), stats, mode=mode)
    assert back.dtype == np.float64
    assert np.abs(back - x).max() < 1e-11


@given(vectors(), st.sampled_from(MODES))
def test_lerobot_round_trip(drawn, mode) -> None:
    stats, x = drawn
    x = x.astype(np.float32)
    back = unnormalize_lerobot(normalize_lerobot(x, stats, mode=mode), stats, mode=mode)
    assert back.dtype == np.float32
    assert np.abs(back - x).max() < 2e-5


@given(vectors(), st.lists(st.booleans(), min_size=1, max_size=14))
def test_delta_round_trip(drawn, mask) -> None:
    _, x = drawn
    mask = mask[: x.shape[-1]]
    state = x[0]
    delta = to_delta(x, state, mask=mask)
    assert np.abs(to_absolute(delta, state, mask=mask) - x).max() < 1e-14
    kept = [i for i in range(x.shape[-1]) if i >= len(mask) or not mask[i]]
    assert np.array_equal(delta[:, kept], x[:, kept])


def test_epsilon_is_symmetric_in_openpi_and_not_in_lerobot() -> None:
    stats = NormStats(mean=np.zeros(1), std=np.full(1, 1e-3))
    one = np.ones(1)
    assert unnormalize_openpi(one, stats, mode="mean_std", eps=1e-6)[0] == pytest.approx(1.001e-3, abs=1e-15)
    lerobot = unnormalize_lerobot(one, stats, mode="mean_std", eps=1e-6)[0]
    assert lerobot == pytest.approx(1e-3, abs=1e-15)


def test_zero_range() -> None:
    stats = NormStats(q01=np.ones(1), q99=np.ones(1))
    x = np.full(1, 1.0)
    assert normalize_openpi(x, stats, mode="quantiles")[0] == -1.0
    assert normalize_lerobot(x.astype(np.float32), stats, mode="quantiles")[0] == -1.0
    assert np.isfinite(normalize_lerobot(x.astype(np.float32) + 1, stats, mode="quantiles")).all()


def test_openpi_cuts_and_pads_statistics() -> None:
    wide = NormStats(mean=np.arange(32.0), std=np.full(32, 2.0), q01=np.zeros(32), q99=np.ones(32))
    x = np.ones(7)
    assert np.array_equal(normalize_openpi(x, wide, mode="mean_std"), (1 - np.arange(7.0)) / (2 + 1e-6))
    narrow = NormStats(mean=np.full(7, 5.0), std=np.full(7, 2.0), q01=np.zeros(7), q99=np.ones(7))
    actions = np.ones((4, 32), dtype=np.float32)
    z = unnormalize_openpi(actions, narrow, mode="mean_std")
    assert np.array_equal(z[:, 7:], np.full((4, 25), 1 + 1e-6))
    assert np.array_equal(unnormalize_openpi(actions, narrow, mode="quantiles")[:, 7:], np.ones((4, 25)))
    with pytest.raises(ShapeError):
        unnormalize_openpi(np.ones((4, 14)), wide, mode="mean_std")
    with pytest.raises(ShapeError):
        normalize_openpi(np.ones(8), narrow, mode="mean_std")


def test_missing_statistics() -> None:
    x = np.ones(3, dtype=np.float32)
    assert normalize_lerobot(x, NormStats(), mode="quantiles") is x
    with pytest.raises(ConfigError, match="q01 and q99"):
        normalize_lerobot(x, NormStats(mean=np.zeros(3), std=np.ones(3)), mode="quantiles")
    with pytest.raises(ConfigError, match="unknown normalisation mode"):
        normalize_lerobot(x, NormStats(mean=np.zeros(3)), mode="softmax")  # type: ignore[arg-type]


def test_flavour_decides_the_arithmetic() -> None:
    stats = NormStats(mean=np.full(1, 0.1), std=np.full(1, 0.3))
    state = np.full(1, 0.7)
    openpi = normalize_state(state, Normalization("openpi", "mean_std", "mean_std", stats, stats, 1e-6))
    lerobot = normalize_state(state, Normalization("lerobot", "mean_std", "mean_std", stats, stats, 1e-6))
    assert (openpi.dtype, lerobot.dtype) == (np.float64, np.float32)
    assert 0 < abs(openpi[0] - lerobot[0]) < 1e-6
    actions = np.ones((2, 1), dtype=np.float32)
    assert (
        unnormalize_actions(actions, Normalization("openpi", "identity", "mean_std", stats, stats, 0)).dtype
        == np.float64
    )


def test_relative_mask() -> None:
    names = ["Shoulder.pos", "gripper.pos"]
    assert relative_mask(names, ["GRIPPER"], dims=3) == (True, False, True)
    assert relative_mask(names, [""], dims=2) == (True, True)
    assert relative_mask(None, ["gripper"], dims=2) == (True, True)
