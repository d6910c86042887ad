"""One client from its metadata frame to its close frame.

    server -> metadata                                 binary, once
    client -> observation      server -> result        binary, strictly in turn
                               server -> error text    then close 1011: the connection is dead, as in openpi

A session waits for its own client only: everything it sends has a deadline, everything it computes is done by the worker,
but for the answers of a quick policy to the only client there is.
It owns no state beyond the duration of the last request.
Source: openpi src/openpi/serving/websocket_policy_server.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from ..errors import NumericsError, ProtocolError, VivaceError
from ..types import ActionChunk
from .decoder import Decoder
from .metrics import ServerMetrics
from .options import ServerOptions
from .protocol import pack
from .results import result_of
from .scan import Limits
from .worker import Job, Outcome, Worker, outcome_of

log = logging.getLogger(__name__)

ERROR_REASON: Final = (
    "Internal server error. Traceback included in previous frame."  # openpi's words: clients match them
)
GOING_AWAY_REASON: Final = "server is shutting down"
SHORT_BYTES: Final = 2**14
"""An answer that a transport with nothing left to send takes at once; it waits from 64 KB on. Robots' answers have 3."""
GOODBYE_S: Final = 1.0
"""For an idle client's close frame: `serving.client` looks at what came at its next request only."""


Infer = Callable[[Mapping[str, Any]], ActionChunk]


class Gone(Exception):
    """The client is not there any more; `args[0]` is the reason that is counted."""


@dataclass(frozen=True)
class Answer:
    """A result as it goes over the wire, and how long `policy.infer` took for it."""

    frame: bytes
    infer_ms: float


LEFT: Final = Outcome[Answer](None, None, 0.0, 0.0)
"""Stands for the outcome of a request whose client is not there any more."""


