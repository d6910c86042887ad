"""The denoise loop of backends that run one step at a time; what executes the step is theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..model import flow
from ..model.pi import Pi, RopeTables, StepCondition, SuffixContext, TimeTable
from ..types import PrefixCache, PreviousChunk, Trace

Step = Callable[[Tensor, StepCondition, PrefixCache, SuffixContext], Tensor]


@torch.no_grad()
def run_flow(
    model: Pi,
    step: Step | None,
    table: TimeTable,
    cache: PrefixCache,
    noise: Tensor,
    *,
    previous: PreviousChunk | None,
    trace: Trace | None,
    committed: Tensor | None = None,
    tables: RopeTables | None = None,
    await_keys: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate from noise [B, H, 32] with `step` (same contract as `Pi.denoise_step`); see Backend.denoise.

    step       None: the model's own operations, and where nothing but noise comes in (pi0.5, no older chunk) the boundary
               of two steps is one of them
    await_keys for the first step, see `SuffixContext`
    committed  as in `flow.sample`; None = derive it from `previous`
    tables     from `Pi.rope_tables`, where angles shall not be computed again
    """
    context = model.suffix_context(cache, noise.shape[1], tables=tables)
    if committed is None:
        committed = flow.committed_mask(previous, noise.shape[1], noise.device)
    if step is None and previous is None and committed is None and model.config.kind == "pi05":
        return model.denoise_chunk(noise, table, cache, replace(context, await_keys=await_keys), trace=trace)
    one = step if step is not None else model.denoise_step

    def velocity_at(x: Tensor, index: int) -> Tensor:
        here = replace(context, await_keys=await_keys) if index == 0 else context
        return one(x, table.at(index, committed), cache, here)

    return flow.sample(velocity_at, noise, list(table.times), previous=previous, committed=committed, trace=trace)
