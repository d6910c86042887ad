"""Checks what a caller hands over for real-time chunking, before it meets the network."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import ShapeError
from ..types import PreviousChunk


def checked(
    previous: PreviousChunk | None, *, shape: tuple[int, int, int], device: torch.device
) -> PreviousChunk | None:
    """The older chunk on `device` in float32. Raises ShapeError where it does not fit a chunk of `shape` (B, H, width)."""
    if previous is None:
        return None
    actions = torch.as_tensor(previous.actions, dtype=torch.float32, device=device)
    if tuple(actions.shape) != shape:
        raise ShapeError(
            "the previous chunk has another shape", got=list(actions.shape), wanted=list(shape),
            do="pad what is left with zeros on the right; actions are normalised and as wide as the model's",
        )  # fmt: skip
    if not bool(torch.isfinite(actions).all()):
        raise ShapeError("the previous chunk is not finite", do="pass ActionChunk.actions_normalized of the last chunk")
    if not 0 <= previous.inference_delay <= shape[1]:
        raise ShapeError("inference delay outside the chunk", got=previous.inference_delay, wanted=f"0..{shape[1]}")
    weights = previous.weights
    if previous.mode == "guided":
        if weights is None or tuple(weights.shape) != shape[1:2]:
            got = None if weights is None else list(weights.shape)
            raise ShapeError(
                "guided chunking needs one weight per action", got=got, wanted=[shape[1]],
                do="use model.flow.prefix_weights",
            )  # fmt: skip
        weights = weights.to(device=device, dtype=torch.float32)
    return replace(previous, actions=actions, weights=weights)
