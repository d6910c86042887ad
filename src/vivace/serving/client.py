"""A robot's side of the connection, with the methods of openpi's client and less on the way.

>>> with PolicyClient("127.0.0.1", 8000) as client:
...     actions = client.infer({"observation/image": ..., "observation/state": ..., "prompt": "fold the towel"})["actions"]

Any openpi client works with vivace's server. This one is faster by what a general websocket client does with half a
megabyte of pictures: it copies them once, into memory that it keeps, and no second thread has to wake for the answer.
So nothing answers the server's pings between two requests: after some 40 s without one the server closes the connection,
and the next request opens a new one. Connects directly, never through a proxy of the environment. Needs numpy, msgpack and
websockets, no torch.
"""

from __future__ import annotations

import logging
import math
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidURI
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from ..errors import ConfigError, ProtocolError, ServerError
from .protocol import KEPT_BYTES, Piece, PiecePacker, unpack

log = logging.getLogger(__name__)

PORT: Final = 8000
READ_BYTES: Final = 2**16
"""Taken from the socket at a time; an answer has some 3 KB."""
RETRY_S: Final = 0.25
GOODBYE_S: Final = 0.2
"""For a close frame that the server does not take."""
DATA: Final = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)
_PAYLOAD: Final = 16
"""Where the payload begins in a frame's memory: behind the longest head, where words of four bytes begin."""


class PolicyClient:
    """Asks one policy server; not from two threads at once.

    Args:
        host: name or address, or a whole ws:// address.
        port: None = what the address says, else 8000.
        api_key: what the server was started with.
        connect_s: how long to try while nobody listens; a server listens when its policy is warm. Later, when a connection
            is gone, it is opened again at the next request, with one try.
        answer_s: how long an answer may take.

    Raises ConfigError for an argument that cannot be used, ServerError when there is no server or it refuses.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = None,
        api_key: str | None = None,
        *,
        connect_s: float = 120.0,
        answer_s: float = 60.0,
    ) -> None:
        if not (math.isfinite(connect_s) and connect_s >= 0 and math.isfinite(answer_s) and answer_s > 0):
            raise ConfigError(
                "times cannot be used", got=f"connect_s={connect_s}, answer_s={answer_s}", wanted="finite seconds"
            )
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("api key cannot be used", wanted="printable ASCII", do="check where it was read from")
        self._address, self._api_key, self._answer_s = _address(host, port), api_key, answer_s
        self._packer = PiecePacker()
        self._metadata: dict[str, Any] = {}
        self._wire: _Wire | None = self._open(patience_s=connect_s)

    def get_server_metadata(self) -> dict[str, Any]:
        """What the server said when it was connected to, last: of the robot, and under "vivace" what runs."""
        return self._metadata

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """Actions for one observation; see the server's guide for both dicts. Arrays are read-only.

        Raises ProtocolError for what cannot be sent, ServerError with the server's words where it refused, and when it is
        gone or too late; the next call then opens a new connection.
        """
        wire = self._connected()  # first: what is sent is read from the arrays at one time, not before and after a wait
        message = self._packer.pieces(dict(obs))
        try:
            wire.send(message)
            answer = wire.receive()
        except BaseException:  # an answer that comes later would be taken for the next one's
            self._wire = None
            wire.cut()
            raise
        if isinstance(answer, str):
            self.close()
            raise ServerError("the policy server refused the request", got=answer)
        return _map(answer)

    def reset(self) -> None:
        """Nothing: the server keeps nothing between requests."""

    def close(self) -> None:
        """Close the connection. A later `infer` opens a new one."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

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
        if self._wire is None or not self._wire.alive():
            self.close()
            self._wire = self._open(patience_s=0.0)
        return self._wire

    def _open(self, *, patience_s: float) -> _Wire:
        """A connection whose greeting was read, tried for so long."""
        end, told = time.monotonic() + patience_s, False
        while True:
            try:
                wire = _Wire(self._address, api_key=self._api_key, answer_s=self._answer_s)
                try:
                    greeting = wire.receive()
                    if isinstance(greeting, str):
                        raise ServerError("the policy server greets with text", got=greeting[:200])
                    self._metadata = _map(greeting)
                except BaseException:
                    wire.cut()
                    raise
                return wire
            except socket.gaierror as error:
                raise ServerError(f"no machine behind {self._address}", got=str(error), do="check the name") from error
            except (OSError, ServerGone) as error:  # gone: a tunnel takes connections before its far end listens
                if time.monotonic() + RETRY_S > end:
                    within = f" within {patience_s:g} s" if patience_s else ""
                    raise ServerError(
                        f"no policy server at {self._address}{within}", got=str(error), do="start `vivace serve`"
                    ) from error
                if not told:
                    log.info("waiting for %s: %s", self._address, error)
                    told = True
                time.sleep(RETRY_S)


class ServerGone(ServerError):
    """The connection ended, or nothing came in time."""


