"""The safetensors file of a written checkpoint: every tensor that openpi or LeRobot stores, also what nothing reads.

Both load with all names required (`strict`), so three tensors that inference never touches belong into a file: the last
norm of the prefix (zeros), the word head of the expert (zeros), and the prefix's own, which is the embedding table again.
openpi ties that pair and stores it once, under the head's name; LeRobot 0.5 and later store both. There the head's values
must be those of the table: LeRobot copies the head over it while loading, if the head comes later in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from .dialects import written_key
from .names import expected_shapes
from .random_values import BLOCK_VALUES
from .safetensors_io import write_safetensors

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
PREFIX_NORM = "paligemma_with_expert.paligemma.model.language_model.norm.weight"


@dataclass(frozen=True)
class Written:
    """One tensor of the file: its shape, and vivace's name of the values in it (None = zeros)."""

    shape: tuple[int, ...]
    source: str | None


def written(model: ModelConfig, *, format: Literal["lerobot", "openpi"]) -> dict[str, Written]:
    """{key in the file: what it holds}, in file order."""
    lead = "model." if format == "lerobot" else ""
    shapes = expected_shapes(model)
    table = {written_key(name): Written(shape, name) for name, shape in shapes.items()}
    head = Written(shapes["embedding.weight"], "embedding.weight")
    if format == "openpi":
        table = {LM_HEAD if key == EMBEDDING else key: value for key, value in table.items()}
    else:
        table[LM_HEAD] = head
    table[EXPERT_HEAD] = Written((model.vocab_size, model.expert.width), None)
    table[PREFIX_NORM] = Written((model.prefix.width,), None)
    return {lead + key: value for key, value in table.items()}


def write_weights(
    file: Path,
    model: ModelConfig,
    *,
    format: Literal["lerobot", "openpi"],
    dtype: torch.dtype,
    values: Callable[[str], Iterator[Tensor]],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write model.safetensors, a block at a time.

    Args:
        file: overwritten.
        model: the network.
        format: whose names.
        dtype: of every tensor in the file.
        values: the blocks of one tensor by vivace's name, rows in order; LeRobot's embedding is asked for twice.
        progress: called with the number of parameters just written, those that nothing reads left out.
    """
    table = written(model, format=format)

    def blocks() -> Iterator[Tensor]:
        done: set[str] = set()
        for item in table.values():
            for block in _zeros(item.shape) if item.source is None else values(item.source):
                yield block.to(dtype)
                if item.source is not None and item.source not in done:
                    progress(block.numel())
            if item.source is not None:
                done.add(item.source)

    entries = [(key, dtype, item.shape) for key, item in table.items()]
    metadata = {"format": "pt"} if format == "lerobot" else {EMBEDDING: LM_HEAD}
    write_safetensors(file, entries, blocks=blocks(), metadata=metadata)


def _zeros(shape: tuple[int, ...]) -> Iterator[Tensor]:
    left = math.prod(shape)
    while left:
        count = min(left, BLOCK_VALUES)
        yield torch.zeros(count)
        left -= count
