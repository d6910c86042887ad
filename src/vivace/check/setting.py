"""The setting of a result: without views, prompt tokens, chunk and steps a latency or an error is not a result."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..types import PreparedObservation

if TYPE_CHECKING:
    from ..runtime.policy import Policy


def setting_of(policy: Policy, prepared: PreparedObservation) -> dict[str, Any]:
    """What was run: sizes of the network, and of one observation after preparation."""
    config = policy.model.config
    return {
        "kind": config.kind,
        "views": len(prepared.images),
        "prompt_tokens": len(prepared.tokens),
        "horizon": policy.engine.horizon,
        "steps": policy.engine.num_denoise_steps,
        "batch": 1,
        "device": policy.engine.device,
        "robot": policy.io.embodiment.name,
        "model": {
            "kind": config.kind,
            "horizon": config.horizon,
            "action_width": config.action_width,
            "vision": asdict(config.vision),
            "prefix": asdict(config.prefix),
            "expert": asdict(config.expert),
        },
    }
