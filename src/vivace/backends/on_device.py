"""Which GPU work goes to: streams, events, graphs and kernels belong to the thread's current device, tensors to theirs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on(device: torch.device | None) -> AbstractContextManager[Any]:
    """Make `device` the current GPU inside the block; None or no GPU: nothing to do."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()
