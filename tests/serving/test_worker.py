"""The one thread that runs the policy."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from vivace.errors import Overloaded
from vivace.serving.worker import Worker


def test_jobs_run_in_order_and_errors_are_outcomes() -> None:
    async def main() -> list[Any]:
        worker = Worker(max_waiting=10)
        jobs = [worker.submit(lambda n=n: 10 // n) for n in (5, 0, 2)]
        outcomes = [await job.future for job in jobs]
        assert worker.stop(timeout_s=20)
        return outcomes

    first, second, third = asyncio.run(main())
    assert (first.value, third.value) == (2, 5)
    assert isinstance(second.error, ZeroDivisionError)
    assert second.value is None
    assert third.wait_ms >= first.wait_ms >= 0


def test_a_dropped_job_is_not_run_and_a_full_line_refuses() -> None:
    ran: list[str] = []
    gate = threading.Event()

    async def main() -> None:
        worker = Worker(max_waiting=2)
        running = worker.submit(lambda: gate.wait(20))
        while worker.waiting:
            await asyncio.sleep(0.001)
        dropped, kept = worker.submit(lambda: ran.append("dropped")), worker.submit(lambda: ran.append("kept"))
        with pytest.raises(Overloaded, match="2 requests waiting"):
            worker.submit(lambda: ran.append("refused"))
        assert worker.drop(dropped)
        assert not worker.drop(dropped)
        assert not worker.drop(running)
        gate.set()
        await kept.future
        assert worker.stop(timeout_s=20)
        with pytest.raises(Overloaded, match="stopping"):
            worker.submit(lambda: ran.append("late"))

    asyncio.run(main())
    assert ran == ["kept"]


def test_an_idle_worker_keeps_no_request_alive() -> None:
    class Image:
        pass

    async def main() -> None:
        worker = Worker(max_waiting=2)
        image = Image()
        seen = weakref.ref(image)
        await worker.submit(lambda image=image: None).future
        del image
        for _ in range(20):
            gc.collect()
            if seen() is None:
                break
            await asyncio.sleep(0.01)
        assert seen() is None
        assert worker.stop(timeout_s=20)

    asyncio.run(main())


def test_a_worker_that_is_stuck_is_left_behind() -> None:
    gate = threading.Event()

    async def main() -> bool:
        worker = Worker(max_waiting=1)
        worker.submit(lambda: gate.wait(20))
        while worker.waiting:
            await asyncio.sleep(0.001)
        return worker.stop(timeout_s=0.01)

    assert asyncio.run(main()) is False
    gate.set()
