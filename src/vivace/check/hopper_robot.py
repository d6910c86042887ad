"""The made-up robot that the full-size benchmark serves: real requests, of exactly the size that a setting names.

Cameras send 224 x 224 pixels, as openpi's clients do after their own resizing; the state has 7 numbers and, but in prompts
too short for it (16 tokens and less), is written into the prompt as pi0.5 does. The task text is cut and filled until the
prompt has exactly the setting's number of tokens under a toy vocabulary. Scenes are those of `check.observations`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.toy_tokenizer import train_toy_tokenizer
from ..config import ModelConfig
from ..errors import ConfigError
from ..robots.io import resolve
from ..robots.normalize import normalize_state
from ..robots.pipeline import RobotPipeline
from ..robots.prompt import encode, segments
from ..robots.tokenizer import Tokenizer, load_tokenizer
from ..types import Camera, Embodiment, NormStats, RobotFacts, StatePart
from .observations import PROMPTS, scene
from .targets import Size

STATE_DIM, ACTION_DIM = 7, 7
STATE_IN_PROMPT_FROM = 48  # tokens: the shortest prompt that holds seven numbers of three digits and a task
FILLERS = (" and then the", " then", " a", "q", "z", "0")
LONGEST_PROMPT = 1024


def facts() -> RobotFacts:
    """What a checkpoint folder of this robot would say."""
    state, action = _quantiles(STATE_DIM, 2.0), _quantiles(ACTION_DIM, 1.5)
    return RobotFacts(
        source="openpi", stats={"": (state, action)}, state_mode="quantiles", action_mode="quantiles", eps=1e-6,
        prompt="openpi_pi05", max_prompt_tokens=LONGEST_PROMPT,
    )  # fmt: skip


def toy_tokenizer(vocab_size: int) -> Tokenizer:
    """A vocabulary of a thousand pieces that reads any text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(train_toy_tokenizer(vocab_size))
        return load_tokenizer(path)


def pipeline(size: Size, config: ModelConfig, tokenizer: Tokenizer) -> RobotPipeline:
    """The host side of a policy for this setting."""
    robot = Embodiment(
        name="made up", cameras=tuple(Camera(f"view_{i}", f"observation/image_{i}") for i in range(size.views)),
        state=(StatePart("observation/state", STATE_DIM),), action_dim=ACTION_DIM,
        delta_mask=(True,) * (ACTION_DIM - 1) + (False,),
        state_in_prompt=size.prompt_tokens >= STATE_IN_PROMPT_FROM, control_hz=20.0,
    )  # fmt: skip
    io = resolve(
        facts(), config.kind, embodiment=robot, image_size=config.vision.image_size, action_width=config.action_width,
        vocab_size=config.vocab_size,
    )  # fmt: skip
    return RobotPipeline(replace(io, max_prompt_tokens=LONGEST_PROMPT), tokenizer)


@dataclass(frozen=True)
class Scenes:
    """Camera pictures, made once and used by every setting: uint8 [count, 3 views, 224, 224, 3]."""

    pixels: NDArray[np.uint8]

    @classmethod
    def make(cls, count: int, *, views: int, image_size: int, seed: int) -> Scenes:
        """`count` observations of `views` pictures."""
        generator = np.random.default_rng(seed)
        flat = [scene(generator, image_size, image_size) for _ in range(count * views)]
        return cls(np.stack(flat).reshape(count, views, image_size, image_size, 3))


def request(pipe: RobotPipeline, size: Size, scenes: Scenes, index: int, *, seed: int = 0) -> dict[str, Any]:
    """Observation `index` of this setting, as a client sends it; without prompt tokens there is no text at all."""
    generator = np.random.default_rng([seed, index])
    state = generator.uniform(-1.8, 1.8, STATE_DIM).astype(np.float32)
    made: dict[str, Any] = {f"observation/image_{v}": scenes.pixels[index, v] for v in range(size.views)}
    made["observation/state"] = state
    if size.prompt_tokens:
        made["prompt"] = fitted(pipe, state, tokens=size.prompt_tokens, start=PROMPTS[index % len(PROMPTS)])
    return made


def fitted(pipe: RobotPipeline, state: NDArray[np.float32], *, tokens: int, start: str) -> str:
    """A task text whose prompt has exactly `tokens` tokens. Raises ConfigError if there is none."""

    def length(task: str) -> int:
        return prompt_tokens(pipe, state, task)

    task = start
    while task and length(task) > tokens:
        task = task[:-1]
    for _ in range(4 * tokens):
        now = length(task)
        if now == tokens:
            return task
        task = next((task + more for more in FILLERS if now < length(task + more) <= tokens), "")
        if not task:
            break
    raise ConfigError("no prompt of this length", got=f"{length(start)} tokens for {start!r}", wanted=f"{tokens}")


def prompt_tokens(pipe: RobotPipeline, state: NDArray[np.float32], task: str) -> int:
    """How many tokens the prompt of this task and state has."""
    normalized = normalize_state(state.astype(np.float64), pipe.io.normalization)
    parts = segments(pipe.io.prompt, task, normalized, state_in_prompt=pipe.io.embodiment.state_in_prompt)
    assert pipe.tokenizer is not None
    return len(encode(parts, pipe.tokenizer, max_tokens=1 << 20))


def _quantiles(size: int, reach: float) -> NormStats:
    return NormStats(q01=np.full(size, -reach), q99=np.full(size, reach))
