"""Many clients at once: right answers, a fair line, and nobody who can hold up the others."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from vivace.serving import ServerHandle, pack, serve_in_thread


def request_of(client: int, number: int) -> dict[str, Any]:
    return {"name": f"{client}.{number}", "observation/state": np.full(7, client * 1000.0 + number), "prompt": "go"}


def test_2000_requests_of_20_clients_equal_the_serial_answers(
    server: ServerHandle, digest_policy: Any, open_client: Any, counted: Any
) -> None:
    clients = [open_client(server.port) for _ in range(20)]
    together = threading.Barrier(20)

    def drive(index: int) -> list[Any]:
        together.wait(timeout=20)
        return [clients[index].ask(request_of(index, number))["actions"] for number in range(100)]

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(drive, range(20)))
    for index, mine in enumerate(answers):
        for number, actions in enumerate(mine):
            np.testing.assert_array_equal(actions, digest_policy.infer(request_of(index, number)).actions)
    assert counted(server.port, "vivace_requests_total") == 2000


def test_the_line_is_fair(gated_server: ServerHandle, gated_policy: Any, open_client: Any, wait_until: Any) -> None:
    """Three clients always want more. The order of service is theirs in turn, whoever asks how often."""
    clients = {name: open_client(gated_server.port) for name in "abc"}
    for waiting, (name, client) in enumerate(clients.items()):
        client.send({"name": name})
        wait_until(lambda waiting=waiting: gated_policy.started.qsize() == 1 and gated_server.waiting == waiting)
    served = []
    for _ in range(30):
        name = gated_policy.next_started()
        served.append(name)
        gated_policy.release()
        assert clients[name].answer()["actions"].shape == (10, 7)
        clients[name].send({"name": name})  # at once again
        wait_until(lambda: gated_policy.started.qsize() == 1 and gated_server.waiting == 2)
    assert served == list("abc" * 10)


def test_a_client_that_sends_ahead_does_not_overtake(
    gated_server: ServerHandle, gated_policy: Any, open_client: Any, wait_until: Any
) -> None:
    greedy, modest = open_client(gated_server.port), open_client(gated_server.port)
    for _ in range(4):
        greedy.send({"name": "greedy"})
    assert gated_policy.next_started() == "greedy"
    modest.send({"name": "modest"})
    wait_until(lambda: gated_server.waiting == 1)  # the modest one; the greedy one's others are not in line yet
    gated_policy.release(5)
    assert modest.answer()["actions"].shape == (10, 7)
    order = [gated_policy.next_started() for _ in range(4)]
    assert order == ["modest", "greedy", "greedy", "greedy"]
    for _ in range(4):
        greedy.answer()


def test_a_full_line_is_an_error_of_its_own_connection(gated_policy: Any, open_client: Any, wait_until: Any) -> None:
    with serve_in_thread(gated_policy, max_waiting=1) as handle:
        running, waiting, refused = (open_client(handle.port) for _ in range(3))
        running.send({"name": "running"})
        assert gated_policy.next_started() == "running"
        waiting.send({"name": "waiting"})
        wait_until(lambda: handle.waiting == 1)
        refused.send({"name": "refused"})
        text = refused.socket.recv(timeout=20)
        assert text.startswith("Overloaded: ")
        gated_policy.release(2)
        assert running.answer()["actions"].shape == waiting.answer()["actions"].shape


def test_a_client_that_leaves_the_line_is_not_computed(
    gated_server: ServerHandle, gated_policy: Any, open_client: Any, wait_until: Any, counted: Any
) -> None:
    first, dead, left, last = (open_client(gated_server.port) for _ in range(4))
    first.send({"name": "first"})
    assert gated_policy.next_started() == "first"
    for waiting, (client, name) in enumerate(((dead, "dead"), (left, "left"), (last, "last")), start=1):
        client.send({"name": name})
        wait_until(lambda waiting=waiting: gated_server.waiting == waiting)
    dead.abort()
    wait_until(lambda: gated_server.waiting == 2)
    left.socket.close()
    wait_until(lambda: gated_server.waiting == 1)
    gated_policy.release(2)
    first.answer()
    last.answer()
    assert gated_policy.next_started() == "last"
    assert gated_policy.started.empty()
    assert counted(gated_server.port, 'vivace_lost_connections_total{reason="left_in_line"}') == 2


def test_a_client_that_dies_while_it_is_served(
    gated_server: ServerHandle, gated_policy: Any, open_client: Any, wait_until: Any, counted: Any
) -> None:
    dead, alive = open_client(gated_server.port), open_client(gated_server.port)
    dead.send({"name": "dead"})
    assert gated_policy.next_started() == "dead"
    dead.abort()
    name = 'vivace_lost_connections_total{reason="left_while_running"}'
    wait_until(lambda: counted(gated_server.port, name) == 1)
    gated_policy.release(2)
    assert alive.ask({"name": "alive"})["actions"].shape == (10, 7)
    assert counted(gated_server.port, "vivace_connections") == 1


def test_pings_and_handshakes_are_answered_during_a_long_inference(
    gated_server: ServerHandle, gated_policy: Any, open_client: Any, http_get: Any
) -> None:
    client = open_client(gated_server.port)
    client.send({"name": "long"})
    assert gated_policy.next_started() == "long"
    assert client.socket.ping().wait(timeout=20)
    assert open_client(gated_server.port).metadata
    assert http_get(gated_server.port, "/healthz")[2] == b"OK\n"
    gated_policy.release()
    assert client.answer()["actions"].shape == (10, 7)


def test_keepalive_survives_an_inference_longer_than_its_timeout(
    gated_policy: Any, open_client: Any, wait_until: Any
) -> None:
    """openpi's server, blocked in its event loop, loses its clients here."""
    with serve_in_thread(gated_policy, ping_interval_s=0.1) as handle:
        client = open_client(handle.port)
        client.send({"name": "long"})
        assert gated_policy.next_started() == "long"
        threading.Event().wait(0.5)  # five keepalive rounds; the only wait for time in this file
        gated_policy.release()
        assert client.answer()["actions"].shape == (10, 7)


