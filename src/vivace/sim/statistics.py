"""What the counts of a campaign allow one to say: intervals of rates, paired tests, non-inferiority. Standard library only.

Arms run on equal seeds, so episodes come in pairs, and only pairs that differ carry information:

    n pairs     gained = the arm succeeds and the reference does not     lost = the other way round
    difference  (gained - lost) / n

The interval of the difference is Tango's score interval: unlike Wald's it keeps its level for few or no discordant pairs,
which is the usual case here. Sources: Wilson 1927; Newcombe 1998 (Stat. Med. 17:857); Tango 1998 (Stat. Med. 17:891);
McNemar's exact test; Holm 1979; Fagerland, Lydersen and Laake 2014 (recommendations for paired proportions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ..errors import ConfigError

Z95 = 1.959964
"""Two-sided 95 %."""
Z90 = 1.644854
"""Two-sided 90 %, one-sided 95 %: what a non-inferiority test at 5 % uses."""
LEAST_REFERENCE = 0.2
"""Success rate of a reference below which "not worse" says nothing: where nothing succeeds, nothing can be lost."""


@dataclass(frozen=True)
class Paired:
    """An arm against the reference on the same seeds.

    difference, interval  of the success rates, arm minus reference; Tango's interval, 95 %
    mcnemar_p             exact, two-sided: could the two arms be equally good?
    margin                loss of rate that would not matter, fixed before the run
    noninferiority_p      one-sided: could the arm be worse than the reference by the margin or more?
    noninferior           that p is below 5 %
    void                  why there is no such test ("" = there is one): both of the above are None then
    """

    n: int
    gained: int
    lost: int
    difference: float
    interval: tuple[float, float]
    mcnemar_p: float
    margin: float
    noninferiority_p: float | None
    noninferior: bool | None
    void: str = ""


def paired(gained: int, lost: int, n: int, *, margin: float, reference: int | None = None) -> Paired:
    """Compare two arms. Raises ConfigError for counts that are none, or a margin outside (0, 1).

    reference: successes of the reference in these pairs, None = enough of them.
    """
    _check_pairs(gained, lost, n)
    if not 0.0 < margin < 1.0:
        raise ConfigError("non-inferiority margin", got=margin, wanted="a share between 0 and 1, e.g. 0.03")
    low = reference is not None and reference < LEAST_REFERENCE * n
    p = None if low else 1.0 - NormalDist().cdf(tango_score(gained, lost, n, difference=-margin))
    return Paired(
        n=n,
        gained=gained,
        lost=lost,
        difference=(gained - lost) / n,
        interval=tango(gained, lost, n),
        mcnemar_p=mcnemar(gained, lost),
        margin=margin,
        noninferiority_p=p,
        noninferior=None if p is None else p < 0.05,
        void="reference too low" if low else "",
    )


def wilson(successes: int, n: int, *, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a rate, 95 % by default. Source: Wilson 1927; Newcombe 1998, method 3.

    Raises: ConfigError unless 0 <= successes <= n and n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ConfigError("a rate", got=f"{successes} of {n}", wanted="0 <= successes <= n, n >= 1")
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p: discordant pairs fall either way like a fair coin; 1.0 without any."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**n))


def tango_score(gained: int, lost: int, n: int, *, difference: float) -> float:
    """Standard normal score of the hypothesis that the true difference is `difference`; above 0 = observed more.

    The nuisance parameter (probability of a lost pair) is its maximum-likelihood value under the hypothesis, the root of
    2n q^2 + ((2n - gained + lost) d - gained - lost) q - lost d (1 - d) = 0.
    """
    _check_pairs(gained, lost, n)
    d = difference
    excess = gained - lost - n * d
    b = (2 * n - gained + lost) * d - gained - lost
    q = (math.sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d))) - b) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    if variance <= 1e-12:
        return 0.0 if abs(excess) < 1e-9 else math.copysign(math.inf, excess)
    return excess / math.sqrt(variance)


def tango(gained: int, lost: int, n: int, *, z: float = Z95) -> tuple[float, float]:
    """Tango's score interval of the paired difference: every difference whose score lies within z."""
    observed = (gained - lost) / n

    def inside(difference: float) -> bool:
        return abs(tango_score(gained, lost, n, difference=difference)) <= z

    return _edge(inside, observed, -1.0), _edge(inside, observed, 1.0)


def fisher(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Two-sided exact p that two rates (successes, n) on different seeds are equal: tables no likelier than this one."""
    (x, m), (y, k) = a, b
    total = x + y
    ways = {i: math.comb(m, i) * math.comb(k, total - i) for i in range(max(0, total - k), min(m, total) + 1)}
    return sum(way for way in ways.values() if way <= ways[x]) / math.comb(m + k, total)


def fisher_less(a: tuple[int, int], b: tuple[int, int]) -> float:
    """One-sided exact p that rate a is not below rate b; small = a is below."""
    (x, m), (y, k) = a, b
    total = x + y
    ways = [math.comb(m, i) * math.comb(k, total - i) for i in range(max(0, total - k), x + 1)]
    return sum(ways) / math.comb(m + k, total)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjustment for looking at several arms at once; in the order given."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def distance_of_cdfs(values: Sequence[float], theory: Sequence[float]) -> float:
    """Largest vertical distance of two empirical distribution functions (Kolmogorov-Smirnov statistic)."""
    if not values or not theory:
        raise ConfigError("a distribution", got="no values", wanted="at least one of each")
    points = sorted({*values, *theory})
    return max(
        abs(sum(v <= x for v in values) / len(values) - sum(t <= x for t in theory) / len(theory)) for x in points
    )


def _edge(inside: Callable[[float], bool], good: float, bad: float) -> float:
    """Bisect between a difference that is inside the interval and the end of the range."""
    if inside(bad):
        return bad
    for _ in range(60):
        middle = 0.5 * (good + bad)
        good, bad = (middle, bad) if inside(middle) else (good, middle)
    return 0.5 * (good + bad)


def _check_pairs(gained: int, lost: int, n: int) -> None:
    if n < 1 or min(gained, lost) < 0 or gained + lost > n:
        raise ConfigError("pairs", got=f"{gained} gained, {lost} lost of {n}", wanted="gained + lost <= n, n >= 1")
