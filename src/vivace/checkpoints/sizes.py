"""Networks that `make-checkpoint` can write: the real pi0 / pi0.5 and smaller ones of the same anatomy.

All have 224-pixel images in 14-pixel patches (256 tokens per view), 8 query heads over one key/value head, and an expert
narrower than the prefix, so that every code path of the full size runs in the small ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..config import GemmaConfig, ModelConfig, VisionConfig
from ..types import PolicyKind

Size = Literal["tiny", "small", "base", "full"]


@dataclass(frozen=True)
class SizeRow:
    """One size: its parameters for pi0.5 in a word, and the three stacks."""

    about: str
    model: ModelConfig


SIZES: dict[Size, SizeRow] = {
    "tiny": SizeRow(
        "0.1 M parameters, half a megabyte: unit tests",
        ModelConfig(
            vision=VisionConfig(width=24, layers=2, mlp_width=48, num_heads=2),
            prefix=GemmaConfig(width=32, layers=2, mlp_width=64, head_dim=16),
            expert=GemmaConfig(width=24, layers=2, mlp_width=48, head_dim=16),
            vocab_size=512,
        ),
    ),
    "small": SizeRow(
        "13 M parameters: demos on a CPU",
        ModelConfig(
            vision=VisionConfig(width=144, layers=4, mlp_width=576, num_heads=2),
            prefix=GemmaConfig(width=256, layers=6, mlp_width=1024, head_dim=64),
            expert=GemmaConfig(width=192, layers=6, mlp_width=768, head_dim=64),
            vocab_size=2048,
        ),
    ),
    "base": SizeRow(
        "0.3 B parameters: a GPU test that fits everywhere",
        ModelConfig(
            vision=VisionConfig(width=576, layers=12, mlp_width=2304, num_heads=8),
            prefix=GemmaConfig(width=1024, layers=12, mlp_width=4096, head_dim=128),
            expert=GemmaConfig(width=512, layers=12, mlp_width=2048, head_dim=128),
            vocab_size=8192,
        ),
    ),
    "full": SizeRow("3.35 B parameters, the dimensions of the released pi0 and pi0.5", ModelConfig()),
}


def network(size: Size, kind: PolicyKind, *, horizon: int) -> ModelConfig:
    """The network of a size; numerics fields are irrelevant to writing and stay at their defaults."""
    return replace(SIZES[size].model, kind=kind, horizon=horizon)
