"""What one client sees: metadata, results, errors, health, metrics, keys, bounds."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from vivace.errors import ConfigError, ObservationError, ProtocolError, Unsupported
from vivace.serving import PolicyServer, ServerHandle, metrics, pack, serve_in_thread
from vivace.serving.session import ERROR_REASON, BoundedConnection

REQUEST = {"observation/state": np.arange(7.0), "prompt": "fold the towel"}


def failure(client: Any) -> tuple[str, int, str]:
    """The error frame and the close that follow a bad request."""
    text = client.socket.recv(timeout=20)
    assert isinstance(text, str)
    with pytest.raises(ConnectionClosed) as closed:
        client.socket.recv(timeout=20)
    return text, closed.value.rcvd.code, closed.value.rcvd.reason


def test_metadata_comes_first_and_names_the_engine(server: ServerHandle, open_client: Callable[..., Any]) -> None:
    metadata = open_client(server.port).metadata
    assert metadata["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
    assert metadata["vivace"]["backend"] == "eager"
    assert metadata["vivace"]["details"] == {"buckets": [16, 32]}
    assert set(metadata) == {"reset_pose", "vivace"}


def test_metadata_given_to_the_server_is_added(digest_policy: Any, open_client: Callable[..., Any]) -> None:
    with serve_in_thread(digest_policy, metadata={"robot": "left arm", "reset_pose": [1]}) as handle:
        metadata = open_client(handle.port).metadata
    assert metadata["robot"] == "left arm"
    assert metadata["reset_pose"] == [1]


def test_metadata_that_no_client_could_read_is_refused(digest_policy: Any) -> None:
    with pytest.raises(ProtocolError):
        PolicyServer(digest_policy, metadata={"limits": {1: 2}})


def test_a_result_is_openpis_dict(server: ServerHandle, digest_policy: Any, open_client: Callable[..., Any]) -> None:
    client = open_client(server.port)
    first, second = client.ask(REQUEST), client.ask(REQUEST)
    wanted = digest_policy.infer(REQUEST).actions
    for result in (first, second):
        assert set(result) == {"actions", "policy_timing", "server_timing"}
        assert result["actions"].dtype == np.float64
        np.testing.assert_array_equal(result["actions"], wanted)
        assert result["policy_timing"]["infer_ms"] == 6.5  # vision 2 + prefix 3 + denoise 1.5, not the total 9
        assert result["policy_timing"]["total_ms"] == 9.0
        assert all(type(value) is float for value in result["policy_timing"].values())
        assert type(result["server_timing"]["infer_ms"]) is float
    assert "prev_total_ms" not in first["server_timing"]
    assert second["server_timing"]["prev_total_ms"] > 0


def test_the_previous_duration_belongs_to_the_connection(server: ServerHandle, open_client: Callable[..., Any]) -> None:
    open_client(server.port).ask(REQUEST)
    assert "prev_total_ms" not in open_client(server.port).ask(REQUEST)["server_timing"]


def test_model_time_is_the_total_where_stages_are_unknown() -> None:
    from vivace.serving.results import policy_timing

    assert policy_timing({"total": 5.0, "vision": 1.0}) == {"infer_ms": 5.0, "total_ms": 5.0, "vision_ms": 1.0}
    assert policy_timing({}) == {}


def test_an_error_is_told_and_ends_only_its_connection(server: ServerHandle, open_client: Callable[..., Any]) -> None:
    bad, good = open_client(server.port), open_client(server.port)
    bad.send({"raise": "the wrist camera is missing"})
    text, code, reason = failure(bad)
    assert text == "ValueError: the wrist camera is missing"
    assert (code, reason) == (1011, ERROR_REASON)
    assert reason == "Internal server error. Traceback included in previous frame."
    assert good.ask(REQUEST)["actions"].shape == (10, 7)
    assert open_client(server.port).ask(REQUEST)["actions"].shape == (10, 7)


def test_an_error_says_what_got_wanted_do(digest_policy: Any, open_client: Callable[..., Any]) -> None:
    def infer(request: Any) -> Any:
        raise ObservationError("state has the wrong size", got=6, wanted=7, do="send 7 numbers")

    digest_policy.infer = infer
    with serve_in_thread(digest_policy) as handle:
        client = open_client(handle.port)
        client.send(REQUEST)
        assert failure(client)[0] == "ObservationError: state has the wrong size; got 6; wanted 7; send 7 numbers"


@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_is_sent_only_when_asked_for(digest_policy: Any, open_client: Any, debug: bool) -> None:
    with serve_in_thread(digest_policy, debug=debug) as handle:
        client = open_client(handle.port)
        client.send({"raise": "x"})
        assert ("Traceback" in failure(client)[0]) is debug


@pytest.mark.parametrize(
    "error", [SystemExit("leave"), KeyboardInterrupt(), GeneratorExit(), StopIteration(), MemoryError()]
)
def test_nothing_that_a_policy_raises_ends_the_worker(digest_policy: Any, open_client: Any, error: Any) -> None:
    answers = digest_policy.infer

    def infer(request: Any) -> Any:
        if "bad" in request:
            raise error
        return answers(request)

    digest_policy.infer = infer
    with serve_in_thread(digest_policy) as handle:
        client = open_client(handle.port)
        client.send({"bad": 1})
        assert failure(client)[0].startswith(type(error).__name__)
        assert open_client(handle.port).ask(REQUEST)["actions"].shape == (10, 7)


@pytest.mark.parametrize(
    ("actions", "name"),
    [
        (np.full((10, 7), np.nan), "NumericsError"),
        (np.array([[0.0, np.inf]]), "NumericsError"),
        (np.zeros(7), "ShapeError"),
        (np.zeros((10, 7), int), "ShapeError"),
    ],
)
def test_unusable_actions_never_reach_a_robot(digest_policy: Any, open_client: Any, actions: Any, name: str) -> None:
    from dataclasses import replace

    answers = digest_policy.infer
    digest_policy.infer = lambda request: replace(answers(request), actions=actions)
    with serve_in_thread(digest_policy) as handle:
        client = open_client(handle.port)
        client.send(REQUEST)
        assert failure(client)[0].startswith(name)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"", "ends too early"),
        (b"\xc1", "does not have"),
        (pack([1, 2]), "not a map"),
        (pack(None), "not a map"),
        (pack(np.zeros(3)), "not a map"),
        (pack({b"bytes": 1}), "not text"),
        ("text", "text frame"),
    ],
)
def test_a_bad_frame_is_a_protocol_error(
    server: ServerHandle, open_client: Any, frame: bytes | str, words: str
) -> None:
    client = open_client(server.port)
    client.socket.send(frame)
    text, code, _ = failure(client)
    assert text.startswith("ProtocolError: ")
    assert words in text
    assert code == 1011


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
    failure(bad)
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


def test_a_huge_message_costs_only_its_connection(
    digest_policy: Any, open_client: Any, counted: Any, wait_until: Any
) -> None:
    with serve_in_thread(digest_policy, max_message_bytes=100_000) as handle:
        good, bad = open_client(handle.port), open_client(handle.port)
        assert good.ask({"image": np.zeros(90_000, np.uint8)})["actions"].shape == (10, 7)
        bad.socket.send(bytes(200_000))
        with pytest.raises(ConnectionClosed) as closed:
            bad.socket.recv(timeout=20)
        assert closed.value.rcvd.code == 1009
        assert good.ask(REQUEST)["actions"].shape == (10, 7)
        wait_until(lambda: counted(handle.port, 'vivace_lost_connections_total{reason="message_too_big"}') == 1)


def test_fragments_are_joined_and_bounded(digest_policy: Any, open_client: Any) -> None:
    data = pack(REQUEST)
    with serve_in_thread(digest_policy, max_fragments=8) as handle:
        client = open_client(handle.port)
        client.socket.send([data[:10], data[10:20], data[20:]])
        np.testing.assert_array_equal(client.answer()["actions"], digest_policy.infer(REQUEST).actions)
        with contextlib.suppress(ConnectionClosed):  # the server may close before all is sent
            client.socket.send([b""] * 10_000)
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(timeout=20)
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
        assert open_client(handle.port).ask(REQUEST)["actions"].shape == (10, 7)


def test_more_connections_than_allowed_are_refused(digest_policy: Any, open_client: Any, wait_until: Any) -> None:
    with serve_in_thread(digest_policy, max_connections=2) as handle:
        first, second = open_client(handle.port), open_client(handle.port)
        with pytest.raises(InvalidStatus) as refused:
            open_client(handle.port)
        assert refused.value.response.status_code == 503
        assert first.ask(REQUEST)["actions"].shape == second.ask(REQUEST)["actions"].shape
        first.socket.close()

        def free() -> bool:
            try:
                return bool(open_client(handle.port).metadata)
            except InvalidStatus:
                return False

        wait_until(free)


def test_a_busy_port_is_a_clear_error(server: ServerHandle, digest_policy: Any) -> None:
    warmed = len(digest_policy.threads)
    with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{server.port}.*--port"):
        with serve_in_thread(digest_policy, port=server.port):
            pass
    assert len(digest_policy.threads) == warmed  # known before the warm-up, not after it


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host"])
def test_an_address_of_another_machine_is_a_clear_error(digest_policy: Any, host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        with serve_in_thread(digest_policy, host=host):
            pass


@pytest.mark.parametrize("option", [{"port": -1}, {"port": 70000}, {"max_waiting": 0}, {"send_timeout_s": 0.0}])
def test_an_unusable_option_is_refused(digest_policy: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PolicyServer(digest_policy, **option)


def test_an_unknown_option_is_refused(digest_policy: Any) -> None:
    with pytest.raises(TypeError, match="max_mesage_bytes"):
        PolicyServer(digest_policy, max_mesage_bytes=1)


def test_nobody_can_connect_before_the_warm_up_is_done(digest_policy: Any, open_client: Any) -> None:
    seen: queue.Queue[str] = queue.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def warmup() -> None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            seen.put("connected")
        except ConnectionRefusedError:
            seen.put("refused")

    digest_policy.warmup = warmup
    with serve_in_thread(digest_policy, port=port) as handle:
        assert seen.get_nowait() == "refused"
        assert open_client(handle.port).ask(REQUEST)["actions"].shape == (10, 7)


def test_a_failed_warm_up_is_reported_and_frees_the_port(digest_policy: Any) -> None:
    def warmup() -> None:
        raise Unsupported("no kernel for this GPU")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    good = digest_policy.warmup
    digest_policy.warmup = warmup
    with pytest.raises(Unsupported, match="no kernel"):
        with serve_in_thread(digest_policy, port=port):
            pass
    digest_policy.warmup = good
    with serve_in_thread(digest_policy, port=port) as handle:
        assert handle.port == port


def test_warm_up_and_inference_share_one_thread(gated_server: Any, gated_policy: Any, open_client: Any) -> None:
    """Captured graphs and inference mode belong to a thread."""
    gated_policy.release(4)
    for _ in range(2):
        client = open_client(gated_server.port)
        client.ask(REQUEST)
        client.ask(REQUEST)
    assert len(gated_policy.threads) == 5
    assert len(set(gated_policy.threads)) == 1
    assert gated_policy.threads[0] != threading.get_ident()


def test_a_peer_that_only_pings_and_never_reads_is_cut(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to pings are stored by the library without a bound; ours is the bound."""
    monkeypatch.setattr(BoundedConnection, "max_unsent_bytes", 64 * 1024)
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.settimeout(20)
        peer.connect(("127.0.0.1", server.port))
        peer.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        pings = (b"\x89\xfd" + bytes(4) + b"x" * 125) * 1000
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            peer.sendall(pings * 400)  # 52 MB, more than all socket buffers
