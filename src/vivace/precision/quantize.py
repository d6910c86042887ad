"""Turns the linears that a plan names into E4M3 holders, in place, one at a time, so that memory only shrinks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.layers import Fp8Linear, Linear
from ..ops.reference import E4M3_MAX
from .plan import PrecisionPlan, WeightScale


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, Linear]]:
    """(owner, attribute, layer) of every linear in the model."""
    for owner in list(model.modules()):
        for attribute, child in list(owner.named_children()):
            if isinstance(child, Linear):
                yield owner, attribute, child


def quantise_weight(weight: Tensor, granularity: WeightScale) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (float8_e4m3fn [out, in], float32 scale [out]); the largest value of a group lands on 448."""
    wide = weight.float()
    largest = wide.abs().amax(dim=1) if granularity == "channel" else wide.abs().amax().expand(wide.shape[0])
    scale = (largest / E4M3_MAX).clamp_min(1e-12).contiguous()
    return (wide / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def quantise_layer(layer: Linear, *, amax: float, granularity: WeightScale = "channel") -> Fp8Linear:
    """The E4M3 holder of one layer. amax: largest |input| that shall not saturate."""
    weight, scale = quantise_weight(layer.weight.data, granularity)
    bias = None if layer.bias is None else layer.bias.data
    input_scale = torch.tensor([amax / E4M3_MAX], dtype=torch.float32, device=weight.device)
    return Fp8Linear(
        layer.name, weight, weight_scale=scale, input_scale=input_scale, bias=bias, dtype=layer.weight.dtype
    )


def apply(model: nn.Module, plan: PrecisionPlan) -> tuple[str, ...]:
    """Quantise every layer that the plan names; returns their names. Raises ConfigError if one has no measured range."""
    chosen = [(owner, attribute, layer) for owner, attribute, layer in linears(model) if plan.quantises(layer.name)]
    missing = [layer.name for _, _, layer in chosen if not plan.amax.get(layer.name, 0.0) > 0.0]
    if missing:
        raise ConfigError(
            f"plan {plan.name!r} has no activation range for {len(missing)} layers",
            got=", ".join(missing[:4]),
            do="run `vivace calibrate` on observations of this robot",
        )
    names = tuple(layer.name for _, _, layer in chosen)
    while chosen:
        owner, attribute, layer = chosen.pop()  # nothing here keeps a layer once its E4M3 holder is there
        rule = plan.rule(layer.name)
        assert rule is not None
        setattr(owner, attribute, quantise_layer(layer, amax=plan.amax[layer.name], granularity=rule.weight_scale))
        del layer
    return names
