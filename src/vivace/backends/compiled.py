"""torch.compile around the model's own methods: the portable fast path, with no kernels of our own.

Shapes are static. A prompt is padded to the next bucket and the padding masked, so a prompt whose
length changes from frame to frame stays in its compiled program; masked keys get exactly zero probability. Buckets are few
and wide (64, 256 tokens) because each costs seconds to compile; the padding adds at most a tenth to the prefix. Programs
are kept on disk under the cache folder, so a second process start compiles nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..config import EngineConfig, use_compile_cache
from ..model.pi import Pi
from ..types import ModelInputs, PrefixCache, PreviousChunk, Trace
from .loop import run_flow
from .spans import Spans, span

logger = logging.getLogger(__name__)

# Programs that one process may hold: buckets x views x batch sizes; torch's own limit of 8 is too small for that.
MAX_PROGRAMS = 64
GROWTH = 4  # from one bucket to the next


def why_not(*, device: str) -> str | None:
    """None if it can run on `device`."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
        return None if torch.cuda.get_device_capability() >= (7, 0) else "torch.compile needs compute capability 7.0"
    if not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile on a CPU needs a C++ compiler (g++ or clang++) on the PATH"
    return None


def why_not_model(model: Pi) -> str | None:
    """None if one program serves every denoise step; with input scales per step it would be one program for each."""
    if model.expert.scaled_steps():
        return "layers have input scales per denoise step; eager and cuda_graph take them"
    return None


def bucket(length: int, *, smallest: int) -> int:
    """Number of tokens of the program that holds `length` tokens: 4, 16, 64, ... times `smallest`."""
    size = GROWTH * smallest
    while size < length:
        size *= GROWTH
    return size


def pad_prompt(inputs: ModelInputs, length: int) -> ModelInputs:
    """Pad tokens on the right to `length` and mask the padding; always returns a token mask (static program)."""
    B, L = inputs.tokens.shape
    mask = inputs.token_mask
    if mask is None:
        mask = torch.ones(B, L, dtype=torch.bool, device=inputs.tokens.device)
    extra = length - L
    return replace(
        inputs, tokens=functional.pad(inputs.tokens, (0, extra)), token_mask=functional.pad(mask, (0, extra))
    )


class CompiledBackend:
    """Three programs: vision, prefix, one denoise step."""

    name = "compiled"

    def __init__(self, model: Pi, config: EngineConfig) -> None:
        use_compile_cache()
        self.model = model
        self._smallest = config.prompt_bucket
        self._table = model.time_table(config.steps)
        self._buckets: set[int] = set()
        self._views = torch.compile(model.embed_views, dynamic=False, fullgraph=True)
        self._prefix = torch.compile(self._prefix_program, dynamic=False, fullgraph=True)
        self._step = torch.compile(model.denoise_step, dynamic=False, fullgraph=True)

    def _prefix_program(self, inputs: ModelInputs, views: Tensor) -> tuple[Tensor, PrefixCache]:
        embeds, mask = self.model.embed_prefix(inputs, views)
        return embeds, self.model.prefill(embeds, mask, state=inputs.state)

    @torch.no_grad()
    def prefill(self, inputs: ModelInputs, *, trace: Trace | None = None, spans: Spans | None = None) -> PrefixCache:
        """See Backend.prefill. Under a trace, prefix_embeds holds the valid tokens only."""
        length = bucket(inputs.tokens.shape[1], smallest=self._smallest)
        if length not in self._buckets:
            logger.info("compiling for prompts of up to %d tokens, %d views", length, inputs.images.shape[1])
            self._buckets.add(length)
        padded = pad_prompt(inputs, length)
        with torch._dynamo.config.patch(recompile_limit=MAX_PROGRAMS):
            with span(spans, "vision"):
                views = self._views(padded.images)
            with span(spans, "prefix"):
                embeds, cache = self._prefix(padded, views)
        if trace is not None:
            trace.vision_tokens, trace.prefix_embeds = views, embeds[:, : views.shape[1] + inputs.tokens.shape[1]]
        return cache

    def denoise(
        self, cache: PrefixCache, noise: Tensor, *, previous: PreviousChunk | None = None, trace: Trace | None = None,
        spans: Spans | None = None,
    ) -> Tensor:  # fmt: skip
        """See Backend.denoise."""
        with span(spans, "denoise"), torch._dynamo.config.patch(recompile_limit=MAX_PROGRAMS):
            return run_flow(self.model, self._step, self._table, cache, noise, previous=previous, trace=trace)

    def look(self, images: Tensor) -> None:
        """See Backend.look: nothing to gain, the host is what this backend waits for."""

    def infer(
        self, inputs: ModelInputs, noise: Tensor, *, previous: PreviousChunk | None = None, spans: Spans | None = None
    ) -> Tensor:
        """See Backend.infer."""
        return self.denoise(self.prefill(inputs, spans=spans), noise, previous=previous, spans=spans)

    def warm_shapes(self, longest: int, *, views: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See Backend.warm_shapes: one per program, with all cameras; those of fewer would cost seconds each."""
        sizes = {bucket(length, smallest=self._smallest) for length in range(longest + 1)}
        return tuple((views[0], min(size, longest)) for size in sorted(sizes))

    def describe(self) -> dict[str, Any]:
        """See Backend.describe."""
        return {
            "smallest_bucket": self._smallest,
            "buckets_compiled": sorted(self._buckets),
            "torch": torch.__version__,
        }


def create(model: Pi, config: EngineConfig) -> CompiledBackend:
    """Registry constructor."""
    return CompiledBackend(model, config)
