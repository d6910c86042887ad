"""A policy server that openpi's clients speak to without a change.

What openpi's own server lacks, and this one has: inference off the event loop wherever somebody would wait for it (pings
and other clients go on; decision 0012), warm-up before the port opens, a fair line for several clients, bounds on all that
a client can send, answers for what is in flight when it stops, and no address but loopback unless told so.

    GET /healthz   200, OK and a newline      GET /metrics   Prometheus text      anything else is upgraded to a websocket

Start order: bind the port (so that a busy one is known at once), warm up, listen. Until it listens, clients are refused.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import logging
import signal
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Origin

from ..config import ResolvedEngine
from ..errors import ConfigError
from ..types import ActionChunk
from .metrics import PLAIN_TEXT, PrometheusMetrics, ServerMetrics, prometheus_installed
from .options import ServerOptions
from .results import metadata_frame
from .session import BoundedConnection, Session
from .worker import Worker

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = logging.getLogger(__name__)


class ServedPolicy(Protocol):
    """What a policy must offer to be served; `vivace.load_policy` returns one.

    metadata  sent to every client, plain Python values and arrays
    engine    what runs, sent to every client under the key "vivace"

    It may also say `quick = True`: an answer takes milliseconds, and `infer` may be called from any thread, one at a time
    (`ServerOptions.inline_below_ms`).
    """

    @property
    def metadata(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def engine(self) -> ResolvedEngine: ...  # noqa: D102

    def infer(self, request: Mapping[str, Any], /) -> ActionChunk:
        """Answer one observation, not depending on earlier ones; one call at a time, from one thread unless `quick`."""
        ...

    def warmup(self) -> None:
        """Do once what would make a first request slow; called from the thread that infers, or from one of the two."""
        ...


class PolicyServer:
    """Serves one policy. `start`, `stop` and `run` belong to one event loop.

    Args:
        policy: see `ServedPolicy`.
        metadata: added to the policy's metadata, wins over it.
        metrics: False = none, True = required, None = if prometheus-client is installed.
        registry: Prometheus registry to use instead of an own one.
        options: the fields of `ServerOptions` (host, port, api_key, max_message_bytes, ...).

    Raises ConfigError for a bad option, Unsupported for metrics that cannot be counted, ProtocolError for metadata that
    cannot be sent.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: bool | None = None,
        registry: CollectorRegistry | None = None,
        **options: Any,
    ) -> None:
        self.options = ServerOptions(**options)
        self.metrics = _metrics(metrics, registry)
        self.engine = policy.engine
        self._policy = policy
        self._metadata = {**policy.metadata, **(metadata or {})}
        self._greeting = metadata_frame(self._metadata, self.engine)
        self._sessions: set[Session] = set()
        self._stopping = False
        self._socket: socket.socket | None = None
        self._server: Server | None = None
        self._worker: Worker | None = None

    @property
    def port(self) -> int:
        """The port it is bound to; known once `start` has bound it."""
        if self._socket is None:
            raise ConfigError("server has no port", got="not started", do="await start() first")
        return int(self._socket.getsockname()[1])

    @property
    def waiting(self) -> int:
        """Requests in line for the policy, without the one that runs."""
        return 0 if self._worker is None else self._worker.waiting

    async def start(self) -> None:
        """Bind, warm up, listen. Raises ConfigError when the address cannot be used, and whatever the warm-up raises."""
        self._socket = bind(self.options.host, self.options.port)
        self._worker = Worker(max_waiting=self.options.max_waiting)
        self.metrics.watch_line(lambda: self.waiting)
        try:
            outcome = await self._worker.submit(self._policy.warmup).future
            if outcome.error is not None:
                raise outcome.error
            self.engine = self._policy.engine  # a warm-up learns what really runs
            self._greeting = metadata_frame(self._metadata, self.engine)
            self._server = await self._listen(self._socket)
        except BaseException:
            self._socket.close()
            self._worker.stop(timeout_s=0.0)
            raise
        log.info("listening on %s:%d after a warm-up of %.0f ms", self.options.host, self.port, outcome.run_ms)

    async def stop(self) -> None:
        """Stop accepting, answer what is in flight, close every connection with 1001; after the grace time cut them."""
        self._stopping = True
        if self._server is None:
            return
        self._server.close(close_connections=False)
        try:
            async with asyncio.timeout(self.options.shutdown_grace_s):
                await asyncio.gather(*(session.finish() for session in self._sessions))
                await self._server.wait_closed()
        except TimeoutError:
            log.warning("%d requests were not answered in time: connections cut", len(self._sessions))
            self.abort()
            await asyncio.sleep(0)  # lets the cut connections tell their sessions
        if self._worker is not None and not self._worker.stop(timeout_s=1.0):
            log.warning("an inference is still running and is left behind")

    def abort(self) -> None:
        """Cut every connection now, answered or not."""
        for session in self._sessions:
            session.abort()

    async def run(self, *, ready: Callable[[PolicyServer], None] = lambda server: None) -> None:
        """Start, call `ready`, serve until SIGINT or SIGTERM, stop cleanly; a second signal cuts all connections.

        Only in a process's main thread.
        """
        asked, forced = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (forced if asked.is_set() else asked).set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        try:
            if not await _first(self.start(), asked.wait()):
                return
            ready(self)
            await asked.wait()
            log.info("stopping: requests in flight are answered; a second signal cuts them off")
            await _first(self.stop(), forced.wait())
            self.abort()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def _listen(self, bound: socket.socket) -> Server:
        options = self.options
        try:
            return await serve(
                self._handle,
                sock=bound,
                create_connection=self._connection_class(),
                process_request=self._answer_http,
                origins=[None, *(Origin(origin) for origin in options.allowed_origins)],
                compression=None,
                max_size=options.max_message_bytes,
                max_queue=2,  # one request in flight; a client that sends ahead is slowed down, not stored
                ping_interval=options.ping_interval_s,
                ping_timeout=options.ping_interval_s,
                close_timeout=min(10.0, options.send_timeout_s),
                logger=logging.getLogger(f"{__name__}.websockets"),
            )
        except OSError as error:
            raise _cannot_listen(options.host, options.port, error) from error

    def _connection_class(self) -> type[ServerConnection]:
        received = self.metrics.received

        class CountedConnection(BoundedConnection):
            def data_received(self, data: bytes | memoryview) -> None:
                received(len(data))
                super().data_received(data)

        return CountedConnection

    async def _handle(self, connection: ServerConnection) -> None:
        """One accepted websocket."""
        assert self._worker is not None, "handshakes come after start()"
        if self._stopping or len(self._sessions) >= self.options.max_connections:
            await connection.close(1013, "try again later")
            return
        session = Session(
            connection,
            infer=self._policy.infer,
            greeting=self._greeting,
            worker=self._worker,
            metrics=self.metrics,
            options=self.options,
            alone=self._alone,
        )
        self._sessions.add(session)
        self.metrics.opened()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            self.metrics.closed()

    def _alone(self) -> bool:
        """Whether the policy is quick, its only client asks, and the worker does nothing, not even for one that left."""
        quick, worker = bool(getattr(self._policy, "quick", False)), self._worker
        return quick and len(self._sessions) == 1 and worker is not None and worker.idle

    def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP paths and refused handshakes; None = go on to the websocket."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return _respond(http.HTTPStatus.OK, b"OK\n")
        if self.options.api_key is not None and not _authorized(request.headers, self.options.api_key):
            self.metrics.refused("api_key")
            response = _respond(http.HTTPStatus.UNAUTHORIZED, b"wanted the header Authorization: Api-Key KEY\n")
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if path == "/metrics":
            page = self.metrics.page()
            if page is None:
                return _respond(http.HTTPStatus.NOT_FOUND, b"this server does not count; start it with metrics\n")
            return _respond(http.HTTPStatus.OK, page[1], content_type=page[0])
        if len(self._sessions) >= self.options.max_connections:
            self.metrics.refused("too_many_connections")
            return _respond(http.HTTPStatus.SERVICE_UNAVAILABLE, b"too many clients; try again later\n")
        return None


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet. Raises ConfigError with the reason when the address cannot be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    family, kind, protocol, _, address = sorted(found, key=lambda row: row[0] != socket.AF_INET)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {host}:{port}",
        got=error.strerror or str(error),
        wanted="an address of this machine and a port that is free and allowed",
        do="choose another --port (0 = any free one) or stop the program that uses it",
    )


