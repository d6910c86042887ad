"""Names the parts of one inference and how long each took; nesting is allowed, and a child's time is inside its parent's.

On a CPU the clock is `perf_counter`. On CUDA each span also records two events, so that `device_ms` is what the GPU spent
and not what the launch cost the host; `host_ms` stays available beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Spans:
    """A recorder for one inference. Create one per call; read `milliseconds()` after the work is finished."""

    def __init__(self, *, cuda: bool = False) -> None:
        self._cuda = cuda
        self._host: dict[str, float] = {}
        self._events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body under `name`; the same name twice adds up."""
        begin = end = None
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._host[name] = self._host.get(name, 0.0) + (time.perf_counter() - start) * 1e3
            if begin is not None and end is not None:
                end.record()
                self._events[name] = (begin, end)

    def place(self, name: str, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """A span that somebody else timed on the device; the events must not be recorded again before it is read."""
        self._events[name] = (begin, end)

    def milliseconds(self) -> dict[str, float]:
        """Per span: device time where events were recorded (synchronises), host time otherwise."""
        if self._events:
            torch.cuda.synchronize()
        out = dict(self._host)
        out.update({name: begin.elapsed_time(end) for name, (begin, end) in self._events.items()})
        return out


@contextmanager
def span(spans: Spans | None, name: str) -> Iterator[None]:
    """`with span(spans, "vision")`: times the body if somebody wants to know, costs nothing otherwise."""
    if spans is None:
        yield
    else:
        with spans(name):
            yield
