"""The policy fixtures of the golden folder, by name, and how one of their checkpoints is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vivace.checkpoints.open import open_checkpoint
from vivace.checkpoints.source import Checkpoint

POLICIES = (
    "lerobot04_pi05_fp32",
    "lerobot_pi05_bf16",
    "lerobot_pi05_fp32",
    "lerobot_pi05_rtc_guided",
    "lerobot_pi05_rtc_trained",
    "lerobot_pi0_fp32",
    "lerobot_pi0_relative_fp32",
    "openpi_jax_pi05",
    "openpi_jax_pi0_lora",
    "openpi_pytorch_pi05_bf16",
    "openpi_pytorch_pi05_fp32",
    "openpi_pytorch_pi0_fp32",
)


def open_case(folder: Path, **options: Any) -> tuple[dict[str, Any], Checkpoint]:
    """case.json of a fixture and its checkpoint, told only what the folder cannot say: the heads of its vision tower."""
    case = json.loads((folder / "case.json").read_text())
    heads = case["not_inferable"]["vision_heads"]
    return case, open_checkpoint(folder / "checkpoint", vision_heads=heads, **options)
