"""State and actions between robot units and the scale that the network was trained on.

Two flavours with different arithmetic. openpi: float64, the same epsilon on both ways, statistics cut to the width of x on
the way in and padded on the way out. LeRobot: the dtype of x (float32 in a policy), and an epsilon that only appears on the
way in (mean/std) or only where the range is exactly zero. Neither clips.

Source: openpi transforms.py (Normalize, Unnormalize); lerobot processor/normalize_processor.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ShapeError
from ..types import Normalization, NormMode, NormStats

Stat = NDArray[np.float64]
NEEDS: dict[NormMode, tuple[str, str] | None] = {
    "identity": None,
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
}
"""Mode -> the two statistics it reads: (mean, std) or (low, high)."""


def pair(stats: NormStats, mode: NormMode, *, what: str) -> tuple[Stat, Stat] | None:
    """The two statistics that `mode` reads; None = leave values as they are (identity, or no statistics at all).

    Raises: ConfigError if the vector has statistics but not the ones that the mode needs.
    """
    if mode not in NEEDS:
        raise ConfigError(f"unknown normalisation mode of {what}", got=repr(mode), wanted=f"one of {sorted(NEEDS)}")
    names = NEEDS[mode]
    if names is None or all(value is None for value in vars(stats).values()):
        return None
    first, second = getattr(stats, names[0]), getattr(stats, names[1])
    if first is None or second is None:
        have = [name for name, value in vars(stats).items() if value is not None]
        raise ConfigError(
            f"the normalisation statistics of {what} lack what mode {mode!r} needs",
            got=f"only {have}",
            wanted=" and ".join(names),
            do="recompute the statistics, or export the checkpoint again",
        )
    return first, second


def normalize_state(state: NDArray[Any], normalization: Normalization) -> NDArray[Any]:
    """Robot units [..., n] to the network's scale; float64 (openpi) or float32 (LeRobot)."""
    if normalization.flavour == "openpi":
        return normalize_openpi(state, normalization.state, mode=normalization.state_mode, eps=normalization.eps)
    x = state.astype(np.float32)
    return normalize_lerobot(x, normalization.state, mode=normalization.state_mode, eps=normalization.eps)


def unnormalize_actions(actions: NDArray[Any], normalization: Normalization) -> NDArray[Any]:
    """The network's scale [..., A] to robot units; float64 (openpi) or float32 (LeRobot)."""
    if normalization.flavour == "openpi":
        return unnormalize_openpi(actions, normalization.action, mode=normalization.action_mode, eps=normalization.eps)
    x = actions.astype(np.float32)
    return unnormalize_lerobot(x, normalization.action, mode=normalization.action_mode, eps=normalization.eps)


# --- openpi -------------------------------------------------------------------------------------------------------


def normalize_openpi(x: NDArray[Any], stats: NormStats, *, mode: NormMode, eps: float = 1e-6) -> NDArray[np.float64]:
    """z-score (x-mean)/(std+eps), or quantile (x-q01)/(q99-q01+eps)*2-1, in float64; statistics cut to the width of x."""
    x64 = x.astype(np.float64)
    found = pair(stats, mode, what="the vector")
    if found is None:
        return x64
    first, second = (stat[: x.shape[-1]] for stat in found)
    _check_width(first, x)
    if mode == "mean_std":
        scaled: NDArray[np.float64] = (x64 - first) / (second + eps)
        return scaled
    ranged: NDArray[np.float64] = (x64 - first) / (second - first + eps) * 2.0 - 1.0
    return ranged


def unnormalize_openpi(x: NDArray[Any], stats: NormStats, *, mode: NormMode, eps: float = 1e-6) -> NDArray[np.float64]:
    """Inverse of `normalize_openpi`. Dims beyond the statistics: z-score scales them by 1+eps, quantile leaves them."""
    out = x.astype(np.float64)
    found = pair(stats, mode, what="the vector")
    if found is None:
        return out
    first, second = found
    if len(first) > x.shape[-1]:
        raise ShapeError("statistics are wider than the vector", got=len(first), wanted=f"<= {x.shape[-1]}")
    if mode == "mean_std":
        missing = (0, x.shape[-1] - len(first))
        plain: NDArray[np.float64] = out * (np.pad(second, missing, constant_values=1.0) + eps) + np.pad(first, missing)
        return plain
    n = len(first)
    # (x+1)/2 is rounded in the dtype of x, as in the original: the network's float32 actions differ by 1e-7 otherwise.
    out[..., :n] = (x[..., :n] + 1.0) / 2.0 * (second - first + eps) + first
    return out


# --- LeRobot ------------------------------------------------------------------------------------------------------


def normalize_lerobot(x: NDArray[Any], stats: NormStats, *, mode: NormMode, eps: float = 1e-8) -> NDArray[Any]:
    """(x-mean)/(std+eps), or 2(x-low)/range - 1 with an exactly zero range replaced by eps; in the dtype of x."""
    found = pair(stats, mode, what="the vector")
    if found is None:
        return x
    first, second = (stat.astype(x.dtype) for stat in found)
    _check_width(first, x)
    if mode == "mean_std":
        scaled: NDArray[Any] = (x - first) / (second + x.dtype.type(eps))
        return scaled
    ranged: NDArray[Any] = 2 * (x - first) / _range(first, second, eps) - 1
    return ranged


def unnormalize_lerobot(x: NDArray[Any], stats: NormStats, *, mode: NormMode, eps: float = 1e-8) -> NDArray[Any]:
    """x*std + mean (no epsilon), or the inverse of the range formula; in the dtype of x."""
    found = pair(stats, mode, what="the vector")
    if found is None:
        return x
    first, second = (stat.astype(x.dtype) for stat in found)
    _check_width(first, x)
    if mode == "mean_std":
        plain: NDArray[Any] = x * second + first
        return plain
    ranged: NDArray[Any] = (x + 1) / 2 * _range(first, second, eps) + first
    return ranged


def _range(low: NDArray[Any], high: NDArray[Any], eps: float) -> NDArray[Any]:
    span: NDArray[Any] = high - low
    return np.where(span == 0, span.dtype.type(eps), span)


def _check_width(stat: NDArray[Any], x: NDArray[Any]) -> None:
    if len(stat) != x.shape[-1]:
        raise ShapeError("normalisation statistics do not fit the vector", got=len(stat), wanted=x.shape[-1])
