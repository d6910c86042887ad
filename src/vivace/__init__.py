"""vivace runs pi0 / pi0.5 robot policies in real time and proves that they are still the same policy.

>>> import vivace
>>> policy = vivace.load_policy("path/to/checkpoint")
>>> chunk = policy.infer({"observation/image": ..., "observation/state": ..., "prompt": "fold the towel"})
>>> chunk.actions  # float [H, A], robot units
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import EngineConfig, ModelConfig, ResolvedEngine
from .errors import (
    CheckpointError,
    ConfigError,
    DeadlineMissed,
    NumericsError,
    ObservationError,
    ProtocolError,
    ServerError,
    ShapeError,
    Unsupported,
    VivaceError,
)
from .types import ActionChunk, Embodiment, Observation

if TYPE_CHECKING:
    from .runtime.policy import Policy, load_policy

__version__ = "0.1.0"

__all__ = [
    "ActionChunk",
    "CheckpointError",
    "ConfigError",
    "DeadlineMissed",
    "Embodiment",
    "EngineConfig",
    "ModelConfig",
    "NumericsError",
    "Observation",
    "ObservationError",
    "Policy",
    "ProtocolError",
    "ResolvedEngine",
    "ServerError",
    "ShapeError",
    "Unsupported",
    "VivaceError",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    """Import the policy on first use: `import vivace` alone stays light and never touches CUDA."""
    if name in ("load_policy", "Policy"):
        from .runtime import policy

        return getattr(policy, name)
    raise AttributeError(f"module 'vivace' has no attribute {name!r}")
