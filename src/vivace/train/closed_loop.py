"""Episodes with the policy in training: how often it succeeds, and examples from the states that it gets into.

Each simulator is a process; whoever is at a look sends the observation and waits. The policy answers all that wait in one
batch. Which observations share a batch depends on timing, and with it the last bits of the answers, so an episode may
differ between runs where it hangs on a hair; rates do not.

Corrections (DAgger, Ross et al. 2011): at every tick the expert says what it would do there. With an inference delay the
policy is told the committed actions, as it will be when it is served: so it also sees where its own late plans lead.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from ..errors import ConfigError, WorkerDied
from ..sim.record import Source
from ..sim.rollout import Execution
from ..sim.statistics import wilson
from .simulator import Answered, Ended, Job, Look, simulate

Answer = Callable[[list[Look]], list[Answered]]
CORRECTION_SEED = 500_000
"""Corrections run on seeds from here to 999 999; success is measured from 0 on; recording uses 1 000 000 and more."""


def jobs(
    sources: Sequence[Source],
    *,
    first_seed: int,
    image_px: int,
    horizon: int,
    execution: Execution,
    correct: bool = False,
) -> list[Job]:
    """Sources' episodes; every source begins at `first_seed`."""
    return [
        Job(source, first_seed + index, image_px, horizon, execution, correct)
        for source in sources
        for index in range(source.episodes)
    ]


def run(work: Sequence[Job], answer: Answer, *, processes: int) -> Iterator[Ended]:
    """Run all jobs, each as it ends. A simulator that fails ends the run: WorkerDied says at which episode."""
    if processes < 1:
        raise ConfigError("processes", got=processes, wanted="at least 1")
    waiting = list(reversed(work))
    simulators: dict[Connection[Any, Any], _Simulator] = {}
    try:
        for _ in range(min(processes, len(work))):
            one = _Simulator()
            simulators[one.pipe] = one
            one.begin(waiting.pop())
        left = len(work)
        while left:
            looks: list[tuple[_Simulator, Look]] = []
            for pipe in wait(list(simulators)):
                assert isinstance(pipe, Connection)
                one = simulators[pipe]
                message = one.hear()
                if isinstance(message, Look):
                    looks.append((one, message))
                    continue
                left -= 1
                if waiting:
                    one.begin(waiting.pop())
                yield message
            if looks:
                chunks = answer([look for _, look in looks])
                for (one, _), answered in zip(looks, chunks, strict=True):
                    one.tell(answered)
    finally:
        for one in simulators.values():
            one.end()


class _Simulator:
    """A process that plays one episode after the other, with the end of the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=simulate, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._job: Job | None = None

    def begin(self, job: Job) -> None:
        """The next episode."""
        self._job = job
        self.tell(job)

    def tell(self, message: Any) -> None:
        """Raises WorkerDied."""
        try:
            self.pipe.send(message)
        except OSError as error:
            raise self._died() from error

    def hear(self) -> Any:
        """Wait for a message. Raises WorkerDied."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def end(self) -> None:
        """Close the pipe, which tells the process to end."""
        self.pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()

    def _died(self) -> WorkerDied:
        self._process.join(timeout=10)
        job = self._job
        return WorkerDied(
            "a simulator's process ended in mid-episode",
            got=f"exit code {self._process.exitcode}, task {job and job.source.task}, seed {job and job.seed}",
            do="its own error, if it had one, is above; a negative exit code is a signal (-9: often out of memory)",
        )


def rates(ended: Sequence[Ended]) -> list[dict[str, Any]]:
    """One row for each source: n, successes, rate, Wilson's 95 % interval, wrong objects, mean ticks of successes."""
    rows = []
    for source in dict.fromkeys(one.job.source for one in ended):
        mine = [one for one in ended if one.job.source == source]
        good = [one for one in mine if one.success]
        rows.append(
            {
                "task": source.task,
                "belt": source.belt or "task's own",
                "n": len(mine),
                "successes": len(good),
                "rate": len(good) / len(mine),
                "interval": wilson(len(good), len(mine)),
                "wrong_object": sum(one.wrong_object for one in mine),
                "mean_ticks": float(np.mean([one.ticks for one in good])) if good else None,
                "failed_seeds": [one.job.seed for one in mine if not one.success][:20],
            }
        )
    return rows
