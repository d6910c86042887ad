"""From a part and its shapes to something that runs: write, audit, find or build the engine, bind the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import TensorRTBase, TensorRTConfig
from ...errors import Unsupported
from ...model.pi import Pi
from ...precision.coverage import Coverage
from ...precision.plan import PrecisionPlan, preset
from . import audit, cache, networks, skeleton
from .build import Progress, build
from .engine import Engine, NoMemory
from .identity import identify
from .module import Module
from .networks import Network, Part, Shapes
from .targets import Target, here

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How the networks of one model are written and built; everything "auto" is resolved.

    numbers  {parameter: the model's numbers in the outline's types}
    plan     what the audit holds the networks against; not read from the model, which might have been quantised otherwise
    """

    module: Module
    outlined: Pi
    numbers: Mapping[str, Tensor]
    plan: PrecisionPlan
    baked: bool
    fused: bool

    def write(self, part: Part, shapes: Shapes) -> Network:
        """One network."""
        return networks.write(
            part, self.outlined, self.module, shapes, numbers=self.numbers, baked=self.baked, fused=self.fused
        )


@dataclass(frozen=True)
class Made:
    """An engine and its papers.  seconds: of the build; 0 = it was found on disk."""

    network: Network
    engine: bytes
    path: Path
    seconds: float
    products: tuple[audit.Product, ...]
    refused: tuple[str, ...] = ()


def recipe(
    model: Pi, module: Module, options: TensorRTConfig, *, base: TensorRTBase, plan: PrecisionPlan | None = None
) -> Recipe:
    """The recipe for a loaded (and perhaps quantised) model.  plan: None = no layer shall be quantised."""
    formats = skeleton.formats(model)
    outlined = skeleton.outline(model.config, base=base, formats=formats, precision=skeleton.precision_of(model))
    numbers = skeleton.values(model, outlined)
    return Recipe(module, outlined, numbers, plan or preset("bf16"), is_baked(options, module), options.fused)


def prompt_bucket(baked: bool) -> int:
    """Prompts are padded to steps of so many tokens. Each is a prefix and a step engine: seconds, or gigabytes if baked."""
    return 128 if baked else 64


def is_baked(options: TensorRTConfig, module: Module) -> bool:
    """What `weights = "auto"` means: full TensorRT stores them, RTX takes them when it runs."""
    return not module.is_rtx if options.weights == "auto" else options.weights == "baked"


def make(
    recipe: Recipe, part: Part, shapes: Shapes, *, targets: Sequence[Target], where: Path,
    facts: Mapping[str, Any] | None = None, progress: Progress | None = None, device: torch.device | None = None,
    anew: bool = False,
) -> Made:  # fmt: skip
    """Write and audit a network; take its engine from `where`, or build and store it there.

    targets  [] = the GPU of this machine (device: which)
    anew     build even if `where` has it
    Raises   NumericsError if the audit fails, Unsupported if it cannot be built
    """
    network = recipe.write(part, shapes)
    found_products = audit.check(network, recipe.plan.format_of)
    who = identify(network, recipe.numbers, targets or [here(device)])
    machine = cache.machine(recipe.module, device)
    found = cache.Found(None, None, ()) if anew else cache.find(where, who, machine=machine)
    for reason in found.refused:
        logger.warning("not used: %s", reason)
    if found.engine is not None and found.path is not None:
        return Made(network, found.engine, found.path, 0.0, found_products, found.refused)
    logger.info("building %s: seconds, or minutes with baked weights or as one loop", network.label)
    built = build(network, targets, progress=progress, device=device)
    more = {"part": part, "label": network.label, "seconds": round(built.seconds, 3), **(facts or {})}
    path = cache.store(where, who, built.engine, facts=more, machine=machine)
    logger.info("built %s in %.1f s, %.1f MB", network.label, built.seconds, len(built.engine) / 1e6)
    return Made(network, built.engine, path, built.seconds, found_products, found.refused)


@dataclass
class EngineRunner:
    """`stages.Runner` on a GPU: engines are made when a shape is first seen, and stay.

    seen  the coverage table of everything that was made
    """

    recipe: Recipe
    device: torch.device
    seen: Coverage
    engines: dict[tuple[Part, Shapes], Engine] = field(default_factory=dict)

    def __call__(self, part: Part, shapes: Shapes, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See stages.Runner."""
        if (part, shapes) in self.engines:
            return self.engines[part, shapes](feeds)
        module = self.recipe.module
        compiled = cache.runtime_cache(module.name, module.version, str(here(self.device))) if module.is_rtx else None
        engine = self.engines[part, shapes] = self._make(part, shapes, compiled)
        outputs = engine(feeds)
        if compiled is not None:
            engine.save(compiled)  # after a run: by then everything is compiled
        return outputs

    def _make(self, part: Part, shapes: Shapes, compiled: Path | None) -> Engine:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise Unsupported("an engine cannot be made while a graph is recorded", got=f"{part} {shapes}")
        made = make(self.recipe, part, shapes, targets=[], device=self.device, where=cache.folder())
        try:
            engine = self._open(made, compiled)
        except Unsupported as error:
            if made.seconds > 0.0 or isinstance(error, NoMemory):
                raise  # fresh: another build would be refused too; no memory: another would need as much
            logger.warning("%s is deleted and built again: %s", made.path.name, error)
            made.path.unlink(missing_ok=True)
            made = make(self.recipe, part, shapes, targets=[], device=self.device, where=cache.folder(), anew=True)
            engine = self._open(made, compiled)
        audit.record(self.seen, made.products, part=part, kernel=self.recipe.module.name)
        return engine

    def _open(self, made: Made, compiled: Path | None) -> Engine:
        numbers = self.recipe.numbers
        return Engine(self.recipe.module, made.engine, weights=numbers, device=self.device, compiled=compiled)
