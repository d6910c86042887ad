"""A precision plan: which linear runs in which format, and the activation scales that were measured for it.

"MLPs of the prefix in FP8" and "everything in FP8" are two values of this record, not two engines. Rules are tried in
order; the first whose pattern fits a layer's name decides, and a layer that no rule names stays as it was loaded.

Layer names (`ops.layers.Linear.name`):  {prefix,expert}.layers.{i}.{attn.qkv, attn.o, mlp.gate_up, mlp.down}
                                         vision.layers.{i}.{attn.qkv, attn.o, mlp.fc1, mlp.fc2},  projector
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from ..errors import ConfigError

Format = Literal["keep", "e4m3", "int8"]
Base = Literal["bfloat16", "bfloat16+vision"]
WeightScale = Literal["tensor", "channel"]
InputScale = Literal["tensor", "row", "step"]
PER_STEP = "expert.layers."
"""How names of layers begin that run once per denoise step."""


@dataclass(frozen=True)
class Rule:
    """One row of a plan.

    pattern       shell pattern on the layer name; * also crosses dots
    format        "e4m3" or "int8": weights and inputs in E4M3 or INT8; "keep": as loaded
    weight_scale  one scale per output channel, or one per tensor
    input_scale   "tensor": one static scale. "row": one per token, found while running (E4M3 alone; no range is needed).
                  "step": one static scale per denoise step (layers of the expert alone)
    """

    pattern: str
    format: Format = "e4m3"
    weight_scale: WeightScale = "channel"
    input_scale: InputScale = "tensor"


@dataclass(frozen=True)
class PrecisionPlan:
    """Rules, measured activation ranges, and what they were measured on.

    amax             {layer name: largest |input| of that layer}; every layer with static scales needs one
    step_amax        {layer name: the same of each denoise step}; every layer with scales per step needs them
    base             what the model is loaded in before layers are quantised, see `flavours`
    checkpoint_hash  of the weights that the ranges belong to; "" in a preset
    data             where the observations came from; "" in a preset, "synthetic: ..." when no robot ever saw them
    data_hash        of those observations
    method           how ranges were taken: "amax" or "percentile 99.99"
    """

    name: str
    rules: tuple[Rule, ...] = ()
    amax: Mapping[str, float] = field(default_factory=dict)
    checkpoint_hash: str = ""
    data: str = ""
    data_hash: str = ""
    method: str = ""
    base: Base = "bfloat16"
    step_amax: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def rule(self, layer: str) -> Rule | None:
        """The rule that decides about `layer`, or None."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(layer, rule.pattern)), None)

    def format_of(self, layer: str) -> Format:
        """The format in which `layer` runs; "keep" where no rule names it."""
        rule = self.rule(layer)
        return "keep" if rule is None else rule.format

    def input_scale_of(self, layer: str) -> InputScale:
        """How many input scales `layer` has; "tensor" where no rule names it."""
        rule = self.rule(layer)
        return "tensor" if rule is None else rule.input_scale

    def scale_problem(self, layer: str) -> str | None:
        """Why `layer` cannot have the input scales that its rule asks for, or None."""
        rule = self.rule(layer)
        if rule is None or rule.format == "keep" or rule.input_scale == "tensor":
            return None
        if rule.input_scale == "row":
            return f"{layer} in INT8 with row-wise scales" if rule.format != "e4m3" else None
        return None if layer.startswith(PER_STEP) else f"{layer} with scales per denoise step"

    def quantises(self, layer: str) -> bool:
        """Whether `layer` runs in another format than the one that it was loaded in."""
        return self.format_of(layer) != "keep"

    def without_range(self, layers: Iterable[str]) -> list[str]:
        """Those of `layers` that it quantises, and lacks a range for that their kind of input scale needs."""
        ranges = {"row": None, "step": self.step_amax, "tensor": self.amax}
        needed = [(name, ranges[self.input_scale_of(name)]) for name in layers if self.quantises(name)]
        return [name for name, known in needed if known is not None and not (name in known and name in self.amax)]

    def formats(self, layers: Iterable[str]) -> dict[str, Format]:
        """{layer: format} of those `layers` that it quantises."""
        return {name: self.format_of(name) for name in layers if self.quantises(name)}

    def to_json(self) -> str:
        """The plan as a JSON document. What a plan need not have is left out where it is not used, so digests stay."""
        document = asdict(self)
        if not self.step_amax:
            del document["step_amax"]
        for rule in document["rules"]:
            if rule["input_scale"] == "tensor":
                del rule["input_scale"]
        return json.dumps({"version": 1, **document}, indent=1, sort_keys=True)

    def with_input_scale(self, kind: InputScale) -> PrecisionPlan:
        """The same rules with these input scales where they can have them: "row" E4M3 alone, "step" the expert's alone.

        Raises ConfigError if no rule can have them.
        """

        def can(rule: Rule) -> bool:
            if kind == "row":
                return rule.format == "e4m3"
            return rule.format != "keep" and (kind == "tensor" or rule.pattern.startswith(PER_STEP))

        if not any(can(rule) for rule in self.rules):
            raise ConfigError(
                f"no rule of {self.name!r} can have {kind!r} input scales", got=[rule.pattern for rule in self.rules],
                wanted="row: E4M3 layers; step: patterns that begin with expert.layers.", do="choose another --preset",
            )  # fmt: skip
        rules = tuple(replace(rule, input_scale=kind) if can(rule) else rule for rule in self.rules)
        name = self.name.removesuffix("+row").removesuffix("+step")
        return replace(self, name=name if kind == "tensor" else f"{name}+{kind}", rules=rules)

    @property
    def digest(self) -> str:
        """12 hex digits over the whole plan, ranges included."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """One line for people and results: name, hash, data source."""
        return f"{self.name} (plan {self.digest}, data {self.data or 'none'})"


_PREFIX_MLP = (Rule("prefix.layers.*.mlp.*"),)
_PREFIX = (Rule("prefix.layers.*"),)
_VISION = (Rule("vision.layers.*"),)
_EXPERT = (Rule("expert.layers.*"),)
PRESETS: dict[str, tuple[Rule, ...]] = {
    "bf16": (),
    "fp8-mlp": _PREFIX_MLP,
    "fp8-full": _PREFIX,
    "fp8-prefix+vision": _PREFIX + _VISION,
    "fp8-expert": _EXPERT,
    "fp8-all": _PREFIX + _VISION + _EXPERT,
    "int8-mlp": (Rule("prefix.layers.*.mlp.*", "int8"),),
    "int8-full": (Rule("prefix.layers.*", "int8"),),
}


def preset(name: str) -> PrecisionPlan:
    """A plan without ranges; `precision.calibrate` adds them. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError("unknown precision plan", got=repr(name), wanted=f"one of {sorted(PRESETS)} or a plan file")
    return PrecisionPlan(name=name, rules=PRESETS[name])


