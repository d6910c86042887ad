"""What opening a checkpoint gives: a description of the network and the robot, and tensors that are read one at a time.

Nothing is read when a checkpoint is opened except headers and small JSON files. `TensorRef.read` fetches one tensor and
lets go of the file again, so that a program which reads all tensors one after another never holds more of the file in
memory than the largest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from ..types import RobotFacts

Origin = Literal["openpi_torch", "openpi_jax", "lerobot", "transformers"]

_FINITE_BLOCK = 1 << 24
_LISTED = 40


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a checkpoint, not read yet.

    key    how the file calls it
    shape  in vivace's layout: [out, in] for linear weights, whatever the file's own layout is
    dtype  as `read` returns it
    read   fetches it to a device; the caller owns the result, the file is closed again
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[torch.device], Tensor]


@dataclass(frozen=True)
class RtcFacts:
    """What a LeRobot folder says about real-time chunking.

    mode                "guided" pulls the velocity, "trained" clamps committed actions
    schedule            "LINEAR", "EXP", "ONES" or "ZEROS": prefix weights of the guided mode
    execution_horizon   control ticks, guided mode's end of the prefix weights
    training_max_delay  control ticks up to which the network was trained to see clean leading actions; 0 = it was not
    """

    enabled: bool
    mode: Literal["guided", "trained"]
    schedule: str
    max_guidance: float
    execution_horizon: int
    training_max_delay: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    path     the folder
    origin   whose software wrote it
    model    what the network is, inferred from the tensors' shapes
    robot    what the folder says about its robot
    tensors  {canonical name: TensorRef}, complete and checked against `model`; iterate in this order when reading all of
             them: neighbours share a stored array in JAX folders
    dead     tensors of the file that take no part in inference
    notes    guesses and oddities that a person should know
    rtc      real-time chunking, where the folder speaks of it
    num_denoise_steps  Euler steps that the folder asks for; None = it does not say
    guesses  settings that the folder does not determine and that were assumed, {name: what was assumed and how to change}
    """

    path: Path
    origin: Origin
    model: ModelConfig
    robot: RobotFacts
    tensors: Mapping[str, TensorRef]
    dead: tuple[str, ...]
    notes: tuple[str, ...]
    rtc: RtcFacts | None = None
    num_denoise_steps: int | None = None
    guesses: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> int:
        """Number of parameters that inference uses."""
        return sum(torch.Size(ref.shape).numel() for ref in self.tensors.values())


def check_finite(ref: TensorRef, tensor: Tensor) -> None:
    """Raise CheckpointError that names the tensor if a value is NaN or infinite. Works block by block: no big temporary."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _FINITE_BLOCK):
        block = flat[start : start + _FINITE_BLOCK]
        finite = torch.isfinite(block)
        if bool(finite.all()):
            continue
        first = start + int((~finite).to(torch.uint8).argmax())
        raise CheckpointError(
            f"tensor {ref.key!r} holds values that are not finite",
            got=f"{float(flat[first])} at flat index {first} of shape {list(ref.shape)}",
            wanted="finite numbers",
            do="the file is damaged or its training diverged; take another checkpoint",
        )


def listing(names: Iterable[str]) -> str:
    """Names for an error message, one a line; very long lists are cut with a count."""
    items = list(names)
    shown = "".join(f"\n  {name}" for name in items[:_LISTED])
    return shown + (f"\n  ... and {len(items) - _LISTED} more" if len(items) > _LISTED else "")
