"""What the prefill kernels cannot run, said before anything is launched."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import Unsupported
from . import launch
from .denoise import MAX_HEAD_DIM, MAX_ROWS
from .layers import AnyLinear, E4m3Linear, QuantisedLinear, RowFp8Linear

SHARED_BYTES = 229_432  # of the largest tile of Hopper, as compiled for it
LEAST_SHARED_BYTES = 101_376  # what the tiles for other GPUs are cut for: RTX 30, 40 and 50 have no more
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
    room = launch.shared_bytes(torch.device(device))
    needed = SHARED_BYTES if capability[0] == 9 else LEAST_SHARED_BYTES
    if room is not None and room < needed:
        return f"the kernels of the prefix are cut for {needed} bytes of shared memory, this GPU has {room}"
    for layer in [] if model is None else [m for m in model.modules() if isinstance(m, AnyLinear)]:
        if reason := why_not_layer(layer, capability=capability):
            return f"{layer.name}: {reason}"
    config = getattr(model, "config", None)
    return why_not_heads(config) if isinstance(config, ModelConfig) else None


def why_not_heads(config: ModelConfig) -> str | None:
    """Return why the attention kernels cannot run this network's heads, or None."""
    vision = config.vision
    reason = why_not_vision_head(vision.width, vision.num_heads)
    if reason is not None:
        return f"vision: {reason}"
    reason = why_not_head(config.prefix.head_dim)
    return None if reason is None else f"prefix: {reason}"


def why_not_head(head_dim: int) -> str | None:
    """Return why the prefix attention has no kernel for this head size, or None."""
    if head_dim < 16 or head_dim > MAX_HEAD_DIM or head_dim & (head_dim - 1):
        return f"head size {head_dim} is not a power of two from 16 to {MAX_HEAD_DIM}"
    return None


def why_not_vision_head(width: int, num_heads: int) -> str | None:
    """Return why the vision attention has no kernel for `width` columns in `num_heads` heads, or None.

    A head is read as a power of two of columns and a rest, and a matrix unit takes no fewer than 16: 24 is the least.
    """
    head_dim, left = divmod(width, num_heads)
    if left or head_dim % 8 or head_dim < 24 or head_dim > MAX_HEAD_DIM:
        return f"{num_heads} heads in {width} columns are no head size of a multiple of 8 from 24 to {MAX_HEAD_DIM}"
    return None


def why_not_layer(layer: AnyLinear, *, capability: tuple[int, int]) -> str | None:
    """Return why one linear cannot run here, or None."""
    if isinstance(layer, QuantisedLinear):
        have = f"{capability[0]}.{capability[1]}"
        if isinstance(layer, E4m3Linear) and capability < (8, 9):
            return (
                f"E4M3 needs compute capability 8.9, this GPU has {have}; "
                "an INT8 plan runs there (vivace calibrate --preset int8-full)"
            )
        if isinstance(layer, RowFp8Linear) and capability[0] != 9:
            return f"row-wise input scales run on Hopper, 9.0, this GPU has {have}"
        if layer.dtype != torch.bfloat16:
            return f"8-bit products return bfloat16, not {layer.dtype}"
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


def refuse_modulation(value: Tensor | None, name: str, x: Tensor) -> None:
    """Raise Unsupported if the prefill is handed what flow time modulates: rows beyond those of the denoise kernels."""
    if value is not None:
        raise Unsupported(
            "flow time modulates only what the denoise kernels take",
            got=f"modulation at {name} of {x[..., 0].numel()} rows",
            wanted=f"at most {MAX_ROWS} action rows (batch x horizon)",
            do="infer smaller batches, or choose --backend eager or compiled",
        )  # fmt: skip


def refuse_step(layer: AnyLinear, x: Tensor) -> None:
    """Raise Unsupported for a layer with the input scale of one denoise step: constants here have one scale per layer."""
    if isinstance(layer, QuantisedLinear) and layer.of_step is not None:
        raise Unsupported(
            "scales per denoise step are only for what the denoise kernels take",
            got=f"{x[..., 0].numel()} rows at {layer.name}", wanted=f"at most {MAX_ROWS} action rows (batch x horizon)",
            do="infer smaller batches, or choose --backend eager",
        )  # fmt: skip