def _metrics(wanted: bool | None, registry: CollectorRegistry | None) -> ServerMetrics:
    if wanted or registry is not None or (wanted is None and prometheus_installed()):
        return PrometheusMetrics(registry)
    return ServerMetrics()


def _authorized(headers: Headers, api_key: str) -> bool:
    """Whether exactly one Authorization header carries the key; the comparison takes the same time for every wrong key."""
    values = headers.get_all("Authorization")
    scheme, _, key = (values[0] if len(values) == 1 else "").partition(" ")
    return scheme.lower() == "api-key" and hmac.compare_digest(
        key.strip().encode("utf-8", "surrogateescape"), api_key.encode("utf-8", "surrogateescape")
    )


def _respond(status: http.HTTPStatus, body: bytes, *, content_type: str = PLAIN_TEXT) -> Response:
    headers = Headers({"Content-Type": content_type, "Content-Length": str(len(body)), "Connection": "close"})
    return Response(status.value, status.phrase, headers, body)


async def _first(wanted: Any, stop: Any) -> bool:
    """Run `wanted` until it ends or `stop` does. Returns whether it ended; raises what it raised."""
    task, stopper = asyncio.ensure_future(wanted), asyncio.ensure_future(stop)
    await asyncio.wait({task, stopper}, return_when=asyncio.FIRST_COMPLETED)
    stopper.cancel()
    if not task.done():
        task.cancel()
        return False
    task.result()
    return True
