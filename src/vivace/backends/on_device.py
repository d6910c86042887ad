"""Which GPU work goes to: streams, events, graphs and kernels belong to the thread's current device, tensors to theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")


class _Placed(Protocol):
    @property
    def device(self) -> torch.device: ...


class _Runs(Protocol):
    @property
    def model(self) -> _Placed: ...


Runs = TypeVar("Runs", bound=_Runs)


def on(device: torch.device | None) -> AbstractContextManager[Any]:
    """Make `device` the current GPU inside the block; None or no GPU: nothing to do."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()


def on_own_device(
    method: Callable[Concatenate[Runs, Given], Made],
) -> Callable[Concatenate[Runs, Given], Made]:
    """`method` of something that runs a `model`: without gradients, on the model's device."""

    @functools.wraps(method)
    def there(self: Runs, /, *args: Given.args, **named: Given.kwargs) -> Made:
        with torch.no_grad(), on(self.model.device):
            return method(self, *args, **named)

    return there
