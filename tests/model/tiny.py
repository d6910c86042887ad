"""Tiny random networks for tests: every parameter random, so that no norm or gate is a no-op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vivace.config import GemmaConfig, ModelConfig, VisionConfig
from vivace.model import weights
from vivace.model.pi import Pi


def tiny_config(kind: str, **changes) -> ModelConfig:
    return ModelConfig(
        **{
            "kind": kind,
            "vision": VisionConfig(width=24, layers=2, mlp_width=40, num_heads=2, patch_size=14, image_size=56),
            "prefix": GemmaConfig(width=32, layers=3, mlp_width=48, num_heads=8, num_kv_heads=1, head_dim=16),
            "expert": GemmaConfig(width=16, layers=3, mlp_width=28, num_heads=8, num_kv_heads=1, head_dim=16),
            "vocab_size": 64,
            "horizon": 7,
            **changes,
        }
    )


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Unpacked tensors under vivace's checkpoint names, the never-read ones of the last prefix layer included."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Pi(config).named_parameters()}
    out = {}
    for name, slot in weights.slots(config).items():
        shape = (slot.count, *shapes[slot.parameter][1:])
        scale = 0.1 if len(shape) == 1 else (0.5 if name == "embedding.weight" else 0.8 / shape[-1] ** 0.5)
        value = torch.randn(shape, generator=g) * scale
        if name.startswith("vision") and ".norm" in name and name.endswith("weight"):
            value = value + 1.0
        if name == "vision.patch.weight":
            value = value.unflatten(-1, (3, config.vision.patch_size, config.vision.patch_size))
        out[name] = value
    p, last = config.prefix, f"prefix.layers.{config.prefix.layers - 1}"
    q = p.num_heads * p.head_dim
    for part, shape in {
        "attn.q": (q, p.width), "attn.o": (p.width, q), "norm2": (p.width,),
        "mlp.gate": (p.mlp_width, p.width), "mlp.up": (p.mlp_width, p.width), "mlp.down": (p.width, p.mlp_width),
    }.items():  # fmt: skip
        out[f"{last}.{part}.weight"] = torch.randn(shape, generator=g) * 0.1
    return out


@dataclass(frozen=True)
class InMemory:
    """A tensor that is already loaded, as a checkpoint tensor."""

    value: Tensor
    key: str = "in memory"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self, device: torch.device) -> Tensor:
        return self.value.to(device)


def build(config: ModelConfig, tensors: dict[str, Tensor], *, dtype_of=lambda name: torch.float32, device="cpu") -> Pi:
    sources = {name: InMemory(value) for name, value in tensors.items()}
    return weights.load(config, sources, device=torch.device(device), dtype_of=dtype_of)
