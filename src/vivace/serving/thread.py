"""A server beside the program that uses it: its own thread, its own event loop, stopped by its own handle.

>>> with serve_in_thread(policy, port=0) as server:
...     client = WebsocketClientPolicy("127.0.0.1", server.port)
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from .server import PolicyServer, ServedPolicy

log = logging.getLogger(__name__)

Value = TypeVar("Value")
STOP_MARGIN_S: Final = 10.0
"""Beyond the grace time: for close frames that nobody answers."""
START_TIMEOUT_S: Final = 600.0  # compiling a full-size policy takes minutes


class ServerHandle:
    """A running server. `stop` may be called from any thread and more than once."""

    def __init__(self, server: PolicyServer, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        self._server, self._loop, self._thread = server, loop, thread
        self.host = server.options.host
        self.port = server.port

    @property
    def url(self) -> str:
        """Address for a websocket client."""
        return f"ws://{self.host}:{self.port}"

    @property
    def waiting(self) -> int:
        """Requests in line for the policy, without the one that runs."""
        return self._server.waiting

    def stop(self) -> None:
        """Stop cleanly: requests in flight are answered. Returns when every connection is closed.

        An inference that does not return is left behind after the grace time, with its thread, wherever it runs.
        """
        if not self._thread.is_alive():
            return
        try:
            _submit(self._server.stop(), self._loop).result(self._server.options.shutdown_grace_s + STOP_MARGIN_S)
        except TimeoutError:
            log.warning("an inference is still running on the event loop and is left behind, connections open")
            self._loop.call_soon_threadsafe(self._loop.stop)
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)


@contextmanager
def serve_in_thread(policy: ServedPolicy, *, port: int = 0, **options: Any) -> Iterator[ServerHandle]:
    """Serve `policy` while the block runs. Options are those of PolicyServer; the port is a free one by default.

    Raises what PolicyServer and its start raise.
    """
    server = PolicyServer(policy, port=port, **options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run_loop, args=(loop,), name="vivace-serving", daemon=True)
    thread.start()
    try:
        _submit(server.start(), loop).result(START_TIMEOUT_S)
    except BaseException:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10.0)
        raise
    handle = ServerHandle(server, loop, thread)
    try:
        yield handle
    finally:
        handle.stop()


def _submit(work: Coroutine[Any, Any, Value], loop: asyncio.AbstractEventLoop) -> Future[Value]:
    return asyncio.run_coroutine_threadsafe(work, loop)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run until stopped, then end what is left so that no task is destroyed while it waits."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()
