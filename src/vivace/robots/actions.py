"""Delta actions: some policies predict differences to the current state, which must be added back before a robot moves.

openpi calls them delta, LeRobot relative; the arithmetic is the same. The reference is the state of the same tick, in robot
units (LeRobot: raw; openpi: after the embodiment's adapter), for every step of the chunk: differences do not accumulate.

Source: openpi transforms.py (DeltaActions, AbsoluteActions); lerobot processor/relative_action_processor.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_absolute(actions: NDArray[Any], state: NDArray[Any], *, mask: Sequence[bool] | None) -> NDArray[Any]:
    """Add the state to the dims where `mask` is true: actions [..., H, A], state [..., n >= len(mask)]."""
    return _shift(actions, state, mask=mask, sign=1)


def to_delta(actions: NDArray[Any], state: NDArray[Any], *, mask: Sequence[bool] | None) -> NDArray[Any]:
    """Inverse of `to_absolute`; training data and tests need it, inference does not."""
    return _shift(actions, state, mask=mask, sign=-1)


def _shift(actions: NDArray[Any], state: NDArray[Any], *, mask: Sequence[bool] | None, sign: int) -> NDArray[Any]:
    out = actions.copy()
    if not mask:
        return out
    n = len(mask)
    offset = np.where(np.asarray(mask), state[..., :n], 0).astype(out.dtype)[..., None, :]
    out[..., :n] = out[..., :n] + sign * offset
    return out


def relative_mask(names: Sequence[str] | None, exclude: Sequence[str], *, dims: int) -> tuple[bool, ...]:
    """Which action dims LeRobot treats as relative: all but the joints whose name contains an excluded token.

    names    joint name per action dim; None = unknown, every dim is relative; dims beyond the names are relative
    exclude  tokens, compared in lower case; a token equal to or contained in a name excludes it; "" excludes nothing
    """
    tokens = [token.lower() for token in exclude if token]
    known = [not any(token in name.lower() for token in tokens) for name in (names or ())][:dims]
    return tuple(known + [True] * (dims - len(known)))
