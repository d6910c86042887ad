"""vivace's client for robots: answers, errors, and what happens when the server is late, busy or gone."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection, serve

from vivace.errors import ConfigError, ProtocolError, ServerError
from vivace.serving import pack, serve_in_thread, unpack
from vivace.serving.client import PolicyClient, ServerGone, _Wire


@contextmanager
def answering(handler: Callable[[ServerConnection], None]) -> Iterator[int]:
    """A server of the library's own kind; yields its port."""
    with serve(handler, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.socket.getsockname()[1]
        server.shutdown()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 60, 61, 62, 63, 65_460, 65_461, 65_462, 65_463, 450_000, 3_000_001])
def test_frames_of_every_length_arrive_whole(digest_policy: Any, size: int) -> None:
    """Heads of three lengths, and words of four bytes with zero to three left over."""
    requests = [
        {"image": np.random.default_rng(seed).integers(0, 256, size + more, np.uint8)}
        for seed, more in enumerate((0, 4, 0))
    ]
    with serve_in_thread(digest_policy) as handle, PolicyClient(port=handle.port) as client:
        for request in requests:
            np.testing.assert_array_equal(client.infer(request)["actions"], digest_policy.infer(request).actions)


@pytest.mark.parametrize("size", [4096, 8191, 50_001])
def test_pictures_behind_names_of_every_length_arrive_whole(digest_policy: Any, size: int) -> None:
    """Each begins at another byte of the mask."""
    drawn = np.random.default_rng(size)
    pictures = {"x" * n: drawn.integers(0, 256, size, np.uint8) for n in (1, 2, 3, 4, 6)}
    with serve_in_thread(digest_policy) as handle, PolicyClient(port=handle.port) as client:
        for request in (pictures, {"images": pictures, "state": np.zeros(7)}):
            np.testing.assert_array_equal(client.infer(request)["actions"], digest_policy.infer(request).actions)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # openpi's use of its websocket library
def test_the_answer_is_what_openpis_client_gets(digest_policy: Any, openpi_module: Callable[[str], Any]) -> None:
    theirs_class = openpi_module("websocket_client_policy").WebsocketClientPolicy
    request = {"observation/image": np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "prompt": "push"}
    with serve_in_thread(digest_policy) as handle, PolicyClient("127.0.0.1", handle.port) as ours:
        theirs = theirs_class("127.0.0.1", handle.port)
        assert ours.get_server_metadata() == theirs.get_server_metadata()
        one, two = ours.infer(request), theirs.infer(request)
        theirs._ws.close()
    assert one.keys() == two.keys()
    np.testing.assert_array_equal(one["actions"], two["actions"])
    assert one["actions"].dtype == two["actions"].dtype
    assert not one["actions"].flags.writeable


def test_a_refused_request_says_why_and_the_next_one_is_answered(digest_policy: Any) -> None:
    with serve_in_thread(digest_policy) as handle, PolicyClient(port=handle.port) as client:
        with pytest.raises(ServerError, match="refused the request; got ValueError: no such arm"):
            client.infer({"raise": "no such arm"})
        np.testing.assert_array_equal(client.infer({"n": 1})["actions"], digest_policy.infer({"n": 1}).actions)


def test_what_cannot_be_sent_leaves_the_connection_as_it_was(digest_policy: Any) -> None:
    with serve_in_thread(digest_policy) as handle, PolicyClient(port=handle.port) as client:
        wire = client._wire
        with pytest.raises(ProtocolError, match="cannot be sent"):
            client.infer({"image": np.zeros(200_000, np.uint8), "what": {1, 2}})
        client.infer({"n": 1})
        assert client._wire is wire


def test_pings_are_answered_between_requests(digest_policy: Any) -> None:
    with serve_in_thread(digest_policy, ping_interval_s=0.5) as handle, PolicyClient(port=handle.port) as client:
        wire, end = client._wire, time.monotonic() + 2.5
        while time.monotonic() < end:
            client.infer({})
            time.sleep(0.05)
        assert client._wire is wire


def test_a_connection_that_the_server_closed_is_opened_again(digest_policy: Any, wait_until: Any, counted: Any) -> None:
    """A robot that stood still for longer than the server waits for its pong."""
    hasty = {"ping_interval_s": 0.2, "send_timeout_s": 0.3}
    with serve_in_thread(digest_policy, **hasty) as handle, PolicyClient(port=handle.port) as client:
        wire = client._wire
        wait_until(lambda: counted(handle.port, "vivace_connections") == 0)
        assert client.infer({"n": 2})["actions"].shape == (10, 7)
        assert client._wire is not wire


