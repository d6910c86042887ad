"""Ask a loaded policy what its operations really run: one inference, watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..precision.coverage import Coverage, RecordedOps, Row, rows
from ..precision.fit import all_layers

if TYPE_CHECKING:
    from .policy import Policy


def record(policy: Policy, run: Callable[[], Any] | None = None) -> tuple[Row, ...]:
    """Run the policy once and say what ran.

    run  the inference to watch; None = the policy's own warm-up

    A backend that captures graphs keeps the record itself (the replay asks nobody). Programs of torch.compile are watched
    as the Python that they were compiled from: which operation, in which format; the kernels that the compiler made of it
    have no names here, and the kernel says "compiled".
    """
    model, steps = policy.model, policy.engine.num_denoise_steps
    work = run if run is not None else policy.warmup
    if isinstance(model.ops, RecordedOps):
        work()
        seen = model.ops.coverage
    else:
        seen, before = Coverage(kernel=policy.engine.backend), model.ops
        model.ops = seen.wrap(before)
        try:
            with torch.compiler.set_stance("force_eager"):
                work()
        finally:
            model.ops = before
    return rows(seen, steps=steps, plan=policy.plan, layers=all_layers(model))
