"""What never changes of the E4M3 layers of the prefill: computed once, so that a captured graph holds none of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .layers import E4m3Linear


@dataclass(frozen=True)
class Fp8Constants:
    """What never changes of one E4M3 layer.  channel float32 [out] = input scale * weight scale; inverse float32 [1]."""

    channel: Tensor
    inverse: Tensor


def fp8_constants(model: nn.Module) -> dict[str, Fp8Constants]:
    """{layer name: constants} of every E4M3 layer."""
    return {
        layer.name: Fp8Constants((layer.input_scale * layer.weight_scale).contiguous(), 1.0 / layer.input_scale)
        for layer in model.modules()
        if isinstance(layer, E4m3Linear)
    }