def rules_problem(
    rules: tuple[Rule, ...], amax: Mapping[str, float], step_amax: Mapping[str, tuple[float, ...]] | None = None
) -> str | None:
    """What no plan may contain, or None: an unknown format or kind of scale, or a range that is not a positive number."""
    for rule in rules:
        if not _text(rule.pattern):
            return f"the pattern {rule.pattern!r}, wanted text"
        for value, known in (
            (rule.format, get_args(Format)),
            (rule.weight_scale, get_args(WeightScale)),
            (rule.input_scale, get_args(InputScale)),
        ):
            if value not in known:
                return f"{value!r} in the rule for {rule.pattern!r}, wanted one of {list(known)}"
        if rule.input_scale == "row" and rule.format == "int8":
            return f"row-wise scales in INT8 in the rule for {rule.pattern!r}, wanted E4M3"
    wrong = [f"{name}: {value!r}" for name, value in amax.items() if not _positive(value)]
    steps = (step_amax or {}).items()
    wrong += [f"{name}: {value!r}" for name, value in steps if not (value and all(_positive(one) for one in value))]
    wrong += [
        f"{name}: {max(value)!r} in one step" for name, value in steps if value and max(value) > amax.get(name, 0.0)
    ]
    return f"ranges that are not positive numbers, or beyond the layer's: {', '.join(wrong[:4])}" if wrong else None


def _text(value: object) -> bool:
    return isinstance(value, str)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0.0


def read(path: Path) -> PrecisionPlan:
    """A plan from its JSON file. Raises ConfigError naming the file and what is wrong with it."""
    try:
        document = json.loads(path.read_text())
        if document.pop("version") != 1:
            raise ConfigError("unknown version of a precision plan", got=path, do="calibrate again with this vivace")
        rules = tuple(Rule(**rule) for rule in document.pop("rules"))
        step_amax = {name: tuple(values) for name, values in document.pop("step_amax", {}).items()}
        plan = PrecisionPlan(rules=rules, step_amax=step_amax, **document)
        if plan.base not in get_args(Base):
            raise ConfigError(f"the precision plan {path} is damaged", got=f"base {plan.base!r}", do="calibrate again")
        if problem := rules_problem(plan.rules, plan.amax, plan.step_amax):
            raise ConfigError(f"the precision plan {path} is damaged", got=problem, do="calibrate again")
        return plan
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            "not a precision plan", got=f"{path}: {error}", do="write one with `vivace calibrate`"
        ) from error
