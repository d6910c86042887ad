"""A robot's side of the connection, with the methods of openpi's client and less on the way.

>>> with PolicyClient("127.0.0.1", 8000) as client:
...     actions = client.infer({"observation/image": ..., "observation/state": ..., "prompt": "fold the towel"})["actions"]

Any openpi client works with vivace's server. This one is faster by what a general websocket client does with half a
megabyte of pictures: it packs and masks them into memory that it keeps, and no second thread has to wake for the answer.
So nothing answers the server's pings between two requests: after some 40 s without one the server closes the connection,
and the next request opens a new one. Needs numpy, msgpack and websockets, no torch.
"""

from __future__ import annotations

import logging
import secrets
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidURI
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri
from websockets.utils import apply_mask

from ..errors import ConfigError, ServerError
from .protocol import packed, unpack

log = logging.getLogger(__name__)

_WORDS_BEGIN: Final = 16
"""Where the payload begins in a frame's memory: behind the longest head, where words of four bytes begin."""
READ: Final = 2**16
RETRY_S: Final = 0.25
PORT: Final = 8000
DATA: Final = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)


class PolicyClient:
    """Asks one policy server; not from two threads at once.

    Args:
        host: name or address, or a whole ws:// address.
        port: None = what the address says, else 8000.
        api_key: what the server was started with.
        connect_s: how long to try while nobody listens; a server listens when its policy is warm.
        answer_s: how long an answer may take.

    Raises ConfigError for an address that cannot be used, ServerError when there is no server or it refuses.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = None,
        *,
        api_key: str | None = None,
        connect_s: float = 120.0,
        answer_s: float = 60.0,
    ) -> None:
        self._address = _address(host, port)
        self._api_key, self._connect_s, self._answer_s = api_key, connect_s, answer_s
        self._wire: _Wire | None = None
        self._metadata: dict[str, Any] = {}
        self._connected()

    def get_server_metadata(self) -> dict[str, Any]:
        """What the server said when it was connected to, last: of the robot, and under "vivace" what runs."""
        return self._metadata

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """Actions for one observation; see the server's guide for both dicts. Arrays are read-only.

        Raises ProtocolError for what cannot be sent, ServerError with the server's words where it refused; the
        next call then opens a new connection.
        """
        with packed(dict(obs)) as message:
            wire = self._connected()
            try:
                wire.send(message)
                answer = wire.receive()
            except BaseException:  # an answer that comes later would be taken for the next one's
                self.close()
                raise
        if isinstance(answer, str):
            self.close()
            raise ServerError("the policy server refused the request", got=answer)
        result: dict[str, Any] = unpack(answer, limits=None)
        return result

    def reset(self) -> None:
        """Nothing: the server keeps nothing between requests."""

    def close(self) -> None:
        """Close the connection. A later `infer` opens a new one."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def __enter__(self) -> Self:
        """This client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _connected(self) -> _Wire:
        """The connection, opened if there is none or the server has left it."""
        if self._wire is not None and self._wire.alive():
            return self._wire
        self.close()
        wire = _patiently(self._address, api_key=self._api_key, connect_s=self._connect_s, answer_s=self._answer_s)
        try:
            greeting = wire.receive()
            if isinstance(greeting, str):
                raise ServerError("the policy server greets with text", got=greeting[:200], wanted="its metadata")
            self._metadata = unpack(greeting, limits=None)
        except BaseException:
            wire.close()
            raise
        self._wire = wire
        return wire


class _Wire:
    """One websocket. The library speaks its protocol; requests are framed here, piece by piece."""

    def __init__(self, address: str, *, api_key: str | None, connect_s: float, answer_s: float) -> None:
        uri = parse_uri(address)
        self._address, self._answer_s = address, answer_s
        self._sent = np.empty(0, np.uint8)  # memory of the last frame
        self._events: deque[Any] = deque()
        self._protocol = ClientProtocol(uri, max_size=None)
        self._socket = socket.create_connection((uri.host, uri.port), timeout=max(connect_s, 0.1))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(answer_s)
            self._shake_hands(api_key)
        except BaseException:
            self._socket.close()
            raise

    def _shake_hands(self, api_key: str | None) -> None:
        request = self._protocol.connect()
        if api_key is not None:
            request.headers["Authorization"] = f"Api-Key {api_key}"
        self._protocol.send_request(request)
        self._flush()
        while not (events := self._protocol.events_received()) and self._protocol.handshake_exc is None:
            self._read()
        if self._protocol.handshake_exc is None:
            self._events = deque(events[1:])  # without the response; a server's first frame may have come with it
            return
        told = events[0] if events else None
        if isinstance(told, Response):
            words = (told.body or b"").decode(errors="replace").strip()
            raise ServerError("the policy server refuses the connection", got=f"HTTP {told.status_code} {words}")
        raise ServerError("no policy server there", got=str(self._protocol.handshake_exc), wanted=self._address)

    def send(self, message: memoryview) -> None:
        """One binary frame, masked into memory that is kept, and sent at once: every piece would wake the server."""
        key = secrets.token_bytes(4)
        head = _head(len(message)) + key
        end = _WORDS_BEGIN + len(message)
        if len(self._sent) < end:
            self._sent = np.empty(end, np.uint8)
        begin = _WORDS_BEGIN - len(head)
        frame = self._sent
        frame[begin:_WORDS_BEGIN] = np.frombuffer(head, np.uint8)
        words = len(message) // 4
        np.bitwise_xor(
            np.frombuffer(message, "=u4", words), np.frombuffer(key, "=u4"),
            out=frame[_WORDS_BEGIN : _WORDS_BEGIN + 4 * words].view("=u4"),
        )  # fmt: skip
        frame[_WORDS_BEGIN + 4 * words : end] = np.frombuffer(apply_mask(message[4 * words :], key), np.uint8)
        self._socket.settimeout(self._answer_s)
        try:
            self._socket.sendall(frame[begin:end].data)
        except OSError as error:
            self.alive()  # takes in the reason, if the server gave one
            raise self._lost(error) from error

    def receive(self) -> bytes | str:
        """The next message. Pings do not stop the clock: a server sends them also while its policy hangs."""
        end = time.monotonic() + self._answer_s
        fragments: list[Frame] = []
        while not fragments or not fragments[-1].fin:
            frame = self._frame(end)
            if frame.opcode in DATA:
                fragments.append(frame)
        data = fragments[0].data if len(fragments) == 1 else b"".join(one.data for one in fragments)
        return bytes(data).decode() if fragments[0].opcode is Opcode.TEXT else bytes(data)

    def alive(self) -> bool:
        """Whether the server still holds the connection, and said nothing unasked; answers its pings."""
        try:
            while self._protocol.state is State.OPEN and select.select([self._socket], [], [], 0)[0]:
                self._read()
                self._events += self._protocol.events_received()
        except ServerError:
            return False
        unasked = any(one.opcode in DATA for one in self._events)
        self._events.clear()
        return self._protocol.state is State.OPEN and not unasked

    def close(self) -> None:
        """Say so and leave."""
        try:
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(1000)
                self._flush()
        except (OSError, ServerError) as error:
            log.debug("%s was gone already: %s", self._address, error)
        self._socket.close()

    def _frame(self, end: float) -> Frame:
        """The next frame; waits until `end` if none has come."""
        while not self._events:
            self._socket.settimeout(max(end - time.monotonic(), 1e-3))
            self._read()
            self._events += self._protocol.events_received()
        frame: Frame = self._events.popleft()
        return frame

    def _read(self) -> None:
        """Take in what the server sent, and answer pings."""
        try:
            data = self._socket.recv(READ)
        except OSError as error:
            raise self._lost(error) from error
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        self._flush()
        if not data:
            raise self._lost(None)

    def _flush(self) -> None:
        try:
            for data in self._protocol.data_to_send():
                if data:
                    self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError | None) -> ServerError:
        if isinstance(error, TimeoutError):
            return ServerError(f"the policy server did not answer within {self._answer_s:g} s", got=self._address)
        closed = self._protocol.close_rcvd
        why = f"{closed.code} {closed.reason}" if closed is not None else str(error or "end of stream")
        return ServerError("the policy server closed the connection", got=why, do="see the server's log")


def _address(host: str, port: int | None) -> str:
    """The whole address of a server. Raises ConfigError for one that is none, or has two ports."""
    address = host if "://" in host else f"ws://[{host}]" if host.count(":") > 1 else f"ws://{host}"
    try:
        parts = urlsplit(address)
        if parts.port is None:
            parts = parts._replace(netloc=f"{parts.netloc}:{PORT if port is None else port}")
        elif port is not None:
            raise ValueError(f"and port {port}")
        uri = parse_uri(urlunsplit(parts))
    except (InvalidURI, ValueError) as error:
        raise ConfigError(
            "policy server's address cannot be used", got=f"{address}: {error}", wanted="ws://host:port"
        ) from error
    if uri.secure:
        raise ConfigError(
            "this client speaks no TLS", got=address, wanted="ws://", do="use openpi's client, or a tunnel"
        )
    return urlunsplit(parts)


def _patiently(address: str, *, api_key: str | None, connect_s: float, answer_s: float) -> _Wire:
    """A connection, as soon as somebody listens."""
    end, told = time.monotonic() + connect_s, False
    while True:
        left = end - time.monotonic()
        try:
            return _Wire(address, api_key=api_key, connect_s=left, answer_s=answer_s)
        except OSError as error:
            if left <= RETRY_S:
                raise ServerError(
                    f"no policy server at {address} within {connect_s:g} s", got=str(error), do="start `vivace serve`"
                ) from error
            if not told:
                log.info("waiting for %s: %s", address, error)
                told = True
            time.sleep(RETRY_S)
        except InvalidHandshake as error:
            raise ServerError("no policy server there", got=str(error), wanted=address) from error


def _head(length: int) -> bytes:
    """First bytes of a masked binary frame of one piece (RFC 6455, 5.2), its mask left out."""
    if length < 126:
        return struct.pack("!BB", 0x82, 0x80 | length)
    if length < 2**16:
        return struct.pack("!BBH", 0x82, 0x80 | 126, length)
    return struct.pack("!BBQ", 0x82, 0x80 | 127, length)