class _Wire:
    """One websocket. The library speaks its protocol; requests are framed here."""

    def __init__(self, address: str, *, api_key: str | None, answer_s: float) -> None:
        uri = parse_uri(address)
        self._address, self._answer_s = address, answer_s
        self._memory = bytearray()  # of the last frame that was sent
        self._events: deque[Any] = deque()
        self._protocol = ClientProtocol(uri, max_size=None)
        self._socket = socket.create_connection((uri.host, uri.port), timeout=answer_s)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._shake_hands(api_key)
        except BaseException:
            self._socket.close()
            raise

    def _shake_hands(self, api_key: str | None) -> None:
        request, end = self._protocol.connect(), time.monotonic() + self._answer_s
        if api_key:
            request.headers["Authorization"] = f"Api-Key {api_key}"
        self._protocol.send_request(request)
        self._flush()
        more = True
        while more and not self._events and self._protocol.handshake_exc is None:
            more = self._read(end)
        told = self._events.popleft() if self._events else None  # a first frame may have come with it
        if isinstance(told, Response) and self._protocol.handshake_exc is None:
            return
        if isinstance(told, Response):
            words = (told.body or b"").decode(errors="replace").strip()
            raise ServerError("the policy server refuses the connection", got=f"HTTP {told.status_code} {words}")
        if not more:
            raise self._gone(None)
        raise ServerError("no policy server there", got=str(self._protocol.handshake_exc), wanted=self._address)

    def send(self, message: Sequence[Piece]) -> None:
        """One binary frame, masked in memory that is kept, and sent at once: every piece would wake the server."""
        key, length = secrets.token_bytes(4), sum(len(piece) for piece in message)
        needed = _PAYLOAD + length + 3  # whole words of four bytes
        memory = self._memory if len(self._memory) >= needed else bytearray(needed)
        self._memory = memory if needed <= KEPT_BYTES else self._memory
        head = _head(length) + key
        frame, begin, end = memoryview(memory), _PAYLOAD - len(head), _PAYLOAD
        frame[begin:end] = head
        for piece in message:
            frame[end : end + len(piece)] = piece
            end += len(piece)
        words = np.frombuffer(memory, "=u4", (length + 3) // 4, _PAYLOAD)
        np.bitwise_xor(words, np.frombuffer(key, "=u4"), out=words)
        self._socket.settimeout(self._answer_s)
        try:
            self._socket.sendall(frame[begin:end])
        except OSError as error:
            self.alive()  # takes in the reason, if the server gave one
            raise self._gone(error) from error

    def receive(self) -> bytes | str:
        """The next message. Pings do not stop the clock: a server sends them also while its policy hangs."""
        end = time.monotonic() + self._answer_s
        fragments: list[Frame] = []
        while not fragments or not fragments[-1].fin:
            frame = self._frame(end)
            if frame.opcode in DATA:
                fragments.append(frame)
        data = bytes(fragments[0].data) if len(fragments) == 1 else b"".join(one.data for one in fragments)
        return data.decode(errors="replace") if fragments[0].opcode is Opcode.TEXT else data

    def alive(self) -> bool:
        """Whether the server still holds the connection, and said nothing unasked; answers its pings."""
        try:
            while self._protocol.state is State.OPEN and self._read(None):
                pass
        except BlockingIOError:
            pass
        except ServerGone:
            return False
        unasked = any(one.opcode in DATA for one in self._events)
        self._events.clear()
        return self._protocol.state is State.OPEN and not unasked

    def close(self) -> None:
        """Say so and leave."""
        try:
            if self._protocol.state is State.OPEN:
                self._socket.settimeout(GOODBYE_S)
                self._protocol.send_close(1000)
                self._flush()
        except (OSError, ServerGone) as error:
            log.debug("%s was gone already: %s", self._address, error)
        finally:
            self._socket.close()

    def cut(self) -> None:
        """Leave without a word: in the middle of a message there is nothing to say."""
        self._socket.close()

    def _frame(self, end: float) -> Frame:
        """The next frame; waits until `end` if none has come."""
        while not self._events:
            if self._protocol.state is not State.OPEN or not self._read(end):
                raise self._gone(None)
        frame: Frame = self._events.popleft()
        return frame

    def _read(self, end: float | None) -> bool:
        """Take in what the server sent, and answer pings. Returns whether more may come.

        Raises ServerGone when the connection broke or `end` has come; BlockingIOError if nothing is there and end is None.
        """
        self._socket.settimeout(0.0 if end is None else max(end - time.monotonic(), 1e-3))
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._gone(error) from error
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        self._events += self._protocol.events_received()
        self._socket.settimeout(self._answer_s)
        self._flush()
        return bool(data)

    def _flush(self) -> None:
        try:
            for data in self._protocol.data_to_send():
                if data:
                    self._socket.sendall(data)
        except OSError as error:
            raise self._gone(error) from error

    def _gone(self, error: OSError | None) -> ServerGone:
        closed, broken = self._protocol.close_rcvd, self._protocol.parser_exc
        if closed is not None:
            why = f"{closed.code} {closed.reason}"
        elif isinstance(error, TimeoutError):
            return ServerGone(f"the policy server did not answer within {self._answer_s:g} s", got=self._address)
        else:
            why = str(error or broken or "end of stream")
        return ServerGone("the policy server closed the connection", got=why, do="see the server's log")


def _map(message: bytes) -> dict[str, Any]:
    value = unpack(message, limits=None)
    if not isinstance(value, dict):
        raise ProtocolError("the policy server's message is not a map", got=type(value).__name__, wanted="a dict")
    return value


def _address(host: str, port: int | None) -> str:
    """The whole address of a server. Raises ConfigError for one that is none, or has two ports."""
    address = host if "://" in host else f"ws://[{host}]" if host.count(":") > 1 else f"ws://{host}"
    try:
        parts = urlsplit(address)
        if parts.username or parts.password:
            raise ConfigError("policy server's address holds a name or a password", do="pass api_key instead")
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


def _head(length: int) -> bytes:
    """First bytes of a masked binary frame of one piece (RFC 6455, 5.2), its mask left out."""
    if length < 126:
        return struct.pack("!BB", 0x82, 0x80 | length)
    if length < 2**16:
        return struct.pack("!BBH", 0x82, 0x80 | 126, length)
    return struct.pack("!BBQ", 0x82, 0x80 | 127, length)
