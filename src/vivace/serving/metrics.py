"""What the server counts, for Prometheus (`/metrics`, optional extra `metrics`).

Every server has its own CollectorRegistry: two servers in one process do not share counters. All methods are called on the
event loop, none of them blocks. `ServerMetrics` says what can be reported and counts nothing, `PrometheusMetrics` counts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, final

from ..errors import Unsupported

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PLAIN_TEXT: Final = "text/plain; charset=utf-8"
SECONDS_BUCKETS: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)


class ServerMetrics:
    """Where a server reports what happens. This one counts nothing, and /metrics answers 404."""

    def opened(self) -> None:
        """A client was accepted."""

    def closed(self) -> None:
        """An accepted client is gone."""

    def refused(self, reason: str) -> None:
        """A handshake was answered with an HTTP error: "api_key" or "too_many_connections"."""

    def received(self, size_bytes: int) -> None:
        """Bytes arrived on a connection, websocket headers included."""

    def sent(self, size_bytes: int) -> None:
        """A message was handed to a connection."""

    def answered(self, *, total_s: float, infer_s: float, wait_s: float) -> None:
        """A request was answered: receive to sent, inside the policy, in line for it."""

    def failed(self, error: str) -> None:
        """A request ended with an error frame; `error` is the class name."""

    def lost(self, reason: str) -> None:
        """A connection was given up: "slow_reader", "left_in_line", "left_while_running", "message_too_big".

        One that leaves while its answer is computed on the event loop is noticed after it, and counts as answered.
        """

    def watch_line(self, waiting: Callable[[], int]) -> None:
        """Register the reader of the number of requests that wait for the policy."""

    def page(self) -> tuple[str, bytes] | None:
        """Content type and body of /metrics, or None when nothing is counted."""
        return None


@final
class PrometheusMetrics(ServerMetrics):
    """Counters, gauges and histograms named `vivace_*` in a registry of their own, or in the one given.

    Raises Unsupported when prometheus-client is not installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        if not prometheus_installed():
            raise Unsupported(
                "the server cannot count", got="prometheus-client is not installed", do="pip install 'vivace[metrics]'"
            )
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        mine = CollectorRegistry() if registry is None else registry
        self.registry = mine
        self._connections = Gauge("vivace_connections", "Clients connected now", registry=mine)
        self._waiting = Gauge("vivace_requests_waiting", "Requests in line for the policy", registry=mine)
        self._requests = Counter("vivace_requests", "Requests answered with a result", registry=mine)
        self._errors = Counter("vivace_errors", "Requests answered with an error", ["error"], registry=mine)
        self._refused = Counter("vivace_refused", "Handshakes refused", ["reason"], registry=mine)
        self._lost = Counter("vivace_lost_connections", "Connections given up", ["reason"], registry=mine)
        self._received = Counter("vivace_received_bytes", "Bytes received", registry=mine)
        self._sent = Counter("vivace_sent_bytes", "Bytes of messages sent", registry=mine)
        seconds = {"registry": mine, "buckets": SECONDS_BUCKETS}
        self._total = Histogram("vivace_request_seconds", "Receive to sent of one request", **seconds)
        self._infer = Histogram("vivace_infer_seconds", "Time inside the policy", **seconds)
        self._wait = Histogram("vivace_wait_seconds", "Time in line for the policy", **seconds)

    def opened(self) -> None:
        """Count a client in."""
        self._connections.inc()

    def closed(self) -> None:
        """Count a client out."""
        self._connections.dec()

    def refused(self, reason: str) -> None:
        """Count a refused handshake."""
        self._refused.labels(reason).inc()

    def received(self, size_bytes: int) -> None:
        """Count bytes in."""
        self._received.inc(size_bytes)

    def sent(self, size_bytes: int) -> None:
        """Count bytes out."""
        self._sent.inc(size_bytes)

    def answered(self, *, total_s: float, infer_s: float, wait_s: float) -> None:
        """Count one answer and its three durations."""
        self._requests.inc()
        self._total.observe(total_s)
        self._infer.observe(infer_s)
        self._wait.observe(wait_s)

    def failed(self, error: str) -> None:
        """Count one error frame by the class of its error."""
        self._errors.labels(error).inc()

    def lost(self, reason: str) -> None:
        """Count a connection that was given up."""
        self._lost.labels(reason).inc()

    def watch_line(self, waiting: Callable[[], int]) -> None:
        """Read the length of the line whenever the page is asked for."""
        self._waiting.set_function(waiting)

    def page(self) -> tuple[str, bytes] | None:
        """The text that Prometheus scrapes."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return str(CONTENT_TYPE_LATEST), bytes(generate_latest(self.registry))


def prometheus_installed() -> bool:
    """Whether the optional extra `metrics` is there."""
    return importlib.util.find_spec("prometheus_client") is not None
