"""Prepared observations, each of its own size, into one batch on the device.

One observation needs no mask: `robots` already left out everything invalid. In a batch the shorter prompts and the
missing views are padded and masked; masked tokens get exactly zero attention, so every row keeps its own answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..types import ModelInputs, PolicyKind, PreparedObservation


@dataclass(frozen=True)
class SentViews:
    """Pictures of a batch on the device: `images` and `view_mask` of ModelInputs."""

    images: Tensor
    view_mask: Tensor | None


def send_views(images: Sequence[NDArray[Any]], device: torch.device) -> SentViews:
    """Batch the pictures of each request, [V, 3, size, size]. The mask is None where all have as many views."""
    stacked, mask = _stack(_same_dtype(images))
    return SentViews(sent(stacked, device), None if mask is None else sent(mask, device))


def collate(
    rows: Sequence[PreparedObservation], *, kind: PolicyKind, device: torch.device, views: SentViews | None = None
) -> ModelInputs:
    """Batch prepared observations. Masks are None where all rows have the same size.

    views  the rows' pictures, if they were sent before the rest was prepared
    """
    if views is None:
        views = send_views([row.images for row in rows], device)
    tokens, token_mask = _stack([row.tokens.astype(np.int64) for row in rows])
    return ModelInputs(
        images=views.images,
        tokens=sent(tokens, device),
        view_mask=views.view_mask,
        token_mask=None if token_mask is None else sent(token_mask, device),
        state=sent(np.stack([row.state for row in rows]), device) if kind == "pi0" else None,
    )


def sent(value: NDArray[np.generic], device: torch.device) -> Tensor:
    """A host array on the device, contiguous. To a GPU by way of page-locked memory: the host need not wait for the copy.

    torch keeps the page-locked block until the copy is over, and then for the next request. numpy fills it: torch would
    wake all of its threads for a few hundred kilobytes. Axes stored in another order are turned on the device.
    """
    if device.type != "cuda":
        return torch.from_numpy(np.ascontiguousarray(value)).to(device)
    stored, axes = as_stored(value)
    plain = torch.from_numpy(stored)
    if not plain.is_pinned():
        locked = page_locked(stored.shape, stored.dtype.type)
        np.copyto(locked, stored)
        plain = torch.from_numpy(locked)
    return plain.to(device, non_blocking=True).permute(axes).contiguous()


def page_locked(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """`numpy.empty` in memory that a GPU copies from by itself; torch's allocator has it back when the array is gone."""
    like = torch.from_numpy(np.empty(0, dtype))
    made: NDArray[Any] = torch.empty(shape, dtype=like.dtype, pin_memory=True).numpy()
    return made


def as_stored(value: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, ...]]:
    """The array with its axes in the order of memory, and the permutation that brings them back."""
    order = sorted(range(value.ndim), key=lambda axis: -value.strides[axis])
    return value.transpose(order), tuple(order.index(axis) for axis in range(value.ndim))


def _stack(arrays: Sequence[NDArray[np.generic]]) -> tuple[NDArray[np.generic], NDArray[np.bool_] | None]:
    """Pad the first axis to the longest; return the stack and bool [B, longest], None if nothing was padded."""
    counts = [len(array) for array in arrays]
    longest = max(counts)
    if len(arrays) == 1:
        return arrays[0][None], None
    if min(counts) == longest:
        return np.stack(arrays), None
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return padded, np.arange(longest)[None] < np.array(counts)[:, None]


def _same_dtype(images: Sequence[NDArray[Any]]) -> list[NDArray[np.generic]]:
    """uint8 only if all are: else what the vision tower makes of uint8 itself."""
    if all(one.dtype == np.uint8 for one in images):
        return list(images)
    return [_to_unit(one) if one.dtype == np.uint8 else one for one in images]


def _to_unit(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return image.astype(np.float32) / np.float32(255.0) * np.float32(2.0) - np.float32(1.0)
