"""Where torch's allocator puts tensors on a GPU, for those that stay: in segments of their own, so that others can go back.

The allocator takes memory in segments and gives back whole ones only. A weight that is quantised leaves a hole of twice its
new size, and the next result would be cut out of that hole or of a working copy, and hold the rest of it for good: a
gigabyte of a full-size pi0.5 in E4M3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SHARED_BYTES = 10 << 20
"""The allocator gives smaller tensors a place in a common segment (kMinLargeAlloc of its source)."""


@contextmanager
def lasting(device: torch.device) -> Iterator[Lasting]:
    """Yields a place for tensors that stay on `device`; afterwards everything that is free goes back to the GPU."""
    yield Lasting(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Lasting:
    """Segments that hold nothing but what is put there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: torch.cuda.MemPool | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):  # a pool belongs to the device that is current
                self._pool = torch.cuda.MemPool()

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """A copy of `value` there; on a CPU `value` itself."""
        if self._pool is None or value.device.type != "cuda":
            return value
        with torch.cuda.use_mem_pool(self._pool, device=value.device):
            return value.clone()

    def keep_small(self, model: nn.Module) -> None:
        """Copy the model's parameters and buffers that share segments with what was let go.

        The model gets new tensors; the old ones are left as they are, for a second network over the same tensors may have
        been recorded into graphs, which know addresses alone.
        """
        if self._pool is None:
            return
        moved: dict[int, Any] = {}

        def place(one: Any) -> Any:
            if one is None or one.untyped_storage().nbytes() >= SHARED_BYTES:
                return one
            if id(one) not in moved:
                kept = self.keep(one.detach())
                moved[id(one)] = nn.Parameter(kept, one.requires_grad) if isinstance(one, nn.Parameter) else kept
            return moved[id(one)]

        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, one in table.items():
                    table[name] = place(one)
