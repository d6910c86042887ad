"""What the prefill kernels cannot run, said before anything is launched."""

from __future__ import annotations

import re

import torch
from torch import nn

from .layers import Fp8Linear, Linear

# layers whose products have kernels here; the others (patches, time, action and state projections) are float32 by
# definition, small, and torch's own
_KERNELS = re.compile(r"(vision|prefix|expert)\.layers\.|projector")


def why_not(*, device: str, model: nn.Module | None = None) -> str | None:
    """Return why the prefill kernels cannot run on `device` (with `model`'s layers), or None if they can."""
    if not device.startswith("cuda"):
        return f"the prefill kernels need an NVIDIA GPU, not {device}"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"bfloat16 matrix units need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    for layer in [] if model is None else [m for m in model.modules() if isinstance(m, Linear | Fp8Linear)]:
        if reason := why_not_layer(layer, capability=capability):
            return f"{layer.name}: {reason}"
    return None


def why_not_layer(layer: Linear | Fp8Linear, *, capability: tuple[int, int]) -> str | None:
    """Return why one linear cannot run here, or None."""
    if isinstance(layer, Fp8Linear):
        if capability < (8, 9):
            return f"E4M3 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
        if layer.dtype != torch.bfloat16:
            return f"E4M3 products return bfloat16, not {layer.dtype}"
        multiple = 16
    elif layer.weight.dtype == torch.bfloat16:
        multiple = 8
    elif layer.weight.dtype == torch.float32 and not _KERNELS.match(layer.name):
        return None
    else:
        return f"no product for {layer.weight.dtype}"
    rows, columns = layer.weight.shape
    if rows % multiple or columns % multiple:
        return f"weight {rows} x {columns} is no multiple of {multiple}, the bulk copy engine's 16 bytes"
    return None
