"""Fresh weights: activations near one at any width, and an expert that starts as the identity.

Matrices are normal with standard deviation 1/sqrt(fan in), a truncated normal of the same kind for embeddings (they are
multiplied by sqrt(width) afterwards, so tokens enter with variance one). Modulation matrices are zero, as openpi's are: all
gates are then zero and every expert block passes its input on, so gradients reach all layers from the first step on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..model.pi import Pi


def fresh(config: ModelConfig, *, seed: int, device: torch.device) -> Pi:
    """A network with float32 weights that are a function of (config, seed); drawn on the CPU, so equal on any device."""
    model = Pi(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_drawn(name, parameter, generator))
    return model.to(device).train()


def _drawn(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    shape = parameter.shape
    if "modulation" in name:
        return torch.zeros(shape)
    if len(shape) == 1:  # biases and gains; Gemma's gains are stored minus one, LayerNorm's are not
        gain = name.startswith("vision.") and "norm" in name and name.endswith("weight")
        return torch.ones(shape) if gain else torch.zeros(shape)
    std = {"embedding": 1.0 / math.sqrt(shape[-1]), "vision.position": 0.02}.get(name, 1.0 / math.sqrt(shape[1]))
    return torch.randn(shape, generator=generator) * std
