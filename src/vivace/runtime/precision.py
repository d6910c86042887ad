"""What `EngineConfig.precision` means for one checkpoint: a dtype, or a precision plan applied to the bfloat16 model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.source import Checkpoint
from ..errors import ConfigError
from ..model.pi import Pi
from ..precision import fit, plan, quantize
from ..precision.flavours import Dtype
from ..precision.plan import PrecisionPlan


@dataclass(frozen=True)
class Precision:
    """dtype: of the model as loaded.  plan: what is then quantised; None = nothing."""

    dtype: Dtype
    plan: PrecisionPlan | None = None

    @property
    def label(self) -> str:
        """What a ResolvedEngine calls it."""
        return self.dtype if self.plan is None else self.plan.label


def resolve(wanted: str, checkpoint: Checkpoint) -> Precision:
    """auto, float32, bfloat16, bfloat16+vision or the path of a plan.

    Raises ConfigError; for a preset's name it says how to make a plan of it.
    """
    if wanted == "auto":
        return Precision(checkpoint.model.declared_dtype)
    if wanted == "float32":
        return Precision("float32")
    if wanted == "bfloat16":
        return Precision("bfloat16")
    if wanted == "bfloat16+vision":
        return Precision("bfloat16+vision")
    if wanted in plan.PRESETS:
        if not plan.PRESETS[wanted]:
            raise ConfigError("a plan without 8-bit layers is a dtype", got=repr(wanted), wanted="bfloat16")
        raise ConfigError(
            f"the preset {wanted!r} has no activation ranges", got="a preset", wanted="a calibrated plan file",
            do=fit.CALIBRATE.format(wanted),
        )  # fmt: skip
    path = Path(wanted)
    if path.suffix == ".json" or path.is_file():
        read = plan.read(path)
        return Precision(read.base, read)
    raise ConfigError(
        "unknown precision",
        got=repr(wanted),
        wanted="auto, float32, bfloat16, bfloat16+vision, or the file of a precision plan",
    )


def quantise(model: Pi, precision: Precision, *, checkpoint_hash: str) -> dict[str, Any] | None:
    """Apply the plan in place; returns its facts for the ResolvedEngine. Raises ConfigError if it does not fit."""
    if precision.plan is None:
        return None
    chosen = precision.plan
    fit.check_fit(chosen, fit.all_layers(model), checkpoint_hash=checkpoint_hash)
    layers = quantize.apply(model, chosen)
    return {
        "name": chosen.name,
        "hash": chosen.digest,
        "checkpoint_hash": chosen.checkpoint_hash,
        "data": chosen.data,
        "data_hash": chosen.data_hash,
        "method": chosen.method,
        "layers": len(layers),
    }