@contextmanager
def asking(port: int) -> Iterator[list[Any]]:
    """A client that waits for its server beside the block, and asks once; the list holds its actions after the block."""
    found: list[Any] = []

    def ask() -> None:
        with PolicyClient(port=port, connect_s=20) as client:
            found.append(client.infer({"n": 3})["actions"])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield found
    thread.join(20)


def test_it_waits_for_a_server_that_starts_later(digest_policy: Any) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    with ExitStack() as stack:
        with asking(port) as found:
            time.sleep(0.6)
            stack.enter_context(serve_in_thread(digest_policy, port=port))
        np.testing.assert_array_equal(found, [digest_policy.infer({"n": 3}).actions])


def test_nobody_there_is_an_error_after_the_time_given() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match=r"no policy server at ws://127.0.0.1:\d+ within 0.3 s.*vivace serve"):
            PolicyClient(port=reserved.getsockname()[1], connect_s=0.3)


def test_a_key_is_sent_and_a_wrong_one_is_refused(digest_policy: Any) -> None:
    with serve_in_thread(digest_policy, api_key="secret") as handle:
        with PolicyClient(port=handle.port, api_key="secret") as client:
            assert client.infer({})["actions"].shape == (10, 7)
        for key in ("wrong", None):
            with pytest.raises(ServerError, match="refuses the connection; got HTTP 401 wanted the header"):
                PolicyClient(port=handle.port, api_key=key)


def test_a_late_answer_is_never_taken_for_the_next_one(gated_policy: Any) -> None:
    with serve_in_thread(gated_policy) as handle, PolicyClient(port=handle.port, answer_s=1.5) as client:
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"did not answer within 1\.5 s"):
            client.infer({"name": "first"})
        assert 1.4 < time.monotonic() - began < 2 * 1.5
        gated_policy.release(2)
        second = client.infer({"name": "second"})
    expected = super(type(gated_policy), gated_policy).infer({"name": "second"}).actions
    np.testing.assert_array_equal(second["actions"], expected)


def late(pieces: Iterable[Any]) -> Iterator[Any]:
    """Each in a packet of its own."""
    for piece in pieces:
        yield piece
        time.sleep(0.02)


def test_fragments_and_pings_between_them_are_one_answer() -> None:
    answer = pack({"actions": np.arange(6.0).reshape(2, 3)})

    def handler(connection: ServerConnection) -> None:
        connection.send(pack({"robot": "made up"}))
        for _ in connection:
            connection.send(late([answer[:5], answer[5:6], b"", answer[6:]]))
            connection.ping()

    with answering(handler) as port, PolicyClient(port=port) as client:
        assert client.get_server_metadata() == {"robot": "made up"}
        for _ in range(3):
            np.testing.assert_array_equal(client.infer({})["actions"], unpack(answer)["actions"])


def test_a_server_that_closes_instead_of_answering_says_why() -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(pack({}))
        connection.recv()
        connection.close(1013, "robot is in maintenance")

    with answering(handler) as port, PolicyClient(port=port) as client:
        with pytest.raises(ServerError, match="closed the connection; got 1013 robot is in maintenance"):
            client.infer({})
        assert client._wire is None


def test_a_greeting_of_text_is_no_policy_server() -> None:
    with (
        answering(lambda connection: connection.send("hello")) as port,
        pytest.raises(ServerError, match="greets with text; got hello"),
    ):
        PolicyClient(port=port)


def test_something_else_that_listens_is_no_policy_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            peer, _ = other.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"220 mail.example ESMTP\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ServerError, match="no policy server there"):
            PolicyClient(port=other.getsockname()[1], connect_s=5)


