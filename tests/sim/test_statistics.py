"""Intervals and tests against published tables, and against brute-force computations that share no formula with them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vivace.errors import ConfigError
from vivace.sim import statistics as st


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    """Newcombe 1998, table I, method 3."""
    assert st.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("gained", "lost", "n", "low", "high"), [(1, 7, 21, -0.517, -0.026)])
def test_tango_gives_the_published_interval(gained, lost, n, low, high):
    """Fagerland, Lydersen and Laake 2014: airway hyperresponsiveness before and after transplantation."""
    assert st.tango(gained, lost, n) == pytest.approx((low, high), abs=6e-4)


def brute_score(gained, lost, n, d):
    """The same hypothesis by maximising the multinomial likelihood on a grid: no closed root, no shared formula."""
    q = np.linspace(max(0.0, -d) + 1e-9, (1 - d) / 2 - 1e-9, 400_001)  # P(lost); P(gained) = q + d
    with np.errstate(divide="ignore"):
        log = (
            gained * np.log(q + d) + lost * np.log(q) + (n - gained - lost) * np.log(np.maximum(1 - 2 * q - d, 1e-300))
        )
    best = q[np.argmax(log)]
    return (gained - lost - n * d) / math.sqrt(n * (2 * best + d - d * d))


@pytest.mark.parametrize(
    ("gained", "lost", "n", "d"),
    [(3, 9, 100, -0.03), (1, 7, 21, 0.1), (5, 5, 50, 0.05), (12, 2, 40, -0.2), (1, 1, 500, -0.02)],
)
def test_tango_score_is_the_constrained_maximum_likelihood_score(gained, lost, n, d):
    assert st.tango_score(gained, lost, n, difference=d) == pytest.approx(brute_score(gained, lost, n, d), abs=2e-3)


def test_tango_covers_the_truth_as_often_as_it_says():
    """Exact coverage over all outcomes of 40 pairs. Wald's interval, the control, does not keep the level."""
    n, p_gained, p_lost = 40, 0.04, 0.10
    truth, tango, wald = p_gained - p_lost, 0.0, 0.0
    for b, c in itertools.product(range(n + 1), repeat=2):
        if b + c > n:
            continue
        p = math.comb(n, b) * math.comb(n - b, c) * p_gained**b * p_lost**c * (1 - p_gained - p_lost) ** (n - b - c)
        if p < 1e-9:
            continue
        low, high = st.tango(b, c, n)
        tango += p * (low <= truth <= high)
        half = st.Z95 * math.sqrt(max(0.0, b + c - (b - c) ** 2 / n)) / n
        wald += p * (abs((b - c) / n - truth) <= half)
    assert 0.94 < tango < 0.98
    assert wald < tango


def test_mcnemar_is_the_sign_test():
    """Counted by listing all ways in which the discordant pairs can fall."""
    for gained, lost in ((0, 0), (1, 7), (3, 3), (0, 6), (10, 2)):
        n = gained + lost
        extreme = abs(gained - lost)
        ways = sum(abs(2 * sum(fall) - n) >= extreme for fall in itertools.product((0, 1), repeat=n))
        assert st.mcnemar(gained, lost) == pytest.approx(ways / 2**n)
    assert st.mcnemar(1, 7) == pytest.approx(0.0703, abs=1e-4)  # published: Fagerland 2014


def test_fisher_gives_the_tea_tasting_values_and_counts_permutations():
    assert st.fisher((3, 4), (1, 4)) == pytest.approx(34 / 70)
    assert st.fisher_less((1, 4), (3, 4)) == pytest.approx(17 / 70)
    assert st.fisher((10, 30), (1, 30)) == pytest.approx(0.0056, abs=5e-4)  # docs: aligned 10/30 against naive 1/30
    assert st.fisher((5, 5), (5, 5)) == 1.0


def test_noninferiority_needs_a_few_more_pairs_than_the_normal_approximation_says():
    """3 points, 4 % discordant pairs, 80 % power: 275 pairs by Wald's variance; the score test has 72 % there."""
    rng, power = np.random.default_rng(0), {}
    for n in (275, 350):
        pairs = rng.multinomial(n, [0.02, 0.02, 0.96], size=1500)
        power[n] = np.mean([st.paired(int(gained), int(lost), n, margin=0.03).noninferior for gained, lost, _ in pairs])
    assert 0.66 < power[275] < 0.8 < power[350] < 0.9


def test_noninferiority_does_not_pass_what_is_worse_by_the_margin():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(2000):
        gained, lost, _ = rng.multinomial(300, [0.01, 0.04, 0.95])
        hits += st.paired(int(gained), int(lost), 300, margin=0.03).noninferior
    assert hits / 2000 < 0.07


def test_equal_arms_are_noninferior_only_with_enough_pairs():
    assert not st.paired(0, 0, 80, margin=0.03).noninferior
    assert st.paired(0, 0, 100, margin=0.03).noninferior
    assert st.paired(0, 0, 100, margin=0.03).mcnemar_p == 1.0


def test_a_reference_that_seldom_succeeds_makes_noninferiority_void():
    """0 of 200 against 0 of 200 is no equality worth the name."""
    low = st.paired(0, 0, 200, margin=0.05, reference=39)
    assert (low.noninferior, low.noninferiority_p, low.void) == (None, None, "reference too low")
    enough = st.paired(0, 0, 200, margin=0.05, reference=40)
    assert (enough.noninferior, enough.void) == (True, "")


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm([0.5, 0.9]) == [1.0, 1.0]
    assert st.holm([]) == []


def test_distance_of_distributions():
    assert st.distance_of_cdfs([1, 2, 3], [1, 2, 3]) == 0.0
    assert st.distance_of_cdfs([1, 1], [2, 2]) == 1.0
    assert st.distance_of_cdfs([1, 2], [1, 1]) == 0.5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: st.wilson(1, 0), "a rate"),
        (lambda: st.wilson(3, 2), "a rate"),
        (lambda: st.wilson(-1, 2), "a rate"),
        (lambda: st.paired(2, 2, 3, margin=0.03), "pairs"),
        (lambda: st.paired(0, 0, 10, margin=0.0), "margin"),
        (lambda: st.distance_of_cdfs([], [1.0]), "distribution"),
    ],
)
def test_what_is_no_count_is_refused(call, match):
    with pytest.raises(ConfigError, match=match):
        call()
