"""The options that several verbs share: how to find everything a policy needs beside its checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..runtime.policy import Policy


@dataclass(frozen=True)
class CheckpointArgs:
    """What the checkpoint folder does not say itself."""

    embodiment: str | None = None
    """A known robot (libero, droid, aloha, ...) or a TOML file; default: what the checkpoint says."""
    tokenizer: str | None = None
    """A SentencePiece .model, a tokenizer.json or a folder; default: the checkpoint's own."""
    asset_id: str | None = None
    """openpi: which normalisation statistics to use."""
    horizon: int | None = None
    """Actions per chunk, where the checkpoint does not say."""
    vision_heads: int | None = None
    """Attention heads of the vision tower, where it is not the published one."""
    max_prompt_tokens: int | None = None
    """Longest prompt, where training used another limit than the family's 48 (pi0) or 200 (pi0.5)."""
    default_prompt: str | None = None
    """Instruction for requests that carry none."""
    lerobot_version: Literal["auto", "0.4", "0.5", "0.6"] = "auto"
    """Which LeRobot wrote the folder; 0.4 differs in prompt and letterbox."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto = cuda if there is one."""


@dataclass(frozen=True)
class PolicyArgs(CheckpointArgs):
    """The same, and how to run it."""

    steps: int | None = None
    """Denoise steps; None = what the checkpoint says, else 10."""
    seed: int | None = 0
    """Noise is a function of seed and request; None draws fresh noise for every request."""
    tensorrt: str = ""
    """Options of the backend tensorrt, such as weights=baked,base=fp16 (as in vivace build --help)."""


def load(path: Path, args: PolicyArgs, *, backend: str, precision: str) -> Policy:
    """Load one policy with these options. Raises CheckpointError, ConfigError, Unsupported."""
    from ..runtime.policy import load_policy

    config = _config(args, backend=backend, precision=precision)
    return load_policy(
        path,
        embodiment=args.embodiment,
        tokenizer=args.tokenizer,
        config=config,
        asset_id=args.asset_id,
        horizon=args.horizon,
        vision_heads=args.vision_heads,
        max_prompt_tokens=args.max_prompt_tokens,
        default_prompt=args.default_prompt,
        lerobot_version=args.lerobot_version,
    )


def refuse_early(path: Path, args: PolicyArgs, *, backend: str, precision: str) -> None:
    """Raise what loading this policy would raise before it reads weights: a reference of gigabytes comes first.

    Unsupported for a backend that cannot run on this machine; CheckpointError and ConfigError for a folder, an option or
    a precision that cannot be used.
    """
    from ..checkpoints.open import open_checkpoint
    from ..runtime import choice
    from ..runtime import precision as precisions

    config = _config(args, backend=backend, precision=precision)
    choice.refuse_early(config, choice.device(config))
    opened = open_checkpoint(
        path, horizon=args.horizon, vision_heads=args.vision_heads, lerobot_version=args.lerobot_version
    )
    precisions.resolve(precision, opened)


def require(option: str, value: float | None, *, least: float | None = None, above: float | None = None) -> None:
    """Raise ConfigError if the number of an option is not finite, below `least` or not above `above`; None passes."""
    if value is None:
        return
    good = math.isfinite(value) and (least is None or value >= least) and (above is None or value > above)
    if not good:
        wanted = f"at least {least:g}" if least is not None else f"more than {above:g}"
        raise ConfigError(f"{option} cannot be used", got=value, wanted=wanted)


def _config(args: PolicyArgs, *, backend: str, precision: str) -> EngineConfig:
    from ..config import EngineConfig, tensorrt_options

    if args.seed is not None:
        require("--seed", args.seed, least=0)
    return EngineConfig(
        backend=backend,
        device=args.device,
        precision=precision,
        num_denoise_steps=args.steps,
        seed=args.seed,
        tensorrt=tensorrt_options(args.tensorrt),
    )
