"""Does an engine stay as fast, give the same bits and take no more memory over ten thousand calls?

Calls go through `Backend.infer`, one in ten through `Policy.infer` as a robot's do. Every hundred calls everything that a
graph hands over (pictures seen, actions) is filled with NaN before the call, and the answer is compared with the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..types import ModelInputs
from . import bench, targets
from .hopper_engines import Engine
from .targets import Size

PARTS = 10
"""A soak is compared in tenths."""
CHECK_EVERY = 100
POLICY_EVERY = 10


@dataclass(frozen=True)
class Work:
    """What is called.  poison: spoils all that the next call must write again;  answer: None = no policy's share."""

    infer: Callable[[], Tensor]
    poison: Callable[[], None]
    answer: Callable[[], NDArray[np.float32]] | None = None

    def with_policy(self, answer: Callable[[], NDArray[np.float32]]) -> Work:
        """The same with a policy's share."""
        return replace(self, answer=answer)


def work_of(engine: Engine, inputs: ModelInputs, noise: Tensor) -> Work:
    """Calls of this engine's `infer`, and what spoils the results of all graphs that it has by then."""

    def poison() -> None:
        for result in engine.backend.graph_results():
            result.fill_(float("nan"))

    return Work(lambda: engine.backend.infer(inputs, noise), poison)


@dataclass
class Checks:
    """Answers of one kind against the first of them."""

    first: Tensor
    same: int = 0
    of: int = 0

    def see(self, answer: Tensor) -> None:
        """Compare one answer."""
        self.of += 1
        self.same += int(torch.equal(answer, self.first))


def soak_row(size: Size, engine: Engine, work: Work, *, calls: int) -> dict[str, Any]:
    """Call without a pause; memory is compared between the end of the warm-up and the end."""
    cuda = engine.model.device.type == "cuda"
    ask = [work.infer] if work.answer is None else [work.infer, _as_tensor(work.answer)]
    checks = [_warmed(one) for one in ask]
    times: list[list[float]] = [[] for _ in ask]
    timers = [bench.CudaTimer(spin_ms=bench.SPIN_MS), bench.CudaTimer()] if cuda else []
    held = _memory(cuda)
    for turn in range(calls):
        which = int(len(ask) > 1 and turn % POLICY_EVERY == POLICY_EVERY - 1)
        look = turn % CHECK_EVERY == 0 or (which == 1 and turn % CHECK_EVERY == CHECK_EVERY - 1)
        if look:
            work.poison()
        answer, host_ms, device_ms = bench.timed_call(ask[which], timers[which] if cuda else None)
        times[which].append(device_ms if device_ms is not None and which == 0 else host_ms)
        if look:
            checks[which].see(answer)
    grown = [after - before for after, before in zip(_memory(cuda), held, strict=True)]
    return _row(size, engine, times, checks, grown, timers)


def _row(
    size: Size, engine: Engine, times: list[list[float]], checks: list[Checks], grown: list[int], timers: list[Any]
) -> dict[str, Any]:
    found = bench.summary(times[0])
    same, of = sum(one.same for one in checks), sum(one.of for one in checks)
    tenths = np.array_split(times[0], min(PARTS, len(times[0])))
    return {
        "setting": size.name, "engine": engine.name, "precision": engine.precision,
        "what": "Backend.infer, device time" if timers else "Backend.infer, host time", "calls": sum(map(len, times)),
        "latency": found, "p50_of_tenths_ms": [float(np.median(part)) for part in tenths],
        "policy_calls": len(times[1]) if len(times) > 1 else 0,
        "policy_latency": bench.summary(times[1]) if len(times) > 1 and times[1] else None,
        "launches": {"exposed": timers[0].exposed, "of": timers[0].calls} if timers else None,
        "allocated_growth_bytes": grown[0], "reserved_growth_bytes": grown[1],
        "checks": {"same": same, "of": of, "output_poisoned": engine.graphed},
        "targets": targets.of_soak(
            tail=found.p99_ms / found.p50_ms, allocated_growth=grown[0], reserved_growth=grown[1], same=same, checks=of
        ),
    }  # fmt: skip


def _warmed(ask: Callable[[], Tensor]) -> Checks:
    for _ in range(20):
        answer = ask()
    return Checks(answer.clone())


def _as_tensor(answer: Callable[[], NDArray[np.float32]]) -> Callable[[], Tensor]:
    return lambda: torch.from_numpy(np.ascontiguousarray(answer()))


def _memory(cuda: bool) -> list[int]:
    """Bytes allocated and reserved."""
    if not cuda:
        return [0, 0]
    torch.cuda.synchronize()
    return [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()]
