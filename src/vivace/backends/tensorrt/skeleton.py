"""The network's outline: a `Pi` whose parameters have names, shapes and types but no numbers.

Networks are written from it, so a full-size one needs no gigabytes; numbers come later, by name, from the loaded model: as
constants of an engine (`baked`) or as tensors bound at run time (`inputs`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...checkpoints.fingerprint import part
from ...config import ModelConfig, TensorRTBase
from ...errors import ConfigError
from ...model import weights
from ...model.pi import Pi
from ...ops.layers import QuantisedLinear, RowFp8Linear
from ...precision import quantize
from ...precision.flavours import Dtype, parameter_dtype
from ...precision.plan import Format

DTYPES: dict[TensorRTBase, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OUTSIDE = ("embedding", "expert.modulation.", "time_in.", "time_out.", "action_time_in.bias")
"""Parameters that no network has: the look-up of the prompt (a gigabyte) and what depends on flow time alone."""


def outline(
    config: ModelConfig, *, base: TensorRTBase, formats: Mapping[str, Format] | None = None,
    precision: Dtype = "bfloat16",
) -> Pi:  # fmt: skip
    """A `Pi` on the meta device.

    base   type of everything that the checkpoint's flavour serves in bfloat16; what it keeps in float32 stays float32
    formats  {layer: format} of those that a precision plan quantises
    precision  which parts "bfloat16" means, see `precision.flavours`
    Raises ConfigError for a name that no layer has.
    """
    compute = DTYPES[base]
    with torch.device("meta"):
        model = Pi(config)
    for name, slot in weights.slots(config).items():
        wide = parameter_dtype(name, precision=precision, flavour=config.flavour) == torch.float32
        _retype(model, slot.parameter, torch.float32 if wide else compute)
    unknown = dict(formats or {})
    for owner, attribute, layer in list(quantize.linears(model)):
        if (wanted := unknown.pop(layer.name, "keep")) != "keep":
            setattr(owner, attribute, quantize.quantise_layer(layer, amax=1.0, format=wanted))
    if unknown:
        raise ConfigError("the plan names layers that this network lacks", got=", ".join(sorted(unknown)[:4]))
    return model.requires_grad_(False).eval()


def _retype(model: nn.Module, path: str, dtype: torch.dtype) -> None:
    owner = model.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    shape = getattr(owner, name).shape
    setattr(owner, name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))


def precision_of(model: Pi) -> Dtype:
    """What a bfloat16 model was loaded in: LeRobot's flavour keeps vision in float32 unless asked."""
    return "bfloat16+vision" if model.vision.norm.weight.dtype == torch.bfloat16 else "bfloat16"


def formats(model: nn.Module) -> dict[str, Format]:
    """{layer: format} of the quantised layers of a model."""
    return {layer.name: quantize.format_of(layer) for layer in model.modules() if isinstance(layer, QuantisedLinear)}


def why_not_scales(model: nn.Module) -> str | None:
    """None if every quantised layer has one static input scale, which is what an engine holds."""
    for layer in model.modules():
        if isinstance(layer, QuantisedLinear) and (layer.steps or isinstance(layer, RowFp8Linear)):
            kind = "per denoise step" if layer.steps else "row-wise"
            return f"{layer.name} has {kind} input scales, engines take one static scale per tensor"
    return None


def values(model: Pi, outlined: Pi) -> dict[str, Tensor]:
    """{parameter: the model's numbers in the outline's type} of what networks use; of that type already: not copied."""
    wanted = dict(outlined.named_parameters())
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if lost := sorted(set(wanted) ^ set(found)):
        raise ConfigError("the model is not quantised as its outline is", got=", ".join(lost[:4]))
    return {name: found[name].to(wanted[name].dtype) for name in wanted if not name.startswith(OUTSIDE)}


def digest(numbers: dict[str, Tensor], names: Collection[str]) -> str:
    """16 hex digits of the weights and scales called `names`, sampled as `checkpoints.fingerprint` does."""
    whole = hashlib.sha256()
    for name in sorted(names):
        value = numbers[name]
        whole.update(f"{name} {part(value.view(torch.uint8) if value.dtype.itemsize == 1 else value)}\n".encode())
    return whole.hexdigest()[:16]
