"""How far one array is from another, in the units that evidence is stated in. Pure numpy, float64 inside.

Every function takes (got, reference) of one shape and returns a float. A NaN or an infinity in `got` gives NaN, and no
pass mark accepts NaN, so a broken engine can never look accurate. The number to read first is the signal-to-noise ratio
in decibels: it compares layers of very different scale, and 6 dB are one bit. bfloat16 rounding alone leaves about 50 dB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """One comparison.

    max_abs         largest absolute difference
    mae             mean absolute difference
    rel_l2          |got - ref| / |ref|, Euclidean norms
    relative_error  mean |got - ref| / mean |ref|
    cosine          of the two arrays flattened
    sqnr_db         10 log10(|ref|^2 / |got - ref|^2); infinite when equal
    scale           largest absolute value of the reference: what max_abs is to be read against
    """

    max_abs: float
    mae: float
    rel_l2: float
    relative_error: float
    cosine: float
    sqnr_db: float
    scale: float


def max_abs(got: Any, reference: Any) -> float:
    """Largest absolute difference; 0 for empty arrays. Raises ShapeError for two shapes."""
    a, b = _pair(got, reference)
    return float(np.max(np.abs(a - b))) if a.size else 0.0


def mae(got: Any, reference: Any) -> float:
    """Mean absolute difference; 0 for empty arrays. Raises ShapeError for two shapes."""
    a, b = _pair(got, reference)
    return float(np.mean(np.abs(a - b))) if a.size else 0.0


def rel_l2(got: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference; 0 / 0 is 0, x / 0 is infinite. Raises ShapeError."""
    a, b = _pair(got, reference)
    return _ratio(float(np.linalg.norm(a - b)), float(np.linalg.norm(b)))


def relative_error(got: Any, reference: Any) -> float:
    """Mean absolute difference over the mean absolute reference; 0 / 0 is 0, x / 0 is infinite. Raises ShapeError."""
    a, b = _pair(got, reference)
    if not a.size:
        return 0.0
    return _ratio(float(np.mean(np.abs(a - b))), float(np.mean(np.abs(b))))


def cosine(got: Any, reference: Any) -> float:
    """Cosine of the flattened arrays; two zero arrays give 1, one zero array gives 0. Raises ShapeError."""
    a, b = _pair(got, reference)
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if math.isnan(norms) or math.isinf(norms):
        return math.nan
    if norms == 0.0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.dot(a, b)) / norms


def sqnr_db(got: Any, reference: Any) -> float:
    """Signal-to-quantisation-noise ratio in decibels; infinite when equal, -infinite against zeros. Raises ShapeError."""
    ratio = rel_l2(got, reference)
    if math.isnan(ratio):
        return math.nan
    if ratio == 0.0:
        return math.inf
    return -math.inf if math.isinf(ratio) else -20.0 * math.log10(ratio)


def errors(got: Any, reference: Any) -> Errors:
    """All of the above for one pair of arrays (numpy, or torch on the host). Raises ShapeError for two shapes."""
    a, b = _pair(got, reference)
    return Errors(
        max_abs=max_abs(a, b),
        mae=mae(a, b),
        rel_l2=rel_l2(a, b),
        relative_error=relative_error(a, b),
        cosine=cosine(a, b),
        sqnr_db=sqnr_db(a, b),
        scale=float(np.max(np.abs(b))) if b.size else 0.0,
    )


def worst(rows: list[Errors]) -> Errors:
    """The worst of each number over several comparisons; NaN is worse than anything. `rows` must not be empty."""
    return Errors(
        max_abs=_extreme([row.max_abs for row in rows], max),
        mae=_extreme([row.mae for row in rows], max),
        rel_l2=_extreme([row.rel_l2 for row in rows], max),
        relative_error=_extreme([row.relative_error for row in rows], max),
        cosine=_extreme([row.cosine for row in rows], min),
        sqnr_db=_extreme([row.sqnr_db for row in rows], min),
        scale=_extreme([row.scale for row in rows], max),
    )


def at_most(value: float, limit: float) -> bool:
    """True only for a number that is not above the limit; NaN never passes."""
    return not math.isnan(value) and value <= limit


def at_least(value: float, limit: float) -> bool:
    """True only for a number that is not below the limit; NaN never passes."""
    return not math.isnan(value) and value >= limit


def _extreme(values: list[float], pick: Any) -> float:
    return math.nan if any(math.isnan(value) for value in values) else float(pick(values))


def _ratio(top: float, bottom: float) -> float:
    if math.isnan(top) or math.isnan(bottom) or (math.isinf(top) and math.isinf(bottom)):
        return math.nan
    if bottom == 0.0:
        return 0.0 if top == 0.0 else math.inf
    return top / bottom


def _pair(got: Any, reference: Any) -> tuple[Array, Array]:
    a, b = _flat(got), _flat(reference)
    if np.shape(got) != np.shape(reference):
        wanted = f"{tuple(np.shape(reference))}, as in the reference"
        raise ShapeError("cannot compare", got=tuple(np.shape(got)), wanted=wanted)
    if not np.isfinite(a).all():
        a = np.full_like(a, np.nan)  # an infinity would give "inf - inf" in one metric and a number in another
    return a, b


def _flat(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64).reshape(-1)
