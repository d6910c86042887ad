"""Metrics against values worked out by hand, and against everything that must never pass."""

import math

import numpy as np
import pytest
import torch

from vivace.check import metrics
from vivace.errors import ShapeError


def test_values_worked_out_by_hand():
    got, reference = np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([[3.0, 0.0], [0.0, 4.0]])
    found = metrics.errors(got, reference)  # differences 0, 4, 0, -3
    assert found.max_abs == 4.0
    assert found.mae == 7 / 4
    assert found.rel_l2 == 5 / 5
    assert found.relative_error == 7 / 7
    assert found.cosine == pytest.approx((9 + 4) / (math.sqrt(26) * 5), abs=1e-15)
    assert found.sqnr_db == 0.0
    assert found.scale == 4.0


def test_one_bit_is_six_decibels():
    reference = np.random.default_rng(0).normal(size=1000)
    noise = np.random.default_rng(1).normal(size=1000)
    one, half = (metrics.sqnr_db(reference + scale * noise, reference) for scale in (1e-3, 5e-4))
    assert half - one == pytest.approx(20 * math.log10(2), abs=1e-6)
    assert metrics.rel_l2(reference * 1.001, reference) == pytest.approx(1e-3)
    assert metrics.sqnr_db(reference * 1.001, reference) == pytest.approx(60, abs=1e-6)


def test_cosine_is_taken_in_float64():
    reference = np.ones(1 << 16, dtype=np.float32)
    got = reference.copy()
    got[0] += 2.0**-10  # in float32 the sums absorb it and the cosine becomes exactly 1
    assert 0 < 1 - metrics.cosine(got, reference) < 1e-9


def test_equal_and_zero():
    x = np.arange(4.0)
    zero = np.zeros(4)
    assert metrics.errors(x, x) == metrics.Errors(0, 0, 0, 0, pytest.approx(1), math.inf, 3)
    assert metrics.errors(zero, zero) == metrics.Errors(0, 0, 0, 0, 1, math.inf, 0)
    assert metrics.rel_l2(x, zero) == math.inf
    assert metrics.sqnr_db(x, zero) == -math.inf
    assert metrics.cosine(zero, x) == 0.0
    assert metrics.errors(np.zeros(0), np.zeros(0)).max_abs == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_never_passes(bad):
    reference = np.ones(8)
    got = reference.copy()
    got[3] = bad
    found = metrics.errors(got, reference)
    for name in ("max_abs", "mae", "rel_l2", "relative_error", "cosine", "sqnr_db"):
        assert math.isnan(getattr(found, name)), name
    assert not metrics.at_most(found.rel_l2, math.inf)
    assert not metrics.at_least(found.cosine, -math.inf)


def test_worst_keeps_nan_and_picks_the_bad_side():
    good = metrics.errors(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    bad = metrics.errors(np.array([1.0, 2.5]), np.array([1.0, 2.0]))
    broken = metrics.errors(np.array([math.nan, 2.0]), np.array([1.0, 2.0]))
    both = metrics.worst([good, bad])
    assert (both.max_abs, both.cosine, both.sqnr_db) == (bad.max_abs, bad.cosine, bad.sqnr_db)
    assert math.isnan(metrics.worst([good, broken]).rel_l2)
    assert math.isnan(metrics.worst([broken, good]).cosine)


@pytest.mark.parametrize("name", ["max_abs", "mae", "rel_l2", "relative_error", "cosine", "sqnr_db", "errors"])
def test_two_shapes_are_an_error_even_where_numpy_would_broadcast(name):
    with pytest.raises(ShapeError, match=r"\(1, 4\).*\(4,\)"):
        getattr(metrics, name)(np.ones((1, 4)), np.ones(4))


def test_torch_tensors_are_taken_as_they_are():
    assert metrics.max_abs(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.5])) == 0.5
