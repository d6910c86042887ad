"""Turns the linears that a plan names into E4M3 or INT8 holders, in place, one at a time, so that memory only shrinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.layers import Fp8Linear, Int8Linear, Linear, QuantisedLinear, RowFp8Linear
from ..ops.reference import round_to
from .plan import Format, PrecisionPlan, WeightScale
from .segments import lasting

HOLDERS: dict[Format, type[QuantisedLinear]] = {"e4m3": Fp8Linear, "int8": Int8Linear}


def format_of(layer: Linear | QuantisedLinear) -> Format:
    """The format that a layer of a model is in."""
    if not isinstance(layer, QuantisedLinear):
        return "keep"
    return next(name for name, holder in HOLDERS.items() if layer.stored == holder.stored)


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, Linear]]:
    """(owner, attribute, layer) of every linear in the model."""
    for owner in list(model.modules()):
        for attribute, child in list(owner.named_children()):
            if isinstance(child, Linear):
                yield owner, attribute, child


def quantise_weight(
    weight: Tensor, granularity: WeightScale, *, holder: type[QuantisedLinear] = Fp8Linear
) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (stored [out, in], float32 scale [out]); the largest value of a group lands on 448, or 127."""
    wide = weight.float()
    largest = wide.abs().amax(dim=1) if granularity == "channel" else wide.abs().amax().expand(wide.shape[0])
    scale = (largest / holder.largest).clamp_min(1e-12).contiguous()
    return round_to(wide / scale[:, None], holder.stored), scale


def quantise_layer(
    layer: Linear, *, amax: float | None, format: Format = "e4m3", granularity: WeightScale = "channel",
    step_amax: Sequence[float] = (), keep: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> QuantisedLinear:  # fmt: skip
    """The holder of one layer in `format`, which is not "keep".

    amax       largest |input| that shall not saturate; None: every row gets a scale of its own (E4M3)
    step_amax  the same per denoise step, where each shall have its own scale
    keep       where its weight shall lie: a tensor to itself or to a copy
    """
    holder = HOLDERS[format] if amax is not None else RowFp8Linear
    weight, scale = quantise_weight(layer.weight.data, granularity, holder=holder)
    weight = keep(weight)
    bias = None if layer.bias is None else layer.bias.data
    of_all = 1.0 if amax is None else amax / holder.largest
    input_scale = torch.tensor([of_all], dtype=torch.float32, device=weight.device)
    step_scales = None
    if step_amax:
        of_steps = torch.tensor(
            [[one / holder.largest] for one in step_amax], dtype=torch.float32, device=weight.device
        )
        step_scales = of_steps.repeat(1, 4)
    return holder(
        layer.name, weight, weight_scale=scale, input_scale=input_scale, bias=bias, dtype=layer.weight.dtype,
        step_scales=step_scales,
    )  # fmt: skip


def planned_layer(
    layer: Linear, plan: PrecisionPlan, *, keep: Callable[[Tensor], Tensor] = lambda weight: weight
) -> QuantisedLinear:
    """The holder of a layer that `plan` quantises, as its rule says. Raises ConfigError for scales that it cannot have."""
    rule = plan.rule(layer.name)
    assert rule is not None, f"{layer.name} is not in the plan {plan.name}"
    if problem := plan.scale_problem(layer.name):
        raise ConfigError(f"the precision plan {plan.name!r} cannot be applied", got=problem, do="correct its rules")
    return quantise_layer(
        layer, amax=None if rule.input_scale == "row" else plan.amax[layer.name], format=rule.format,
        granularity=rule.weight_scale, keep=keep,
        step_amax=plan.step_amax[layer.name] if rule.input_scale == "step" else (),
    )  # fmt: skip


def apply(model: nn.Module, plan: PrecisionPlan) -> tuple[str, ...]:
    """Quantise every layer that the plan names; returns their names. Raises ConfigError if one has no measured range."""
    chosen = [(owner, attribute, layer) for owner, attribute, layer in linears(model) if plan.quantises(layer.name)]
    if missing := plan.without_range(layer.name for _, _, layer in chosen):
        raise ConfigError(
            f"plan {plan.name!r} has no activation range for {len(missing)} layers",
            got=", ".join(missing[:4]),
            do="run `vivace calibrate` on observations of this robot",
        )
    names = tuple(layer.name for _, _, layer in chosen)
    if not chosen:
        return names
    with lasting(chosen[0][2].weight.device) as place:
        while chosen:
            owner, attribute, layer = chosen.pop()  # nothing here keeps a layer once its holder is there
            setattr(owner, attribute, planned_layer(layer, plan, keep=place.keep))
            del layer
        place.keep_small(model)
    return names
