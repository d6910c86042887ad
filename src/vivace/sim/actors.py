"""Who acts in an episode: the scripted expert, or a served policy with one noise stream for each episode.

The noise of look k of episode `seed` is a function of (seed, k) alone, so that arms which differ in engine or precision are
paired in their noise too; drawn from the request, as a server does, one differing pixel would change all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import EngineConfig
from ..errors import ConfigError
from ..runtime.policy import Policy as ServedPolicy
from ..runtime.policy import load_policy
from ..types import ActionChunk, Observation, PreviousChunk
from .arms import EXPERT, Arm
from .conveyor import ACTION_DIM, ConveyorEnv
from .expert import ExpertChunk, ExpertPolicy, chunk, predict
from .rollout import Chunk, Committed
from .world import Sight

EXPERT_HORIZON = 48
"""Enough for a delay of 24 ticks: a chunk has to last for delay + max(delay, execution horizon) ticks."""


class Actor(Protocol):
    """Answers the looks of one episode."""

    def policy(self, observation: Observation) -> Chunk:
        """A chunk for what is seen."""

    def continuing(self, observation: Observation, committed: Committed) -> Chunk:
        """A chunk that begins with what the robot will do anyway."""


@dataclass(frozen=True)
class Options:
    """How to load policies, see `runtime.policy.load_policy`, and how to draw.

    seed  of the engine; episodes have their own noise        gl  which OpenGL, see `render.choose`
    """

    embodiment: str = "conveyor"
    tokenizer: str | None = None
    asset_id: str | None = None
    horizon: int | None = None
    vision_heads: int | None = None
    max_prompt_tokens: int | None = None
    default_prompt: str | None = None
    lerobot_version: Any = "auto"
    device: str = "auto"
    seed: int | None = 0
    gl: Literal["auto", "egl", "osmesa"] = "auto"


@lru_cache(maxsize=1)
def load(
    path: str, engine: str, precision: str, steps: int | None, options: Options, *, action_dim: int = ACTION_DIM
) -> ServedPolicy:
    """The policy of an arm, kept until another is asked for: blocks of one arm follow each other in a process.

    Raises: what load_policy raises; ConfigError for a policy of another robot.
    """
    config = EngineConfig(
        backend=engine, precision=precision, num_denoise_steps=steps, device=options.device, seed=options.seed
    )
    policy = load_policy(
        path,
        embodiment=options.embodiment,
        tokenizer=options.tokenizer,
        config=config,
        asset_id=options.asset_id,
        horizon=options.horizon,
        vision_heads=options.vision_heads,
        max_prompt_tokens=options.max_prompt_tokens,
        default_prompt=options.default_prompt,
        lerobot_version=options.lerobot_version,
    )
    if policy.engine.action_dim != action_dim:
        conveyor = action_dim == ACTION_DIM
        raise ConfigError(
            f"{path} does not drive {'the conveyor' if conveyor else 'this robot'}",
            got=f"{policy.engine.action_dim} action dims",
            wanted=action_dim,
            do="train one with vivace train, or pass --embodiment conveyor" if conveyor else None,
        )
    policy.warmup()
    return policy


def actor(arm: Arm, env: ConveyorEnv, *, seed: int, options: Options) -> Actor:
    """Who acts in one episode of an arm, unbroken (see faults)."""
    if arm.policy == EXPERT:
        return ExpertActor(env.sight)
    return ServedActor(load(arm.policy, arm.engine, arm.precision, arm.steps, options), seed)


@dataclass
class ExpertActor:
    """The scripted expert; sees the true state instead of the observation."""

    see: Callable[[], Sight]
    horizon: int = EXPERT_HORIZON

    def policy(self, observation: Observation) -> Chunk:
        """As if nothing were committed."""
        return ExpertPolicy(self.see, self.horizon)(observation)

    def continuing(self, observation: Observation, committed: Committed) -> Chunk:
        """The committed actions, then a plan from where they will have led."""
        sight = self.see()
        for action in committed.actions:
            sight = predict(sight, action)
        planned = chunk(sight, self.horizon - committed.ticks)
        return ExpertChunk(np.concatenate([np.asarray(committed.actions, np.float32), planned]))


@dataclass
class ServedActor:
    """A served policy; counts its looks."""

    served: ServedPolicy
    seed: int
    looks: int = field(default=0, init=False)

    def policy(self, observation: Observation) -> ActionChunk:
        """One inference."""
        return self.served.infer(observation, noise=self._noise())

    def continuing(self, observation: Observation, committed: Committed) -> ActionChunk:
        """One inference that is told the committed actions (trained real-time chunking)."""
        return self.served.infer(observation, noise=self._noise(), previous=previous(committed))

    def _noise(self) -> NDArray[np.float32]:
        rng = np.random.default_rng([self.seed, 30, self.looks])
        self.looks += 1
        shape = (self.served.engine.horizon, self.served.io.action_width)
        return rng.standard_normal(shape, dtype=np.float32)


def previous(committed: Committed) -> PreviousChunk:
    """The rest of the chunk in execution, in model space, from the observation's tick on."""
    old = committed.chunk
    if not isinstance(old, ActionChunk):
        raise ConfigError("committed actions of another policy", got=type(old).__name__, wanted="ActionChunk")
    left = old.actions_normalized[committed.start :]
    moved = np.zeros_like(old.actions_normalized)
    moved[: len(left)] = left
    return PreviousChunk(actions=torch.from_numpy(moved)[None], inference_delay=committed.ticks, mode="trained")


def changed(served: ServedPolicy, **parts: Any) -> ServedPolicy:
    """A policy with some parts replaced (backend, io, pipeline); the weights are shared."""
    kept = {
        name: getattr(served, name) for name in ("checkpoint", "io", "pipeline", "backend", "model", "engine", "plan")
    }
    if "io" in parts:
        kept["pipeline"] = replace(served.pipeline, io=parts["io"])
    return ServedPolicy(**{**kept, **parts})
