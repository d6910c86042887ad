"""Policies made for server tests: one that answers at once, one whose answers the test releases one by one."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from vivace.config import ResolvedEngine
from vivace.serving import ServerHandle, pack, serve_in_thread, unpack
from vivace.types import ActionChunk

WAIT_S = 20.0  # a bound for what must happen, never a measure of how fast


class DigestPolicy:
    """Deterministic and stateless: actions are a function of every byte of the request."""

    def __init__(self, *, shape: tuple[int, int] = (10, 7)) -> None:
        self.shape = shape
        self.metadata: Mapping[str, Any] = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}
        self.threads: list[int] = []
        self.engine = ResolvedEngine(
            backend="eager",
            device="cpu",
            precision="float32",
            num_denoise_steps=10,
            seed=0,
            checkpoint="/nowhere",
            policy_kind="pi05",
            horizon=shape[0],
            action_dim=shape[1],
            flavour="openpi_torch",
            version="0",
            details={"buckets": (16, 32)},
        )

    def infer(self, request: Mapping[str, Any], /) -> ActionChunk:
        if "raise" in request:
            raise ValueError(request["raise"])
        seed = int.from_bytes(hashlib.sha256(pack(dict(request))).digest()[:8], "big")
        actions = np.random.default_rng(seed).standard_normal(self.shape)
        milliseconds = {"total": 9.0, "preprocess": 1.0, "vision": 2.0, "prefix": 3.0, "denoise": 1.5}
        return ActionChunk(actions, np.zeros((1, 32), np.float32), None, 20.0, milliseconds, self.engine)

    def warmup(self) -> None:
        self.threads.append(threading.get_ident())


class GatedPolicy(DigestPolicy):
    """Starts a request when it comes, answers it when the test calls `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.started: queue.Queue[Any] = queue.Queue()
        self._permits = threading.Semaphore(0)

    def infer(self, request: Mapping[str, Any], /) -> ActionChunk:
        self.threads.append(threading.get_ident())
        self.started.put(request.get("name"))
        if not self._permits.acquire(timeout=WAIT_S):
            raise TimeoutError("the test released nobody")
        return super().infer(request)

    def release(self, count: int = 1) -> None:
        self._permits.release(count)

    def next_started(self) -> Any:
        return self.started.get(timeout=WAIT_S)


@pytest.fixture
def digest_policy() -> DigestPolicy:
    return DigestPolicy()


@pytest.fixture
def gated_policy() -> Iterator[GatedPolicy]:
    policy = GatedPolicy()
    yield policy
    policy.release(1000)  # nothing stays blocked when a test fails


@pytest.fixture
def server(digest_policy: DigestPolicy) -> Iterator[ServerHandle]:
    with serve_in_thread(digest_policy) as handle:
        yield handle


@pytest.fixture
def gated_server(gated_policy: GatedPolicy) -> Iterator[ServerHandle]:
    with serve_in_thread(gated_policy) as handle:
        yield handle
        gated_policy.release(1000)


class Client:
    """A raw websocket client: what is on the wire, nothing hidden."""

    def __init__(self, port: int, **options: Any) -> None:
        opening = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, proxy=None, **options)
        self.socket: ClientConnection = opening.__enter__()
        self.metadata = unpack(self._recv_bytes())

    def _recv_bytes(self) -> bytes:
        data = self.socket.recv(timeout=WAIT_S)
        assert isinstance(data, bytes), data
        return data

    def ask(self, request: Any) -> dict[str, Any]:
        self.send(request)
        return self.answer()

    def send(self, request: Any) -> None:
        self.socket.send(pack(request))

    def answer(self) -> dict[str, Any]:
        result = unpack(self._recv_bytes())
        assert isinstance(result, dict)
        return result

    def abort(self) -> None:
        """Vanish as a robot whose power is cut would, but with a reset so that the kernel tells the server at once."""
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.socket.shutdown(socket.SHUT_RD)
        self.socket.socket.close()


@pytest.fixture
def open_client() -> Iterator[Callable[..., Client]]:
    with contextlib.ExitStack() as stack:

        def open_(port: int, **options: Any) -> Client:
            client = Client(port, **options)
            stack.callback(client.socket.close)
            return client

        yield open_


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "did not happen"
            time.sleep(0.002)

    return wait


@pytest.fixture
def http_get() -> Callable[..., tuple[int, dict[str, str], bytes]]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(port: int, path: str, headers: Mapping[str, str] = {}) -> tuple[int, dict[str, str], bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=dict(headers))
        try:
            with opener.open(request, timeout=WAIT_S) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    return get


@pytest.fixture
def counted(http_get: Callable[..., Any]) -> Callable[[int, str], float]:
    """Value of one line of /metrics; 0 when the line is not there yet."""

    def value(port: int, name: str) -> float:
        lines = http_get(port, "/metrics")[2].decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)

    return value


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A test of bounds must itself be bounded."""

    def too_long(number: int, frame: Any) -> None:
        raise TimeoutError("the test hangs")

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