@pytest.mark.parametrize(
    ("host", "port", "why"),
    [
        ("wss://127.0.0.1", 1, "speaks no TLS"),
        ("http://127.0.0.1", 1, "cannot be used"),
        ("ws://", None, "cannot be used"),
        ("127.0.0.1:1", 2, "cannot be used.*and port 2"),
        ("127.0.0.1:port", None, "cannot be used"),
        ("127.0.0.1", 70_000, "cannot be used"),
    ],
)
def test_addresses_that_cannot_be_used(host: str, port: int | None, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        PolicyClient(host, port, connect_s=0.1)


def test_a_server_is_named_in_every_usual_way(digest_policy: Any) -> None:
    with serve_in_thread(digest_policy) as handle:
        for host, port in (
            ("127.0.0.1", handle.port), (f"127.0.0.1:{handle.port}", None), (handle.url, None),
            ("ws://127.0.0.1", handle.port),
        ):  # fmt: skip
            with PolicyClient(host, port) as client:
                assert client.infer({})["actions"].shape == (10, 7)
    for host, whole in (
        ("::1", r"ws://\[::1\]:8000"), ("localhost", "ws://localhost:8000"), ("ws://[::1]/x", r"ws://\[::1\]:8000/x"),
    ):  # fmt: skip
        with pytest.raises(ServerError, match=f"no policy server at {whole}; got"):
            PolicyClient(host, connect_s=0.0)


def test_what_a_server_says_unasked_is_no_answer(digest_policy: Any) -> None:
    """Data between two requests: whose they are cannot be known, so the connection is opened anew."""
    told, opened = threading.Event(), []

    def handler(connection: ServerConnection) -> None:
        opened.append(connection)
        connection.send(pack({}))
        for message in connection:
            connection.send(pack({"actions": np.array([[unpack(bytes(message))["n"]]])}))
            connection.send(pack({"actions": np.array([[-1]])}))
            told.set()

    with answering(handler) as port, PolicyClient(port=port) as client:
        for n in range(3):
            told.clear()
            assert client.infer({"n": n})["actions"] == n
            assert told.wait(10)
            time.sleep(0.05)  # on its way
    assert len(opened) == 3


def test_the_time_for_an_answer_runs_on_while_the_server_sends_pings(gated_policy: Any) -> None:
    with (
        serve_in_thread(gated_policy, ping_interval_s=0.2) as handle,
        PolicyClient(port=handle.port, answer_s=1.0) as client,
        pytest.raises(ServerGone, match="did not answer within 1 s"),
    ):
        client.infer({})


def test_an_interrupt_before_the_greeting_leaves_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its greeting would be taken for the next answer."""

    def handler(connection: ServerConnection) -> None:
        connection.send(pack({"robot": "made up"}))
        for _ in connection:
            connection.send(pack({"actions": np.zeros((1, 1))}))

    with answering(handler) as port, PolicyClient(port=port) as client:
        client.close()
        receive = _Wire.receive
        monkeypatch.setattr(_Wire, "receive", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            client.infer({})
        monkeypatch.setattr(_Wire, "receive", receive)
        assert client.infer({})["actions"].shape == (1, 1)


def test_an_interrupt_while_it_waits_leaves_no_answer_behind(
    digest_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_in_thread(digest_policy) as handle, PolicyClient(port=handle.port) as client:
        receive = _Wire.receive
        monkeypatch.setattr(_Wire, "receive", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            client.infer({"n": 1})
        monkeypatch.setattr(_Wire, "receive", receive)
        np.testing.assert_array_equal(client.infer({"n": 2})["actions"], digest_policy.infer({"n": 2}).actions)


def test_long_answers_and_texts_in_fragments() -> None:
    long = {"actions": np.zeros((700, 500))}

    def handler(connection: ServerConnection) -> None:
        connection.send(pack({}))
        connection.recv()
        connection.send(pack(long))
        connection.recv()
        connection.send(late(["ObservationError: no ", "state"]))

    with answering(handler) as port, PolicyClient(port=port) as client:
        np.testing.assert_array_equal(client.infer({})["actions"], long["actions"])
        with pytest.raises(ServerError, match="refused the request; got ObservationError: no state"):
            client.infer({})


def test_what_was_wrong_with_a_request_that_was_not_read_to_its_end(digest_policy: Any) -> None:
    image = np.zeros(30_000_000, np.uint8)
    with serve_in_thread(digest_policy, max_message_bytes=10_000) as handle, PolicyClient(port=handle.port) as client:
        with pytest.raises(ServerError, match="closed the connection; got 1009"):
            client.infer({"image": image})
        assert client.infer({})["actions"].shape == (10, 7)


@contextmanager
def speaking(then: Callable[[socket.socket], None]) -> Iterator[int]:
    """A bare socket that shakes hands, greets, and then does what `then` says; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            peer, _ = listening.accept()
            with peer:
                protocol = ServerProtocol()
                while not (events := protocol.events_received()):
                    protocol.receive_data(peer.recv(4096))
                protocol.send_response(protocol.accept(events[0]))
                protocol.send_binary(pack({}))
                for data in protocol.data_to_send():
                    peer.sendall(data)
                then(peer)

        threading.Thread(target=answer, daemon=True).start()
        yield listening.getsockname()[1]


SORRY = b"\x88\x07\x03\xf3sorry"  # a close frame with code 1011


def test_a_close_frame_is_an_answer_though_the_connection_stays_open() -> None:
    left = threading.Event()

    def then(peer: socket.socket) -> None:
        peer.recv(4096)
        peer.sendall(SORRY)
        left.wait(60)

    with speaking(then) as port, PolicyClient(port=port, answer_s=30) as client:
        began = time.monotonic()
        with pytest.raises(ServerError, match="closed the connection; got 1011 sorry"):
            client.infer({})
        assert time.monotonic() - began < 15
        left.set()


def test_a_server_that_leaves_while_a_request_is_on_its_way_says_why() -> None:
    def then(peer: socket.socket) -> None:
        peer.recv(4096)
        peer.sendall(SORRY)  # and leaves with the rest unread: a reset

    with (
        speaking(then) as port,
        PolicyClient(port=port) as client,
        pytest.raises(ServerError, match="closed the connection; got 1011 sorry"),
    ):
        client.infer({"image": np.zeros(60_000_000, np.uint8)})


def test_an_answer_that_is_no_map_is_refused() -> None:
    def handler(connection: ServerConnection) -> None:
        connection.send(pack({}))
        for _ in connection:
            connection.send(pack([1, 2]))

    with answering(handler) as port, PolicyClient(port=port) as client, pytest.raises(ProtocolError, match="not a map"):
        client.infer({})


def test_an_idle_client_does_not_keep_a_server_from_stopping(digest_policy: Any) -> None:
    with serve_in_thread(digest_policy) as handle:
        with PolicyClient(port=handle.port) as client:
            client.infer({})
            began = time.monotonic()
            handle.stop()
            assert time.monotonic() - began < 5, "not the ten seconds that a client has to take its answer"
            with pytest.raises(ServerError, match=r"no policy server at ws://127\.0\.0\.1:\d+; got .*refused"):
                client.infer({})
        assert time.monotonic() - began < 20, "one try: a robot that lost its server is told"


def test_a_tunnel_that_takes_connections_before_the_server_listens(digest_policy: Any) -> None:
    far = socket.create_server(("127.0.0.1", 0))
    port = far.getsockname()[1]

    def refuse() -> None:
        for _ in range(2):
            peer, _ = far.accept()
            peer.close()
        far.close()

    refusing = threading.Thread(target=refuse, daemon=True)
    refusing.start()
    with ExitStack() as stack:
        with asking(port) as found:
            refusing.join(20)
            stack.enter_context(serve_in_thread(digest_policy, port=port))
        np.testing.assert_array_equal(found, [digest_policy.infer({"n": 3}).actions])


def test_a_refusal_in_http_is_told_without_its_length() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            peer, _ = other.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\nnot from here")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ServerError, match="refuses the connection; got HTTP 403 not from here"):
            PolicyClient(port=other.getsockname()[1], connect_s=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"connect_s": float("inf")}, {"connect_s": -1.0}, {"answer_s": 0.0}, {"answer_s": float("nan")},
        {"api_key": "schl\u00fcssel"}, {"api_key": "two\nlines"}, {"host": "ws://robot:schl\u00fcssel@127.0.0.1"},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_cannot_be_used_are_refused_and_a_key_is_not_printed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        PolicyClient(**{"connect_s": 0.0, **wrong})
    assert "schl" not in str(refused.value)
    assert "lines" not in str(refused.value)


def test_a_name_that_no_machine_has_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(ServerError, match=r"no machine behind ws://no-such-robot\.invalid:8000"):
        PolicyClient("no-such-robot.invalid")


def test_memory_of_a_huge_request_is_given_back(digest_policy: Any) -> None:
    with serve_in_thread(digest_policy) as handle, PolicyClient(port=handle.port) as client:
        for size in (100_000, 200_000, 9_000_000, 1000):
            client.infer({"image": np.zeros(size, np.uint8)})
        assert client._wire is not None
        assert 200_000 < len(client._wire._memory) < 300_000


def test_a_robot_needs_no_torch() -> None:
    code = "import sys, vivace.serving.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
