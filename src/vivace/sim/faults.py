"""Policies broken on purpose, each in the way in which an engine breaks: what a campaign must be able to notice.

blanked        the images are black
mask           the action expert cannot see the image tokens      expert: the third view is masked, the belt seems to rest
normalisation  statistics of another robot                        expert: the hand seems to be 3 cm beside
prompt         the instruction names another cube
index          actions are taken one execution horizon too late in the chunk

A masked policy runs the eager backend, which takes every mask, whatever engine its arm has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..backends.eager import EagerBackend
from ..backends.spans import Spans
from ..config import EngineConfig
from ..errors import ConfigError
from ..runtime.policy import Policy as ServedPolicy
from ..types import ModelInputs, NormStats, Observation, PrefixCache, Trace
from .actors import Actor, ExpertActor, ServedActor, changed
from .conveyor import ConveyorEnv
from .expert import ExpertChunk
from .rollout import Chunk, Committed, Policy
from .scene import BELT_Y_M, COLOURS, REST_Z_M

Break = Callable[[Actor, ConveyorEnv], Actor]
INDEX_ERROR = 8
HAND_ERROR_M = np.array([0.0, 0.03, 0.0])
"""Larger than the grasp's tolerance of 25 mm."""


def broken(name: str, whole: Actor, env: ConveyorEnv) -> Actor:
    """The actor with one fault. Raises ConfigError for an unknown fault."""
    if name not in FAULTS:
        raise ConfigError(f"unknown fault {name!r}", wanted=f"one of {sorted(FAULTS)}")
    return FAULTS[name](whole, env)


def blanked(policy: Policy) -> Policy:
    """The same policy with black images. A campaign in which it succeeds does not test seeing."""
    return lambda observation: policy(_black(observation))


@dataclass(frozen=True)
class Altered:
    """Changes what an actor is shown, or what it answers."""

    whole: Actor
    shown: Callable[[Observation], Observation] = lambda observation: observation
    answered: Callable[[Chunk], Chunk] = lambda chunk: chunk

    def policy(self, observation: Observation) -> Chunk:
        """See Actor."""
        return self.answered(self.whole.policy(self.shown(observation)))

    def continuing(self, observation: Observation, committed: Committed) -> Chunk:
        """See Actor."""
        return self.answered(self.whole.continuing(self.shown(observation), committed))


def _black(observation: Observation) -> Observation:
    return replace(observation, views={name: np.zeros_like(view) for name, view in observation.views.items()})


def _blanked(whole: Actor, env: ConveyorEnv) -> Actor:
    if isinstance(whole, ExpertActor):
        guess = np.array([0.0, BELT_Y_M, REST_Z_M])
        return ExpertActor(lambda: replace(env.sight(), target_m=guess, belt_m_s=0.0), whole.horizon)
    return Altered(whole, shown=_black)


def _mask(whole: Actor, env: ConveyorEnv) -> Actor:
    if isinstance(whole, ExpertActor):
        return ExpertActor(lambda: replace(env.sight(), belt_m_s=0.0), whole.horizon)
    return replace(_served(whole), served=masked(_served(whole).served))


def _normalisation(whole: Actor, env: ConveyorEnv) -> Actor:
    if isinstance(whole, ExpertActor):
        return ExpertActor(lambda: replace(env.sight(), hand_m=env.sight().hand_m + HAND_ERROR_M), whole.horizon)
    return replace(_served(whole), served=mistaken(_served(whole).served))


def _prompt(whole: Actor, env: ConveyorEnv) -> Actor:
    def other() -> str:
        return next((cube for cube in env.world.drawn.cubes if cube != env.world.target), env.world.target)

    if isinstance(whole, ExpertActor):
        return ExpertActor(lambda: replace(env.sight(), target_m=env.world.cube_m(other())), whole.horizon)

    def renamed(observation: Observation) -> Observation:
        words = [other() if word in COLOURS else word for word in observation.prompt.split()]
        return replace(observation, prompt=" ".join(words))

    return Altered(whole, shown=renamed)


def _index(whole: Actor, env: ConveyorEnv) -> Actor:
    return Altered(whole, answered=lambda chunk: ExpertChunk(np.roll(chunk.actions, -INDEX_ERROR, axis=0)))


FAULTS: dict[str, Break] = {
    "blanked": _blanked,
    "mask": _mask,
    "normalisation": _normalisation,
    "prompt": _prompt,
    "index": _index,
}


def _served(whole: Actor) -> ServedActor:
    if not isinstance(whole, ServedActor):
        raise ConfigError("this fault needs a served policy or the expert", got=type(whole).__name__)
    return whole


# --- inside a served policy -----------------------------------------------------------------------------------------


class MaskedBackend(EagerBackend):
    """The eager backend, but its cache hides every image token from the action expert."""

    def prefill(self, inputs: ModelInputs, *, trace: Trace | None = None, spans: Spans | None = None) -> PrefixCache:
        """See Backend.prefill."""
        cache = super().prefill(inputs, trace=trace, spans=spans)
        B, S = cache.k[0].shape[:2]
        mask = (
            torch.ones(B, S, dtype=torch.bool, device=cache.k[0].device) if cache.mask is None else cache.mask.clone()
        )
        mask[:, : inputs.images.shape[1] * self.model.config.vision.tokens] = False
        return replace(cache, mask=mask)


def masked(served: ServedPolicy) -> ServedPolicy:
    """The same network, run eagerly (every mask is allowed there) with the image tokens masked."""
    config = EngineConfig(device=served.engine.device, num_denoise_steps=served.engine.num_denoise_steps)
    return changed(served, backend=MaskedBackend(served.model, config))


def mistaken(served: ServedPolicy) -> ServedPolicy:
    """Statistics of a robot with twice the range and another middle, for state and actions."""
    n = served.io.normalization
    wrong = replace(n, state=_other_robot(n.state), action=_other_robot(n.action))
    return changed(served, io=replace(served.io, normalization=wrong))


def _other_robot(stats: NormStats) -> NormStats:
    def moved(values: Any, sign: float) -> Any:
        return None if values is None else 2.0 * np.asarray(values) + 0.3 * sign * np.abs(values).max()

    return NormStats(
        mean=moved(stats.mean, 1.0), std=moved(stats.std, 1.0), min=moved(stats.min, 0.5), max=moved(stats.max, 1.0),
        q01=moved(stats.q01, 0.5), q99=moved(stats.q99, 1.0), q10=moved(stats.q10, 0.5), q90=moved(stats.q90, 1.0),
    )  # fmt: skip
