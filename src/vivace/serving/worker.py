"""One thread that runs the policy, and the order in which waiting clients get it.

The event loop must stay free to answer pings and handshakes, and a GPU serves one inference at a time; so there is exactly
one worker thread, which also does the warm-up. Only where nobody else can be kept waiting does a session compute by itself
(`Session`, decision 0012).

Fairness: a connection has at most one request here, so the plain order of arrival *is* round-robin over the connections
that wait. A client that asks again goes to the end of the line; nobody is served twice while another waits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..errors import Overloaded

Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What came of a job: a value or the error it raised, how long it ran and how long it waited."""

    value: Result | None
    error: BaseException | None
    run_ms: float
    wait_ms: float


@dataclass(eq=False)
class Job(Generic[Result]):
    """One call for the worker. `future` belongs to `loop` and receives an Outcome, never an exception."""

    call: Callable[[], Result]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Outcome[Result]]
    submitted_s: float = field(default_factory=time.perf_counter)


class Worker:
    """A daemon thread with a bounded first-come-first-served line. Methods may be called from any thread."""

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._line: deque[Job[Any]] = deque()
        self._changed = threading.Condition()
        self._stopping = self._running = False
        self._thread = threading.Thread(target=self._work, name="vivace-inference", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in line, without the one that runs."""
        return len(self._line)

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        with self._changed:
            return not self._running and not self._line

    def submit(self, call: Callable[[], Result]) -> Job[Result]:
        """Put a call at the end of the line; from a running event loop. Raises Overloaded when the line is full."""
        loop = asyncio.get_running_loop()
        job = Job(call=call, loop=loop, future=loop.create_future())
        with self._changed:
            if self._stopping or len(self._line) >= self._max_waiting:
                raise Overloaded(
                    "server cannot take another request now",
                    got="it is stopping" if self._stopping else f"{len(self._line)} requests waiting",
                    wanted=f"fewer than {self._max_waiting}",
                    do="connect again later, or raise max_waiting",
                )
            self._line.append(job)
            self._changed.notify()
        return job

    def drop(self, job: Job[Any]) -> bool:
        """Take a job out of the line. Returns False when it already runs or is done."""
        with self._changed:
            if job in self._line:
                self._line.remove(job)
                return True
        return False

    def stop(self, *, timeout_s: float) -> bool:
        """Finish the running job, drop the waiting ones, end the thread. Returns False if it did not end in time."""
        with self._changed:
            self._stopping = True
            self._line.clear()
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            outcome = outcome_of(job.call, submitted_s=job.submitted_s)
            with self._changed:
                self._running = False  # before anybody can act on the outcome
            _hand_over(job, outcome)
            del job, outcome  # an idle server must not keep the last request's images alive

    def _next(self) -> Job[Any] | None:
        with self._changed:
            while not self._line and not self._stopping:
                self._changed.wait()
            self._running = bool(self._line)
            return self._line.popleft() if self._line else None


def outcome_of(call: Callable[[], Result], *, submitted_s: float) -> Outcome[Result]:
    """Run `call` on this thread. Raises nothing."""
    started_s = time.perf_counter()
    value, error = None, None
    try:
        value = call()
    except BaseException as raised:  # server edge: even a SystemExit inside a policy must not end the server's thread
        error = raised
    ended_s = time.perf_counter()
    return Outcome(value, error, (ended_s - started_s) * 1e3, (started_s - submitted_s) * 1e3)


def _hand_over(job: Job[Any], outcome: Outcome[Any]) -> None:
    """Give the outcome to the loop that waits for it."""
    try:
        job.loop.call_soon_threadsafe(_deliver, job.future, outcome)
    except RuntimeError:  # the loop was closed by a forced shutdown: nobody waits any more
        return


def _deliver(future: asyncio.Future[Outcome[Any]], outcome: Outcome[Any]) -> None:
    if not future.done():
        future.set_result(outcome)
