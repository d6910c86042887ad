"""What never changes of the 8-bit layers of the prefill: computed once, so that a captured graph holds none of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .layers import QuantisedLinear


@dataclass(frozen=True)
class Constants:
    """What never changes of one 8-bit layer.  channel float32 [out] = input scale * weight scale; inverse float32 [1]."""

    channel: Tensor
    inverse: Tensor


def constants_of(model: nn.Module) -> dict[str, Constants]:
    """{layer name: constants} of every 8-bit layer."""
    return {
        layer.name: Constants((layer.input_scale * layer.weight_scale).contiguous(), 1.0 / layer.input_scale)
        for layer in model.modules()
        if isinstance(layer, QuantisedLinear)
    }
