"""Does a plan belong to this network, these weights, this vivace? Asked before a single layer is quantised.

A plan is a file that outlives what it was made for. Everything that would make it silently mean something else is an error
here: other weights, a layer without a range, a pattern that names nothing, a layer that only floating point can run.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from torch import nn

from ..errors import ConfigError
from ..ops.layers import Linear, QuantisedLinear
from .plan import PRESETS, PrecisionPlan

# Everything else (patches, time, actions, state, modulation) is small and feeds sums that rounding would spoil.
QUANTISABLE = re.compile(r"(prefix|expert|vision)\.layers\.\d+\.(attn|mlp)\.|projector$")
CALIBRATE = "run `vivace calibrate CHECKPOINT --data RECORDED --preset {} -o plan.json`, then `--precision plan.json`"


def all_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of every linear, quantised already or not."""
    return tuple(layer.name for layer in model.modules() if isinstance(layer, Linear | QuantisedLinear))


def check_fit(plan: PrecisionPlan, names: Iterable[str], *, checkpoint_hash: str) -> None:
    """Raise ConfigError unless `plan` can be applied to a model with linears `names` and these weights."""
    names = tuple(names)
    again = CALIBRATE.format(plan.name if plan.name in PRESETS else "fp8-mlp")
    if plan.checkpoint_hash != checkpoint_hash:
        raise ConfigError(
            f"the precision plan {plan.name!r} belongs to another checkpoint",
            got=f"a plan for weights {plan.checkpoint_hash or 'unknown'}", wanted=checkpoint_hash, do=again,
        )  # fmt: skip
    nothing = [rule.pattern for rule in plan.rules if not fnmatch.filter(names, rule.pattern)]
    if nothing:
        raise ConfigError(
            f"the precision plan {plan.name!r} has patterns that match no layer", got=", ".join(nothing[:4]),
            wanted=f"names such as {', '.join(_examples(names))}", do="correct the pattern, or remove its rule",
        )  # fmt: skip
    chosen = [name for name in names if plan.quantises(name)]
    if wrong := [name for name in chosen if not QUANTISABLE.match(name)]:
        raise ConfigError(
            f"the precision plan {plan.name!r} quantises layers that run in floating point only",
            got=", ".join(wrong[:4]), wanted="prefix, expert and vision layers, projector", do="narrow its patterns",
        )  # fmt: skip
    if wrong := [problem for name in chosen if (problem := plan.scale_problem(name))]:
        raise ConfigError(
            f"the precision plan {plan.name!r} asks for input scales that layers cannot have", got=", ".join(wrong[:4]),
            wanted="row-wise in E4M3, per step in expert.layers", do="correct its rules",
        )  # fmt: skip
    if missing := plan.without_range(chosen):
        raise ConfigError(
            f"the precision plan {plan.name!r} has no activation range for {len(missing)} layers",
            got=f"{', '.join(missing[:4])} without a range", do=again,
            wanted="one per quantised layer, and one per denoise step where a rule says so",
        )  # fmt: skip
    if unknown := sorted((set(plan.amax) | set(plan.step_amax)) - set(names)):
        raise ConfigError(
            f"the precision plan {plan.name!r} has ranges of layers that this network lacks",
            got=", ".join(unknown[:4]), wanted="a plan of this network", do=again,
        )  # fmt: skip


def _examples(names: tuple[str, ...]) -> list[str]:
    found = {name.split(".")[0]: name for name in reversed(names) if QUANTISABLE.match(name)}
    return sorted(found.values())
