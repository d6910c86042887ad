"""Prepared observations, each of its own size, into one batch on the device.

One observation needs no mask: `robots` already left out everything invalid. In a batch the shorter prompts and the
missing views are padded and masked; masked tokens get exactly zero attention, so every row keeps its own answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..types import ModelInputs, PolicyKind, PreparedObservation


def collate(rows: Sequence[PreparedObservation], *, kind: PolicyKind, device: torch.device) -> ModelInputs:
    """Batch prepared observations. Masks are None where all rows have the same size."""
    images, view_mask = _stack([_same_dtype(row.images, rows) for row in rows])
    tokens, token_mask = _stack([row.tokens.astype(np.int64) for row in rows])
    state = torch.from_numpy(np.stack([row.state for row in rows])) if kind == "pi0" else None
    return ModelInputs(
        images=sent(images, device),
        tokens=sent(tokens, device),
        view_mask=None if view_mask is None else sent(view_mask, device),
        token_mask=None if token_mask is None else sent(token_mask, device),
        state=None if state is None else sent(state, device),
    )


def sent(value: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device. To a GPU by way of page-locked memory, so that the host need not wait for the copy.

    torch keeps the page-locked block until the copy is over, and then for the next request.
    """
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _stack(arrays: Sequence[NDArray[np.generic]]) -> tuple[Tensor, Tensor | None]:
    """Pad the first axis to the longest; return the stack and bool [B, longest], None if nothing was padded."""
    counts = [len(array) for array in arrays]
    longest = max(counts)
    if min(counts) == longest:
        return torch.from_numpy(np.stack(arrays)), None
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return torch.from_numpy(padded), torch.arange(longest)[None] < torch.tensor(counts)[:, None]


def _same_dtype(images: NDArray[np.generic], rows: Sequence[PreparedObservation]) -> NDArray[np.generic]:
    if all(row.images.dtype == np.uint8 for row in rows) or images.dtype != np.uint8:
        return images
    return images.astype(np.float32) / np.float32(255.0) * np.float32(2.0) - np.float32(1.0)
