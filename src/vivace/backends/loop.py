"""The denoise loop of backends that run one step at a time; what executes the step is theirs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import flow
from ..model.pi import Pi, RopeTables, StepCondition, SuffixContext, TimeTable
from ..types import PrefixCache, PreviousChunk, Trace

Step = Callable[[Tensor, StepCondition, PrefixCache, SuffixContext], Tensor]


@torch.no_grad()
def run_flow(
    model: Pi,
    step: Step,
    table: TimeTable,
    cache: PrefixCache,
    noise: Tensor,
    *,
    previous: PreviousChunk | None,
    trace: Trace | None,
    committed: Tensor | None = None,
    tables: RopeTables | None = None,
) -> Tensor:
    """Integrate from noise [B, H, 32] with `step` (same contract as `Pi.denoise_step`); see Backend.denoise.

    committed  as in `flow.sample`; None = derive it from `previous`
    tables     from `Pi.rope_tables`, where angles shall not be computed again
    """
    context = model.suffix_context(cache, noise.shape[1], tables=tables)
    if committed is None:
        committed = flow.committed_mask(previous, noise.shape[1], noise.device)

    def velocity_at(x: Tensor, index: int) -> Tensor:
        return step(x, table.at(index, committed), cache, context)

    return flow.sample(velocity_at, noise, list(table.times), previous=previous, committed=committed, trace=trace)
