"""One observation through the model in float32, and through each network by the evaluator: what tests compare."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from suite import case_of, inputs_of
from tiny import build, random_tensors, tiny_config
from torch import Tensor

from vivace.backends.eager import EagerBackend
from vivace.backends.tensorrt import evaluate, networks, skeleton
from vivace.backends.tensorrt.networks import Network, Shapes
from vivace.checkpoints import random_values
from vivace.config import EngineConfig, ModelConfig
from vivace.model import weights
from vivace.model.pi import Pi
from vivace.ops.reference import MASKED_LOGIT
from vivace.precision import calibrate, quantize
from vivace.precision.plan import PrecisionPlan, preset
from vivace.types import PrefixCache

STEPS = 3


def cosine(got: Tensor, wanted: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(got.double().flatten(), wanted.double().flatten(), dim=0))


def make_checkpoint_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Weights in the distribution of `vivace make-checkpoint`, without loud channels."""
    shapes = {name: tuple(value.shape) for name, value in quick_tensors(config).items()}
    return {name: random_values.random_tensor(name, shape, seed=0, outliers=0) for name, shape in shapes.items()}


@dataclass
class Subject:
    """A model, its network's outline, and one observation of two views and `tokens` prompt tokens, some of them masked.

    plan   name of a preset; ranges are measured on the observation itself
    quick  large random weights drawn in pieces
    draw   config -> tensors, in place of the usual random ones
    percentile  of |input| that sets ranges; None = the largest
    """

    module: object
    kind: str = "pi05"
    base: str = "fp32"
    plan: str = "bf16"
    fused: bool = False
    baked: bool = False
    changes: dict = field(default_factory=dict)
    tokens: int = 7
    hidden: int = 2
    quick: bool = False
    draw: Callable[[ModelConfig], dict[str, Tensor]] | None = None
    percentile: float | None = None

    def __post_init__(self) -> None:
        config = tiny_config(self.kind, **self.changes)
        draw = self.draw or (quick_tensors if self.quick else random_tensors)
        tensors = draw(config)
        self.model = build(config, tensors)
        self.config = config
        case = case_of(config, tokens=self.tokens, views=2)
        case.token_mask[:, self.tokens - self.hidden :] = False
        self.case, self.inputs, self.noise = case, inputs_of(case, masks=True), case.noise
        self.engine = EagerBackend(self.model, EngineConfig(num_denoise_steps=STEPS))
        self.chosen = self._plan()
        self.quantised = copy.deepcopy(self.model)
        quantize.apply(self.quantised, self.chosen)
        formats = skeleton.formats(self.quantised)
        self.outlined = skeleton.outline(config, base=self.base, formats=formats)
        self.numbers = skeleton.values(self.quantised, self.outlined)

    def _plan(self) -> PrecisionPlan:
        with calibrate.watch(self.model) as ranges:
            self.cache  # noqa: B018
            ranges.begin_denoise()
            self.engine.denoise(self.cache, self.noise)
        return calibrate.with_ranges(
            preset(self.plan), ranges, data="the observation itself", percentile=self.percentile
        )

    @cached_property
    def views(self) -> Tensor:
        return self.model.embed_views(self.inputs.images)

    @cached_property
    def embeds(self) -> tuple[Tensor, Tensor]:
        return self.model.embed_prefix(self.inputs, self.views)

    @cached_property
    def cache(self) -> PrefixCache:
        return self.model.prefill(*self.embeds, state=self.inputs.state)

    @property
    def keys(self) -> int:
        return self.embeds[0].shape[1]

    def wanted(self, part: str, *, simulated: bool = False) -> dict[str, Tensor]:
        """The model's own answer to the network's inputs, float32.

        simulated  by the model's own E4M3 operations, quantised as the plan says
        """
        model = self.quantised if simulated else self.model
        if part == "vision":
            return {"tokens": model.embed_views(self.inputs.images).unflatten(1, (2, -1))[0]}
        if part == "prefix":
            cache = model.prefill(*self.embeds, state=self.inputs.state)
            pairs = enumerate(zip(cache.k, cache.v, strict=True))
            return {name: value for i, (k, v) in pairs for name, value in ((f"k.{i}", k), (f"v.{i}", v))}
        if part == "loop":
            engine = EagerBackend(model, EngineConfig(num_denoise_steps=STEPS))
            return {"actions": engine.denoise(self.cache, self.noise)}
        context = model.suffix_context(self.cache, self.config.horizon)
        return {"velocity": model.denoise_step(self.noise, self.model.time_table(STEPS).at(0), self.cache, context)}

    def feeds(self, part: str) -> dict[str, Tensor]:
        """The inputs of a network, in its own types."""
        dtype, model = self.outlined.prefix_dtype, self.model
        if part == "vision":
            return {"images": self.inputs.images[0]}
        if part == "prefix":
            embeds, mask = self.embeds
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)
            found = {"embeds": embeds.to(dtype), "mask": additive(mask)}
            found |= rope(model.rope_tables(self.keys).prefix, positions, dtype)
            if self.kind == "pi0":
                rows = rope(model.rope_tables(self.keys + 1).suffix, mask.sum(1)[:, None], dtype)
                found |= {"state": self.inputs.state, "state_cos": rows["cos"], "state_sin": rows["sin"]}
            return found
        cache, table = self.cache, model.time_table(STEPS)
        positions = cache.length[:, None] + torch.arange(self.config.horizon)
        found = {"x": self.noise, "mask": additive(cache.mask)}
        found |= rope(model.rope_tables(self.keys + self.config.horizon + 1).suffix, positions, dtype)
        for index, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
            found |= {f"k.{index}": k.to(dtype), f"v.{index}": v.to(dtype)}
        timed = table if part == "loop" else table.at(0)
        one = timed.modulation if self.kind == "pi05" else timed.bias
        return found | {"modulation" if self.kind == "pi05" else "bias": one}

    def write(self, part: str) -> Network:
        shapes = Shapes(batch=2 if part == "vision" else 1, keys=self.keys, steps=STEPS)
        return networks.write(
            part, self.outlined, self.module, shapes, numbers=self.numbers, baked=self.baked, fused=self.fused
        )

    def evaluate(self, network: Network) -> dict[str, Tensor]:
        return evaluate.run(network, self.feeds(network.part), numbers=self.numbers)

    def visible(self, name: str, value: Tensor) -> Tensor:
        """Rows of masked tokens are never read and may hold anything."""
        return value[:, self.cache.mask[0]] if name[:2] in ("k.", "v.") else value

    def worst(self, network: Network, *, wanted: dict[str, Tensor] | None = None) -> float:
        """Smallest cosine over the outputs of a network; wanted: default the model in float32, without a plan."""
        return self.alike(self.evaluate(network), wanted or self.wanted(network.part))

    def alike(self, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
        """Smallest cosine over all outputs."""
        assert set(got) == set(wanted)
        return min(cosine(self.visible(name, got[name]), self.visible(name, wanted[name])) for name in wanted)


def quick_tensors(config) -> dict[str, Tensor]:
    """As `tiny.random_tensors`, from one drawn block: a full-width layer has 110 million values."""
    block = torch.randn(1_048_573, generator=torch.Generator().manual_seed(0))  # a prime: no two rows alike
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Pi(config).named_parameters()}
    out = {}
    for index, (name, slot) in enumerate(weights.slots(config).items()):
        shape = (slot.count, *shapes[slot.parameter][1:])
        count = math.prod(shape)
        value = block.roll(index).repeat(-(-count // len(block)))[:count].view(shape)
        value *= 0.1 if len(shape) == 1 else (0.5 if name == "embedding.weight" else 0.8 / shape[-1] ** 0.5)
        if name.startswith("vision") and ".norm" in name and name.endswith("weight"):
            value += 1.0
        out[name] = value
    return out


def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, MASKED_LOGIT)


def rope(table, positions: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: rows[positions].to(dtype) for name, rows in zip(("cos", "sin"), table, strict=True)}
