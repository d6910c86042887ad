"""What the network is (`ModelConfig`) and how to run it (`EngineConfig`); both frozen.

`resolve` turns the wishes of an EngineConfig into a `ResolvedEngine`: no "auto" is left in it, and it is logged, sent to
clients and stored in every result. Only `precision`, `num_denoise_steps` and `seed` change the actions.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import ConfigError
from .types import PolicyKind

TimeGrid = Literal["accumulated", "direct"]
TensorRTModule = Literal["auto", "tensorrt", "tensorrt_rtx"]
TensorRTBase = Literal["fp16", "bf16", "fp32"]


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower. Defaults: So400m/14 at 224 px."""

    width: int = 1152
    layers: int = 27
    mlp_width: int = 4304
    num_heads: int = 16
    patch_size: int = 14
    image_size: int = 224

    @property
    def tokens(self) -> int:
        """Tokens per view."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma stack. Defaults: Gemma-2B, the prefix; the action expert is `EXPERT_300M`."""

    width: int = 2048
    layers: int = 18
    mlp_width: int = 16384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256


EXPERT_300M = GemmaConfig(width=1024, mlp_width=4096)


@dataclass(frozen=True)
class ModelConfig:
    """A pi0 or pi0.5 network. pi0.5 differs by adaptive norms in the expert, and by having no state token.

    time_grid        "accumulated": float32 t += dt (openpi); "direct": 1 + s*dt in float64, rounded (LeRobot)
    time_embedding   dtype in which sin and cos of the flow time are computed
    declared_dtype   what the checkpoint says it is served in: "float32" or "bfloat16"
    flavour          whose precision map and rounding order `bfloat16` means
    """

    kind: PolicyKind = "pi05"
    vision: VisionConfig = VisionConfig()
    prefix: GemmaConfig = GemmaConfig()
    expert: GemmaConfig = EXPERT_300M
    vocab_size: int = 257152
    action_width: int = 32
    horizon: int = 50
    min_period: float = 4e-3
    max_period: float = 4.0
    time_grid: TimeGrid = "accumulated"
    time_embedding: Literal["float32", "float64"] = "float64"
    declared_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    flavour: Literal["openpi_torch", "openpi_jax", "lerobot"] = "openpi_torch"


@dataclass(frozen=True)
class TensorRTConfig:
    """How the TensorRT backend builds its engines; other backends do not look at it."""

    module: TensorRTModule = "auto"
    """auto = full TensorRT if it is installed, else TensorRT-RTX."""
    base: Literal["auto", "fp16", "bf16"] = "auto"
    """Type of everything that a bfloat16 model computes in bfloat16; auto = bf16, or fp16 where the GPU has no bf16."""
    weights: Literal["auto", "baked", "inputs"] = "auto"
    """In the engine, or bound when it runs (engines of a few MB); auto = inputs with TensorRT-RTX, else baked."""
    fused: bool = False
    """Attention and rotary embedding as TensorRT's own layers, where the module has them."""
    loop: bool = False
    """All denoise steps as one engine; otherwise one engine for a step, run once per step."""


def tensorrt_options(text: str) -> TensorRTConfig:
    """The options in a text such as "weights=baked,fused=true"; "" = all at their defaults. Raises ConfigError."""
    known = {
        "module": get_args(TensorRTModule), "base": ("auto", "fp16", "bf16"), "weights": ("auto", "baked", "inputs"),
        "fused": ("true", "false"), "loop": ("true", "false"),
    }  # fmt: skip
    chosen: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        if value not in known.get(name, ()):
            wanted = f"one of {', '.join(known[name])}" if name in known else f"{', '.join(known)}"
            raise ConfigError("unknown TensorRT option", got=repr(part), wanted=wanted)
        chosen[name] = value == "true" if name in ("fused", "loop") else value
    return TensorRTConfig(**chosen)


@dataclass(frozen=True)
class EngineConfig:
    """How to run a policy."""

    backend: str = "auto"
    """auto = eager on a CPU, the fastest backend that can run on a GPU. Names: see `vivace doctor`."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""
    precision: str = "auto"
    """float32, bfloat16, auto = what the checkpoint declares, or the file of a precision plan (`vivace calibrate`).

    bfloat16 keeps in float32 what the checkpoint's own software keeps there; of a LeRobot checkpoint that is the vision
    tower, which the GPU kernels do not take: "bfloat16+vision" rounds it too.
    """
    num_denoise_steps: int | None = None
    """Euler steps of the flow; None = what the checkpoint says, else 10 (openpi's and LeRobot's default)."""
    seed: int | None = 0
    """Noise is a function of seed and request, whatever came before; None draws fresh noise for every request."""
    prompt_bucket: int = 16
    """Static-shape backends pad prompts to steps of this size; masked keys get zero probability."""
    tensorrt: TensorRTConfig = TensorRTConfig()
    """Options of the backend "tensorrt"."""

    def __post_init__(self) -> None:
        """Refuse numbers that no engine can run with."""
        for name in ("num_denoise_steps", "prompt_bucket"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1", got=value)

    @property
    def steps(self) -> int:
        """Euler steps, resolved."""
        return 10 if self.num_denoise_steps is None else self.num_denoise_steps


@dataclass(frozen=True)
class ResolvedEngine:
    """What really runs; stored in every result.

    precision        float32, bfloat16, or a plan's name, hash and data source
    checkpoint_hash  of the weights, see `checkpoints.fingerprint`
    plan             facts of the precision plan; None = no plan
    coverage         what the operations really ran, in sum and part by part (`precision.coverage`); None = not recorded yet
    """

    backend: str
    device: str
    precision: str
    num_denoise_steps: int
    seed: int | None
    checkpoint: str
    policy_kind: str
    horizon: int
    action_dim: int
    flavour: str
    version: str
    details: dict[str, Any] = field(default_factory=dict)
    checkpoint_hash: str = ""
    plan: dict[str, Any] | None = None
    coverage: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)


def cache_dir() -> Path:
    """Folder for compiled artefacts. `VIVACE_CACHE` is the only environment variable that vivace reads."""
    return Path(os.environ.get("VIVACE_CACHE", Path.home() / ".cache" / "vivace"))


def use_compile_cache() -> None:
    """Point torch.compile's on-disk cache into `cache_dir()`, unless the user already chose a place."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))


def draw_with_one_thread() -> None:
    """One thread for software OpenGL in this process, unless the user already chose a number; before the first context.

    Mesa's llvmpipe starts a thread per core in every process, and they wait for each other: two simulators on two cores
    took 1.15 times the time.
    """
    os.environ.setdefault("LP_NUM_THREADS", "1")