class NeverReads:
    """A client that asks and asks and never reads an answer."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )

    def send(self, request: Any) -> None:
        data = pack(request)
        assert len(data) < 126
        self.socket.sendall(bytes([0x82, 0x80 | len(data)]) + bytes(4) + data)

    def rest_bytes(self) -> int:
        """What still arrives before the connection ends."""
        total = 0
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(2**20):
                total += len(data)
        return total


def test_a_client_that_never_reads_holds_up_nobody(
    digest_policy: Any, open_client: Any, wait_until: Any, counted: Any
) -> None:
    digest_policy.shape = (4000, 256)  # 8 MB per answer: more than the socket buffers between us take
    with serve_in_thread(digest_policy, send_timeout_s=3.0) as handle:
        slow, fast = NeverReads(handle.port), open_client(handle.port)
        for _ in range(4):
            slow.send({"name": "slow"})
        wait_until(lambda: counted(handle.port, "vivace_sent_bytes_total") > 0)
        for number in range(5):
            actions = fast.ask(request_of(0, number))["actions"]
            np.testing.assert_array_equal(actions, digest_policy.infer(request_of(0, number)).actions)
        wait_until(lambda: counted(handle.port, 'vivace_lost_connections_total{reason="slow_reader"}') == 1)
        wait_until(lambda: counted(handle.port, "vivace_connections") == 1)
        assert fast.ask(request_of(1, 1))["actions"].shape == (4000, 256)
        assert slow.rest_bytes() < 4000 * 256 * 8  # cut in the middle of its answer, which is not kept for it
        slow.socket.close()


def test_a_stop_answers_what_is_in_flight(gated_policy: Any, open_client: Any, wait_until: Any, counted: Any) -> None:
    with serve_in_thread(gated_policy) as handle:
        running, waiting, idle = (open_client(handle.port) for _ in range(3))
        running.send({"name": "running"})
        assert gated_policy.next_started() == "running"
        waiting.send({"name": "waiting"})
        wait_until(lambda: handle.waiting == 1)
        stopping = threading.Thread(target=handle.stop)
        stopping.start()
        with pytest.raises(ConnectionClosed) as closed:
            idle.socket.recv(timeout=20)
        assert closed.value.rcvd.code == 1001
        with pytest.raises(OSError):
            open_client(handle.port)
        gated_policy.release(2)
        for client, name in ((running, "running"), (waiting, "waiting")):
            wanted = super(type(gated_policy), gated_policy).infer({"name": name}).actions
            np.testing.assert_array_equal(client.answer()["actions"], wanted)
            with pytest.raises(ConnectionClosed) as closed:
                client.socket.recv(timeout=20)
            assert closed.value.rcvd.code == 1001
        stopping.join(20)
        assert not stopping.is_alive()
        handle.stop()  # again: nothing to do


def test_a_stop_does_not_wait_for_ever(gated_policy: Any, open_client: Any) -> None:
    with serve_in_thread(gated_policy, shutdown_grace_s=0.2) as handle:
        stuck = open_client(handle.port)
        stuck.send({"name": "stuck"})
        assert gated_policy.next_started() == "stuck"
        handle.stop()
        with pytest.raises(ConnectionClosed):
            stuck.socket.recv(timeout=20)


def test_a_silent_client_is_noticed(digest_policy: Any, wait_until: Any, counted: Any) -> None:
    """A robot that lost its network sends nothing, not even a goodbye: only unanswered pings tell."""
    with serve_in_thread(digest_policy, ping_interval_s=0.1, send_timeout_s=0.5) as handle:
        silent = NeverReads(handle.port)
        wait_until(lambda: counted(handle.port, "vivace_connections") == 1)
        wait_until(lambda: counted(handle.port, "vivace_connections") == 0)
        silent.socket.close()
