"""Plain PyTorch, op by op: the slowest backend and the reference of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig
from ..model.pi import Pi
from ..types import ModelInputs, PrefixCache, PreviousChunk, Trace
from .loop import run_flow
from .spans import Spans, span


def why_not(*, device: str) -> str | None:
    """None if it can run on `device`."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return None


class EagerBackend:
    """Runs the model's methods one after the other."""

    name = "eager"

    def __init__(self, model: Pi, config: EngineConfig) -> None:
        self.model = model
        self._table = model.time_table(config.steps)

    @torch.no_grad()
    def prefill(self, inputs: ModelInputs, *, trace: Trace | None = None, spans: Spans | None = None) -> PrefixCache:
        """See Backend.prefill."""
        with span(spans, "vision"):
            views = self.model.embed_views(inputs.images)
        with span(spans, "prefix"):
            embeds, mask = self.model.embed_prefix(inputs, views)
            cache = self.model.prefill(embeds, mask, state=inputs.state)
        if trace is not None:
            trace.vision_tokens, trace.prefix_embeds = views, embeds
        return cache

    def denoise(
        self, cache: PrefixCache, noise: Tensor, *, previous: PreviousChunk | None = None, trace: Trace | None = None,
        spans: Spans | None = None,
    ) -> Tensor:  # fmt: skip
        """See Backend.denoise."""
        # asked anew: `precision.sensitivity` exchanges layers of a model that has a backend already
        table = replace(self._table, scaled=self.model.has_step_scales(len(self._table.times)))
        with span(spans, "denoise"):
            return run_flow(self.model, self.model.denoise_step, table, cache, noise, previous=previous, trace=trace)

    def look(self, images: Tensor) -> None:
        """See Backend.look: nothing to gain, the host is what this backend waits for."""

    def infer(
        self, inputs: ModelInputs, noise: Tensor, *, previous: PreviousChunk | None = None, spans: Spans | None = None
    ) -> Tensor:
        """See Backend.infer."""
        return self.denoise(self.prefill(inputs, spans=spans), noise, previous=previous, spans=spans)

    def warm_shapes(self, longest: int, *, views: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See Backend.warm_shapes: every shape runs the same code."""
        return ((views[0], longest),)

    def describe(self) -> dict[str, Any]:
        """See Backend.describe."""
        return {"ops": "reference"}


def create(model: Pi, config: EngineConfig) -> EagerBackend:
    """Registry constructor."""
    return EagerBackend(model, config)
