"""Ask a loaded policy what its operations really run: one inference, watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..precision.coverage import Coverage, RecordedOps, Row, rows
from ..precision.fit import all_layers

if TYPE_CHECKING:
    from .policy import Policy


def record(policy: Policy, run: Callable[[], Any]) -> tuple[Row, ...]:
    """Watch `run`, one inference of the policy, and say what ran.

    A backend that captures graphs keeps the record itself, from its captures on (a replay asks nobody); then nothing is run
    again. Programs of torch.compile are watched as the Python that they were compiled from: which operation, in which
    format; the kernels that the compiler made of it have no names here, and the kernel says "compiled".
    """
    model, steps = policy.model, policy.engine.num_denoise_steps
    if isinstance(model.ops, RecordedOps):
        seen = model.ops.coverage
        if not seen.seen:
            run()
    else:
        seen, before = Coverage(kernel=policy.engine.backend), model.ops
        model.ops = seen.wrap(before)
        try:
            with torch.compiler.set_stance("force_eager"):
                run()
        finally:
            model.ops = before
    return rows(seen, steps=steps, plan=policy.plan, layers=all_layers(model))
