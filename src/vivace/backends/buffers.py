"""The fixed addresses that captured graphs read: one record per shape bucket, filled from each request.

A request may be smaller than its bucket: the prompt is padded on the right and the padding masked. The masks live on the
device as data, so a prompt whose length changes from frame to frame changes a few bytes and no graph.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ShapeError
from ..types import ModelInputs, PreviousChunk


@dataclass(frozen=True)
class Bucket:
    """The static shape of one request.

    masked  False: the prompt fills the bucket and nothing is masked, so no mask is read anywhere
    """

    batch: int
    views: int
    tokens: int
    pixels: torch.dtype
    masked: bool

    @property
    def label(self) -> str:
        """For people: "1x3 views + 48 tokens, masked"."""
        return f"{self.batch}x{self.views} views + {self.tokens} tokens{', masked' if self.masked else ''}"


def choose(wanted: Bucket, known: Collection[Bucket], *, most: int) -> Bucket:
    """The bucket to run a request in: its own if its graphs exist, else one with masks that can hold it exactly.

    A prompt that fills its bucket needs no mask and runs a little faster without; but a prompt of changing length fills a
    bucket by chance, and then must not stop the robot for a capture.

    A request that lacks a camera runs in a known bucket of a longer prompt rather than wait for its own to be recorded, and
    so does any once `most` buckets are known: masked keys get zero probability, whatever their number. Answers of two
    buckets agree to rounding, not in every bit.
    """
    masked = replace(wanted, masked=True)
    if wanted in known:
        return wanted
    if masked in known:
        return masked
    if len(known) >= most or any(one.views > wanted.views for one in known):
        longer = [one for one in known if replace(one, tokens=wanted.tokens) == masked and one.tokens > wanted.tokens]
        if longer:
            return min(longer, key=lambda one: one.tokens)
    return wanted


@dataclass(frozen=True)
class InputBuffers:
    """Device memory of one bucket's inputs; `inputs` is what the captured model sees."""

    images: Tensor
    tokens: Tensor
    view_mask: Tensor
    token_mask: Tensor
    state: Tensor
    masked: bool

    @property
    def inputs(self) -> ModelInputs:
        """The buffers as a request."""
        views, tokens = (self.view_mask, self.token_mask) if self.masked else (None, None)
        return ModelInputs(self.images, self.tokens, view_mask=views, token_mask=tokens, state=self.state)

    def fill(self, request: ModelInputs, *, pixels: bool = True) -> None:
        """Copy a request in; asynchronous. Whatever the last request left beyond the new prompt is masked, not read.

        pixels  False: they are there already
        Raises  ShapeError for a part of another size than the buffer.
        """
        L = request.tokens.shape[1]
        if pixels:
            put(self.images, request.images, "images")
        put(self.tokens[:, :L], request.tokens, "tokens")
        if request.state is not None:
            put(self.state, request.state, "state")
        if not self.masked:
            return
        self.token_mask[:, L:].fill_(False)
        _fill_mask(self.token_mask[:, :L], request.token_mask, "token mask")
        _fill_mask(self.view_mask, request.view_mask, "view mask")


@dataclass(frozen=True)
class FlowBuffers:
    """What the denoise graph reads: noise, and for real-time chunking the older chunk."""

    noise: Tensor
    older: Tensor
    delay: Tensor
    weights: Tensor
    max_guidance: Tensor

    def fill(self, noise: Tensor, previous: PreviousChunk | None) -> None:
        """Copy one request's noise and older chunk in; asynchronous.

        Raises  ShapeError for guidance without weights, and for a part of another size than the buffer.
        """
        put(self.noise, noise, "noise")
        if previous is None:
            return
        put(self.older, previous.actions, "actions of the previous chunk")
        self.delay.fill_(previous.inference_delay)
        if previous.mode != "guided":
            return
        if previous.weights is None:
            raise ShapeError(
                "guided chunking needs a weight per action", got="none", do="see model.flow.prefix_weights"
            )
        put(self.weights, previous.weights, "weights of guided chunking")
        self.max_guidance.fill_(previous.max_guidance)


def input_buffers(bucket: Bucket, *, images: Tensor, state_width: int) -> InputBuffers:
    """Zeroed buffers of one bucket, nothing masked.  images: the buffer of its pixels, which buckets share."""
    B, V, L, device = bucket.batch, bucket.views, bucket.tokens, images.device
    return InputBuffers(
        images=images,
        tokens=torch.zeros(B, L, dtype=torch.int64, device=device),
        view_mask=torch.ones(B, V, dtype=torch.bool, device=device),
        token_mask=torch.ones(B, L, dtype=torch.bool, device=device),
        state=torch.zeros(B, state_width, dtype=torch.float32, device=device),
        masked=bucket.masked,
    )


def flow_buffers(batch: int, horizon: int, width: int, device: torch.device) -> FlowBuffers:
    """Zeroed buffers for one batch size and horizon."""
    noise = torch.zeros(batch, horizon, width, device=device)
    return FlowBuffers(
        noise=noise,
        older=torch.zeros_like(noise),
        delay=torch.zeros((), dtype=torch.int64, device=device),
        weights=torch.zeros(horizon, device=device),
        max_guidance=torch.zeros((), device=device),
    )


def bucket_of(request: ModelInputs, *, step: int) -> Bucket:
    """The bucket of a request: its prompt rounded up to a multiple of `step` tokens."""
    B, V = request.images.shape[:2]
    L = request.tokens.shape[1]
    size = -(-L // step) * step
    masked = size != L or request.view_mask is not None or request.token_mask is not None
    return Bucket(B, V, size, request.images.dtype, masked)


def put(target: Tensor, value: Tensor, what: str) -> None:
    """Copy, asynchronously, without the broadcasting that `copy_` does: one row's noise is not a batch's."""
    if value.shape != target.shape:
        raise ShapeError(f"{what} of another size", got=list(value.shape), wanted=list(target.shape))
    target.copy_(value, non_blocking=True)


def _fill_mask(target: Tensor, mask: Tensor | None, what: str) -> None:
    if mask is None:
        target.fill_(True)
    else:
        put(target, mask, what)
