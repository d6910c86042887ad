"""What a server bounds, how it starts, and what it refuses to start with."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from vivace.errors import ConfigError, Unsupported
from vivace.serving import PolicyServer, ServerHandle, pack, serve_in_thread
from vivace.serving.session import BoundedConnection

REQUEST = {"observation/state": np.arange(7.0), "prompt": "fold the towel"}


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


def test_requests_longer_and_shorter_than_one_read_arrive_whole(
    digest_policy: Any, open_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read of a connection lands in the same memory, over what came before."""
    read: list[tuple[int, int]] = []
    updated = BoundedConnection.buffer_updated

    def seen(self: BoundedConnection, nbytes: int) -> None:
        read.append((id(self._space), nbytes))
        updated(self, nbytes)

    monkeypatch.setattr(BoundedConnection, "buffer_updated", seen)
    monkeypatch.setattr(BoundedConnection, "max_read_bytes", 30_000)
    draws = np.random.default_rng(0)
    requests = [{"image": draws.integers(0, 256, size, np.uint8)} for size in (5, 450_000, 29_000, 3_000_000, 7)]
    with serve_in_thread(digest_policy) as handle:
        client = open_client(handle.port)
        for request in requests:
            np.testing.assert_array_equal(client.ask(request)["actions"], digest_policy.infer(request).actions)
    assert len({place for place, _ in read}) == 1
    assert max(nbytes for _, nbytes in read) == 30_000
    assert sum(nbytes for _, nbytes in read) > 3_479_000


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
