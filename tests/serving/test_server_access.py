"""Who may come in and what they may read: paths, health, metrics, keys, origins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vivace.errors import ConfigError, Unsupported
from vivace.serving import PolicyServer, ServerHandle, metrics, pack, serve_in_thread

REQUEST = {"observation/state": np.arange(7.0), "prompt": "fold the towel"}


def test_any_path_is_upgraded(server: ServerHandle) -> None:
    with connect(f"ws://127.0.0.1:{server.port}/some/path?x=1", compression=None, proxy=None) as client:
        assert isinstance(client.recv(timeout=20), bytes)


def test_compression_is_never_agreed_on(server: ServerHandle) -> None:
    with connect(f"ws://127.0.0.1:{server.port}", compression="deflate", proxy=None) as client:
        assert client.protocol.extensions == []


def test_healthz(server: ServerHandle, http_get: Any) -> None:
    status, headers, body = http_get(server.port, "/healthz")
    assert (status, body) == (200, b"OK\n")
    assert headers["Content-Type"].startswith("text/plain")
    assert http_get(server.port, "/healthz?x=1")[0] == 200
    assert http_get(server.port, "/other")[0] == 426  # plain HTTP on any other path: upgrade required


def test_metrics_count_what_happened(server: ServerHandle, open_client: Any, http_get: Any, counted: Any) -> None:
    client, bad = open_client(server.port), open_client(server.port)
    for _ in range(3):
        client.ask(REQUEST)
    bad.send({"raise": "x"})
    assert isinstance(bad.socket.recv(timeout=20), str)
    with pytest.raises(ConnectionClosed):
        bad.socket.recv(timeout=20)
    status, headers, body = http_get(server.port, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert b"# HELP vivace_request_seconds" in body
    assert counted(server.port, "vivace_requests_total") == 3
    assert counted(server.port, 'vivace_errors_total{error="ValueError"}') == 1
    assert counted(server.port, "vivace_connections") == 1
    assert counted(server.port, "vivace_requests_waiting") == 0
    for histogram in ("request", "infer", "wait"):
        assert counted(server.port, f"vivace_{histogram}_seconds_count") == 3
    assert counted(server.port, "vivace_received_bytes_total") > 3 * len(pack(REQUEST))
    assert counted(server.port, "vivace_sent_bytes_total") > 3 * 10 * 7 * 8


def test_everything_that_is_reported_is_counted() -> None:
    """A method that the counting class forgot would silently count nothing."""
    reported = {name for name in vars(metrics.ServerMetrics) if not name.startswith("_")}
    assert reported <= set(vars(metrics.PrometheusMetrics))
    assert len(reported) == 10


def test_two_servers_count_apart(digest_policy: Any, open_client: Any, counted: Any) -> None:
    with serve_in_thread(digest_policy) as one, serve_in_thread(digest_policy) as other:
        open_client(one.port).ask(REQUEST)
        assert counted(one.port, "vivace_requests_total") == 1
        assert counted(other.port, "vivace_requests_total") == 0


def test_a_registry_of_the_caller_is_used(digest_policy: Any, open_client: Any) -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    with serve_in_thread(digest_policy, registry=registry) as handle:
        open_client(handle.port).ask(REQUEST)
    assert registry.get_sample_value("vivace_requests_total") == 1


def test_without_metrics_there_is_no_page(digest_policy: Any, open_client: Any, http_get: Any) -> None:
    with serve_in_thread(digest_policy, metrics=False) as handle:
        open_client(handle.port).ask(REQUEST)
        assert http_get(handle.port, "/metrics")[0] == 404


def test_metrics_without_the_library(digest_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for: refused by name. Not asked for: served without."""
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"vivace\[metrics\]"):
        PolicyServer(digest_policy, metrics=True)
    assert PolicyServer(digest_policy).metrics.page() is None


def test_an_api_key_is_required_where_configured(digest_policy: Any, open_client: Any, http_get: Any) -> None:
    with serve_in_thread(digest_policy, api_key="s3cret") as handle:
        for headers in (
            {},
            {"Authorization": "Api-Key wrong"},
            {"Authorization": "Bearer s3cret"},
            {"Authorization": ""},
        ):
            with pytest.raises(InvalidStatus) as refused:
                open_client(handle.port, additional_headers=headers)
            assert refused.value.response.status_code == 401
        twice = [("Authorization", "Api-Key s3cret"), ("Authorization", "Api-Key wrong")]
        with pytest.raises(InvalidStatus):
            open_client(handle.port, additional_headers=twice)
        key = {"Authorization": "Api-Key s3cret"}
        assert open_client(handle.port, additional_headers=key).ask(REQUEST)["actions"].shape == (10, 7)
        assert http_get(handle.port, "/healthz")[0] == 200
        assert http_get(handle.port, "/metrics")[0] == 401
        status, _, page = http_get(handle.port, "/metrics", key)
        assert status == 200
        assert b"s3cret" not in page
        assert b'vivace_refused_total{reason="api_key"} 6.0' in page


def test_a_key_is_accepted_and_ignored_where_none_is_configured(server: ServerHandle, open_client: Any) -> None:
    client = open_client(server.port, additional_headers={"Authorization": "Api-Key anything"})
    assert client.ask(REQUEST)["actions"].shape == (10, 7)


@pytest.mark.parametrize("key", ["", "  ", "a\nb"])
def test_an_unusable_key_is_refused(digest_policy: Any, key: str) -> None:
    with pytest.raises(ConfigError, match="api key"):
        PolicyServer(digest_policy, api_key=key)


def test_the_key_is_not_in_the_options_text(digest_policy: Any) -> None:
    assert "s3cret" not in repr(PolicyServer(digest_policy, api_key="s3cret").options)


def test_a_web_page_may_not_connect_unless_allowed(digest_policy: Any, open_client: Any) -> None:
    with serve_in_thread(digest_policy, allowed_origins=("http://robot.example",)) as handle:
        with pytest.raises(InvalidStatus) as refused:
            open_client(handle.port, origin="http://evil.example")
        assert refused.value.response.status_code == 403
        assert open_client(handle.port, origin="http://robot.example").metadata