class BoundedConnection(ServerConnection, asyncio.BufferedProtocol):
    """A websocket connection whose unsent bytes are bounded, and which receives into memory that it keeps.

    The library answers every ping at once; a peer that sends pings and never reads would make it store answers for ever.
    Its own way to receive asks the system for new memory twice per request of three pictures; here it is one read.
    """

    max_unsent_bytes = 8 * 2**20
    max_read_bytes = 2**20
    _space = memoryview(b"")

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: over the last ones, which `buffer_updated` has copied."""
        if not self._space:
            self._space = memoryview(bytearray(self.max_read_bytes))  # pages that are never filled cost nothing
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        """Handle the bytes that came into the buffer."""
        self.data_received(self._space[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        """Handle received bytes, then cut the connection if too much waits to be sent."""
        super().data_received(data)  # type: ignore[arg-type]  # it appends them to a bytearray
        if self.transport.get_write_buffer_size() > self.max_unsent_bytes:
            log.warning("client %s does not read: connection cut", self.remote_address)
            self.transport.abort()


class Session:
    """Serves one connection; see the module text.

    alone  whether a call on the event loop would keep nobody else waiting
    """

    def __init__(
        self,
        connection: ServerConnection,
        *,
        infer: Infer,
        greeting: bytes,
        worker: Worker,
        metrics: ServerMetrics,
        options: ServerOptions,
        alone: Callable[[], bool],
    ) -> None:
        self._connection, self._infer, self._greeting = connection, infer, greeting
        self._worker, self._metrics, self._options, self._alone = worker, metrics, options, alone
        self._unpack = Decoder(Limits(max_bytes=options.max_message_bytes))
        self._last_infer_ms = math.inf
        self._busy = False
        self._stopping = False
        self._prev_total_ms: float | None = None

    async def run(self) -> None:
        """Serve until the client leaves, an error ends the connection, or the server stops."""
        gone = asyncio.ensure_future(self._connection.wait_closed())
        try:
            await self._send(self._greeting)
            while not self._stopping:
                frame = await self._receive()
                self._busy = True
                if not await self._serve_one(frame, gone):
                    return
                self._busy = False
            await self._close(CloseCode.GOING_AWAY, GOING_AWAY_REASON)
        except Gone as left:
            self._metrics.lost(str(left))
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
                self._metrics.lost("message_too_big")
        finally:
            gone.cancel()

    async def finish(self) -> None:
        """Let the running request be answered, then close with 1001; close at once when the client is idle."""
        self._stopping = True
        if not self._busy:
            await self._close(CloseCode.GOING_AWAY, GOING_AWAY_REASON, timeout_s=GOODBYE_S)

    def abort(self) -> None:
        """Cut the connection now."""
        self._connection.transport.abort()

    async def _serve_one(self, frame: bytes | str, gone: asyncio.Future[None]) -> bool:
        """Answer one request. Returns False after an error, when the connection is closed."""
        started_s = time.perf_counter()
        try:
            request = self._decode(frame)
            outcome = await self._computed(request, gone)
            if outcome.value is None:
                await self._fail(outcome.error or NumericsError("worker returned nothing", wanted="an Answer"))
                return False
        except (Gone, ConnectionClosed):
            raise
        except Exception as error:  # server edge: logged, counted, and told to the client
            await self._fail(error)
            return False
        await self._send(outcome.value.frame)
        total_s, self._last_infer_ms = time.perf_counter() - started_s, outcome.value.infer_ms
        self._prev_total_ms = total_s * 1e3
        self._metrics.answered(total_s=total_s, infer_s=outcome.value.infer_ms / 1e3, wait_s=outcome.wait_ms / 1e3)
        await asyncio.sleep(0)  # a client that sends ahead must not keep the loop from everything else
        return True

    async def _computed(self, request: Mapping[str, Any], gone: asyncio.Future[None]) -> Outcome[Answer]:
        """By the worker, or here and now: each thread that has to wake costs a robot about a tenth of a millisecond."""
        if self._last_infer_ms < self._options.inline_below_ms and self._alone():
            outcome = outcome_of(lambda: self._answer(request), submitted_s=time.perf_counter())
            if isinstance(outcome.error, KeyboardInterrupt):
                raise outcome.error  # on a program's main thread it is a person who stops it
            return outcome
        return await self._wait(self._worker.submit(lambda: self._answer(request)), gone)

    def _answer(self, request: Mapping[str, Any]) -> Answer:
        """Infer, and encode on the same thread, where the processor is awake and its caches are warm."""
        started_s = time.perf_counter()
        chunk = self._infer(request)
        infer_ms = (time.perf_counter() - started_s) * 1e3
        return Answer(pack(result_of(chunk, infer_ms=infer_ms, prev_total_ms=self._prev_total_ms)), infer_ms)

    def _decode(self, frame: bytes | str) -> dict[str, Any]:
        if isinstance(frame, str):
            raise ProtocolError("request is a text frame", wanted="a binary frame with a msgpack map")
        request = self._unpack(frame)
        if not isinstance(request, dict):
            raise ProtocolError("request is not a map", got=type(request).__name__, wanted="an observation dict")
        if wrong := [key for key in request if not isinstance(key, str)]:
            raise ProtocolError("request has keys that are not text", got=repr(wrong)[:200], wanted="str keys")
        return request

    async def _wait(self, job: Job[Answer], gone: asyncio.Future[None]) -> Outcome[Answer]:
        """Wait for the worker; if the client leaves first, its request is not computed."""

        def leave(_: Any) -> None:
            if not job.future.done():
                job.future.set_result(LEFT)

        gone.add_done_callback(leave)
        try:
            outcome = await job.future
        finally:
            gone.remove_done_callback(leave)
        if outcome is LEFT:
            raise Gone("left_in_line" if self._worker.drop(job) else "left_while_running")
        return outcome

    async def _receive(self) -> bytes | str:
        """One whole message. Its size is bounded by the library, the number of its fragments here."""
        fragments: list[Any] = []
        async for fragment in self._connection.recv_streaming():
            fragments.append(fragment)
            if len(fragments) > self._options.max_fragments:
                await self._close(CloseCode.MESSAGE_TOO_BIG, "too many fragments", timeout_s=1.0)
                raise Gone("message_too_big")
        message: bytes | str = fragments[0] if len(fragments) == 1 else type(fragments[0])().join(fragments)
        return message

    async def _send(self, message: bytes | str) -> None:
        """Send within the deadline; a client that does not read is cut off, so that it holds nothing of ours."""
        if len(message) <= SHORT_BYTES and not self._connection.transport.get_write_buffer_size():
            await self._connection.send(message)  # the transport takes it whatever the client does
        else:
            await self._send_in_time(message)
        self._metrics.sent(len(message))

    async def _send_in_time(self, message: bytes | str) -> None:
        try:
            async with asyncio.timeout(self._options.send_timeout_s):
                await self._connection.send(message)
        except TimeoutError:
            log.warning("client %s does not read: connection cut", self._connection.remote_address)
            self.abort()
            raise Gone("slow_reader") from None

    async def _close(self, code: int, reason: str, *, timeout_s: float | None = None) -> None:
        """Close politely within a deadline, else cut."""
        try:
            async with asyncio.timeout(timeout_s or self._options.send_timeout_s):
                await self._connection.close(code, reason)
        except TimeoutError:
            self.abort()

    async def _fail(self, error: BaseException) -> None:
        """Tell the client what went wrong, in words that a person can act on, and close as openpi does."""
        name = type(error).__name__
        self._metrics.failed(name)
        expected = isinstance(error, VivaceError)
        log.warning("%s: %s: %s", self._connection.remote_address, name, error, exc_info=None if expected else error)
        text = f"{name}: {error}"
        if self._options.debug:
            text += "\n\n" + "".join(traceback.format_exception(error))
        await self._send(text)
        await self._close(CloseCode.INTERNAL_ERROR, ERROR_REASON)
