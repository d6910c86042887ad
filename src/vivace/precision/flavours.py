"""Which parameter is stored and computed in which dtype, when somebody says "bfloat16".

float32   everything float32.
openpi    Gemma, expert and SigLIP in bfloat16; float32 stay: patch convolution and position table, all Gemma norms and
          pi0.5's modulation linears, and the action, state and time projections (pi05.md section 1.12).
lerobot   as openpi, but the whole vision tower and the projector stay float32; "bfloat16+vision" takes them along, which
          GPU kernels need, and which is openpi's map.
"""

from __future__ import annotations

import re
from typing import Literal

import torch

Dtype = Literal["float32", "bfloat16", "bfloat16+vision"]
Flavour = Literal["openpi_torch", "openpi_jax", "lerobot"]

_ALWAYS_FLOAT32 = re.compile(
    r"vision\.(patch|position)\b"
    r"|(prefix|expert)\.layers\.\d+\.norm[12]\b"
    r"|expert\.norm\b"
    r"|(action_in|action_out|time_in|time_out|state|action_time_in|action_time_out)\."
)
_LEROBOT_FLOAT32 = re.compile(r"(vision|projector)\.")


def parameter_dtype(name: str, *, precision: Dtype, flavour: Flavour) -> torch.dtype:
    """Dtype of the parameter with this canonical name."""
    if precision == "float32" or _ALWAYS_FLOAT32.match(name):
        return torch.float32
    if flavour == "lerobot" and precision != "bfloat16+vision" and _LEROBOT_FLOAT32.match(name):
        return torch.float32
    return torch.bfloat16
