"""The only timer in the project. It answers one question: how long does a robot wait for its actions, and on which engine?

Engines are timed in rounds. Every round calls each engine once, in an order drawn anew from a seeded generator, so that a
clock that drifts, a neighbour that wakes up or a chip that warms costs all of them the same. The output of every engine is
checked before anything is timed: a fast wrong engine never gets a row. The first call of each engine (compilation, caches)
is reported apart, and warm-up runs until the times stop falling, within bounds.

Garbage collection is run once before the samples and is off while they are taken; results say so.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, NumericsError

Clock = Callable[[], float]
STAGES = ("vision", "prefix", "denoise")
ADDS_UP_WITHIN = 0.02  # the parts must add up to the total to 2 % (mission row 5)


class DeviceTimer(Protocol):
    """Times one call on an accelerator, beside the host clock."""

    def start(self) -> None:
        """Wait for the device to be idle and mark the beginning."""
        ...

    def stop(self) -> float:
        """Mark the end, wait for it, and return milliseconds on the device."""
        ...


class Progress(Protocol):
    """Told after every call of an engine."""

    def __call__(self, name: str, *, sampling: bool) -> None:
        """`sampling` is False during warm-up."""
        ...


@dataclass(frozen=True)
class WarmUp:
    """When an engine counts as warm: the medians of two successive windows of calls differ by less than `tolerance`."""

    window: int = 5
    tolerance: float = 0.05
    max_calls: int = 60
    max_seconds: float = 120.0


SHORT_WARM_UP = WarmUp(max_calls=40, max_seconds=20.0)
"""For engines that were captured and checked before."""


@dataclass(frozen=True)
class EngineTimes:
    """Samples of one engine, milliseconds.

    cold_ms   the first call ever       total_ms   host wall time, device finished
    device_ms [] without a GPU          stages_ms  {stage: one value per sample}, as the engine itself reports them
    """

    name: str
    cold_ms: float
    warmup_calls: int
    stable: bool
    total_ms: list[float] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    stages_ms: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Percentiles of one series of milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    min_ms: float
    mean_ms: float
    samples: int


@dataclass(frozen=True)
class Speedup:
    """Ratio of medians, baseline over engine, with a 95 % bootstrap interval over rounds. Above 1 = engine is faster."""

    engine: str
    baseline: str
    ratio: float
    low: float
    high: float


def measure(
    fns: Mapping[str, Callable[[], Any]],
    *,
    samples: int = 200,
    seed: int = 0,
    warmup: WarmUp | None = None,
    refcheck: Callable[[str, Any], str | None] | None = None,
    stages: Callable[[Any], Mapping[str, float]] | None = None,
    device: DeviceTimer | Mapping[str, DeviceTimer] | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
    fewer: Mapping[str, int] | None = None,
) -> dict[str, EngineTimes]:
    """Time several engines on the same work, interleaved.

    Args:
        fns: {engine name: one inference}; every call must do the whole work, and return its output.
        samples: rounds, one sample of each engine per round.
        seed: fixes the order of the engines in every round.
        warmup: when an engine counts as warm; None = the defaults.
        refcheck: (name, output) -> what is wrong with it, or None. Called on the first output, before any timing counts.
        stages: output -> {stage: milliseconds}.
        device: a timer on the accelerator, or one per engine; None = host clock only.
        clock: seconds; replaced in tests.
        progress: called after each call with the engine and whether it was a sample (False: warm-up).
        fewer: {engine: samples} of engines too slow for every round; their calls are spread evenly over the rounds.

    Raises:
        ConfigError: no engine, or fewer than one sample.
        NumericsError: refcheck refused an output; nothing was timed.
    """
    if not fns or samples < 1:
        raise ConfigError(
            "nothing to measure", got=f"{len(fns)} engines, {samples} samples", wanted="at least one of each"
        )
    tell = progress or _silent
    timers = device if isinstance(device, Mapping) else dict.fromkeys(fns, device)
    times = {name: _warm(name, fn, warmup or WarmUp(), refcheck, timers[name], clock, tell) for name, fn in fns.items()}
    order = random.Random(seed)
    names = list(fns)
    wanted = {name: min(samples, (fewer or {}).get(name, samples)) for name in names}
    with _no_gc():
        for turn in range(samples):
            order.shuffle(names)
            for name in names:
                if (turn + 1) * wanted[name] // samples == turn * wanted[name] // samples:
                    continue
                _sample(times[name], fns[name], stages, timers[name], clock)
                tell(name, sampling=True)
    return times


def summary(values_ms: Sequence[float]) -> Summary:
    """Percentiles with linear interpolation; `values_ms` must not be empty."""
    values = np.asarray(values_ms, dtype=np.float64)
    p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
    return Summary(p50, p95, p99, float(values.max()), float(values.min()), float(values.mean()), int(values.size))


def speedup(engine: EngineTimes, baseline: EngineTimes, *, draws: int = 2000, seed: int = 0) -> Speedup:
    """Ratio of medians. Rounds are resampled together, because both engines saw the same machine in one round.

    Raises ConfigError when the two series were not taken in the same rounds.
    """
    a, b = np.asarray(baseline.total_ms), np.asarray(engine.total_ms)
    if a.size != b.size:
        raise ConfigError("a paired speed-up needs the same rounds", got=f"{b.size} samples", wanted=f"{a.size}")
    generator = np.random.default_rng(seed)
    ratios = np.empty(draws)
    for draw in range(draws):
        rounds = generator.integers(0, a.size, a.size)
        ratios[draw] = np.median(a[rounds]) / np.median(b[rounds])
    low, high = (float(value) for value in np.percentile(ratios, [2.5, 97.5]))
    return Speedup(engine.name, baseline.name, float(np.median(a) / np.median(b)), low, high)


def split(times: EngineTimes) -> dict[str, Any]:
    """Where the time goes: means of vision, prefix, denoise and other, which add up to the mean total.

    Means are used because means add and medians do not. `other` is the total minus the three, at least 0; `other_ms` says
    what is in it: the engine's further spans (preprocess, postprocess), and `unexplained`, host time that no span covers.
    It can only fail to add up where spans overlap, so that they claim more than the total: `adds_up` is False when that is
    more than 2 %, and then the numbers of the stages cannot be trusted.
    """
    total = float(np.mean(times.total_ms))
    means = {name: float(np.mean(values)) for name, values in times.stages_ms.items() if name != "total"}
    parts = {name: means.get(name, 0.0) for name in STAGES}
    parts["other"] = max(0.0, total - sum(parts.values()))
    other = {name: value for name, value in means.items() if name not in STAGES}
    other["unexplained"] = total - sum(means.values())
    return {
        "total_mean_ms": total,
        "mean_ms": parts,
        "share": {name: value / total if total else 0.0 for name, value in parts.items()},
        "other_ms": other,
        "adds_up": bool(total and other["unexplained"] >= -ADDS_UP_WITHIN * total),
    }


SPIN_MS = 0.4
"""Longer than the host takes to launch a graph of a thousand kernels."""
_CYCLES_PER_MS = 2_000_000  # of a GPU at 2 GHz; a slower one spins longer


def spin(milliseconds: float = SPIN_MS) -> None:
    """Keep the GPU busy for a while, so that what is queued next starts without waiting for the host."""
    import torch

    torch.cuda._sleep(int(milliseconds * _CYCLES_PER_MS))


class CudaTimer:
    """CUDA events around one call: time on the GPU.

    spin_ms  0: the device is idle when the first event is recorded, so the time until the host has launched something is
             inside. Above 0: the device spins first, sleep - event - call - event, and the launch happens meanwhile; what
             is measured is the device's work alone. Not for a host clock beside it, which would contain the spin.
    exposed  calls whose launch took longer than the spin: part of it is in their time
    """

    def __init__(self, *, spin_ms: float = 0.0) -> None:
        import torch

        self._torch, self._spin_ms = torch, spin_ms
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.calls = self.exposed = 0

    def start(self) -> None:
        """Drain the device, let it spin if asked to, and record the first event behind that."""
        self._torch.cuda.synchronize()
        if self._spin_ms:
            spin(self._spin_ms)
        self._begin.record()

    def stop(self) -> float:
        """Record the second event and wait for it."""
        self.calls += 1
        self.exposed += int(bool(self._spin_ms) and self._begin.query())
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end))


def _warm(
    name: str,
    fn: Callable[[], Any],
    rule: WarmUp,
    refcheck: Callable[[str, Any], str | None] | None,
    device: DeviceTimer | None,
    clock: Clock,
    tell: Progress,
) -> EngineTimes:
    begin = clock()
    output, cold_ms, _ = timed_call(fn, device, clock)
    if refcheck and (reason := refcheck(name, output)):
        raise NumericsError(f"engine {name!r} gives other actions than the reference; it was not timed", got=reason)
    recent: list[float] = []
    stable = False
    while not stable and len(recent) < rule.max_calls and clock() - begin < rule.max_seconds:
        recent.append(timed_call(fn, device, clock)[1])
        tell(name, sampling=False)
        stable = _is_stable(recent, rule)
    return EngineTimes(name, cold_ms, warmup_calls=len(recent), stable=stable)


def _is_stable(recent: list[float], rule: WarmUp) -> bool:
    if len(recent) < 2 * rule.window:
        return False
    before = float(np.median(recent[-2 * rule.window : -rule.window]))
    after = float(np.median(recent[-rule.window :]))
    return abs(after - before) <= rule.tolerance * before


def _sample(
    times: EngineTimes,
    fn: Callable[[], Any],
    stages: Callable[[Any], Mapping[str, float]] | None,
    device: DeviceTimer | None,
    clock: Clock,
) -> None:
    output, total_ms, device_ms = timed_call(fn, device, clock)
    times.total_ms.append(total_ms)
    if device_ms is not None:
        times.device_ms.append(device_ms)
    for stage, value in (stages(output) if stages else {}).items():
        times.stages_ms.setdefault(stage, []).append(float(value))


def timed_call(
    fn: Callable[[], Any], device: DeviceTimer | None, clock: Clock = time.perf_counter
) -> tuple[Any, float, float | None]:
    """(output, milliseconds on the host until the device has finished, milliseconds on the device or None)."""
    if device is not None:
        device.start()
    begin = clock()
    output = fn()
    device_ms = device.stop() if device is not None else None
    return output, (clock() - begin) * 1e3, device_ms


def _silent(name: str, *, sampling: bool) -> None:
    """Nobody is watching."""


@contextmanager
def _no_gc() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
