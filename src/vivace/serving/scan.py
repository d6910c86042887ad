"""Checks the structure of a msgpack message before anything is built from it.

A msgpack header of five bytes may announce four billion elements, and one byte is an empty list of 56 bytes in Python: a
decoder that trusts the message turns 64 MB from the network into gigabytes. This file walks the headers once, without
building a value, and refuses what is truncated, trailing, too deep, too numerous, or not used by openpi's protocol
(extension types). What passes costs at most `max_nodes` small objects beyond the bytes of the message itself.

A request of a robot has about 40 nodes, so the walk costs some 20 microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from ..errors import ProtocolError


@dataclass(frozen=True)
class Limits:
    """What one message may contain.

    max_bytes  length of the whole message
    max_depth  maps and lists inside one another, the outermost counts 1
    max_nodes  values and keys in all; an ndarray is 9 nodes and its list of dimensions
    """

    max_bytes: int = 64 * 2**20
    max_depth: int = 32
    max_nodes: int = 20_000


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True)
class _Head:
    """What a first byte means: a body of fixed bytes, or a length of `width` bytes counting body bytes or children."""

    body: int = 0
    width: int = 0
    children_each: int = 0  # 0 scalar or text, 1 list, 2 map
    inline: int = -1  # children or body bytes written in the first byte itself


def _heads() -> tuple[_Head | None, ...]:
    """The 256 first bytes of the msgpack specification; None = not allowed here."""
    table: list[_Head | None] = [None] * 256
    for byte in (*range(0x00, 0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3):
        table[byte] = _Head()
    for low in range(16):
        table[0x80 + low] = _Head(children_each=2, inline=low)
        table[0x90 + low] = _Head(children_each=1, inline=low)
    for low in range(32):
        table[0xA0 + low] = _Head(body=low)
    for byte, body in {
        0xCA: 4,
        0xCB: 8,
        0xCC: 1,
        0xCD: 2,
        0xCE: 4,
        0xCF: 8,
        0xD0: 1,
        0xD1: 2,
        0xD2: 4,
        0xD3: 8,
    }.items():
        table[byte] = _Head(body=body)
    for byte, width in {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}.items():
        table[byte] = _Head(width=width)
    for byte, width, each in ((0xDC, 2, 1), (0xDD, 4, 1), (0xDE, 2, 2), (0xDF, 4, 2)):
        table[byte] = _Head(width=width, children_each=each)
    return tuple(table)


_HEADS: Final = _heads()
_BYTES_WIDTH: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4}
"""First byte of a byte string -> bytes that its length takes."""


def check_structure(data: bytes, limits: Limits = DEFAULT_LIMITS) -> None:
    """Raise ProtocolError unless `data` is exactly one msgpack value within `limits`. Builds nothing."""
    end = len(data)
    if end > limits.max_bytes:
        raise ProtocolError("message is too long", got=f"{end} bytes", wanted=f"at most {limits.max_bytes}")
    position = 0
    announced = 1  # values that the headers so far promise
    open_containers = [1]  # children still to come, outermost first; the message itself is the first
    while open_containers:
        if not open_containers[-1]:
            open_containers.pop()
            continue
        open_containers[-1] -= 1
        if position >= end:
            raise _truncated(position, end)
        position, children = _step(data, position)
        if position > end:
            raise _truncated(position, end)
        if children >= 0:
            announced += children
            if announced > limits.max_nodes:
                raise ProtocolError(
                    "message has too many parts",
                    got=f"{announced} or more values",
                    wanted=f"at most {limits.max_nodes} values",
                    do="send images and vectors as numpy arrays, not as lists",
                )
            open_containers.append(children)
            if len(open_containers) > limits.max_depth + 1:
                raise ProtocolError("message is nested too deeply", wanted=f"at most {limits.max_depth} levels")
    if position != end:
        raise ProtocolError("message has bytes after its end", got=f"{end - position} more", wanted="one value")


class Bytes(NamedTuple):
    """Where a byte string lies in a message: data[head:body] announces it, data[body:end] is it."""

    head: int
    body: int
    end: int


def byte_strings(data: bytes) -> list[Bytes]:
    """The byte strings, in order, of a message that `check_structure` has taken."""
    found, position = [], 0
    while position < len(data):
        head, (position, _) = position, _step(data, position)
        if width := _BYTES_WIDTH.get(data[head]):
            found.append(Bytes(head, head + 1 + width, position))
    return found


def _step(data: bytes, position: int) -> tuple[int, int]:
    """Read one head. Returns the position after it and its body, and its number of children (-1: not a container)."""
    head = _HEADS[data[position]]
    if head is None:
        raise ProtocolError(
            "message uses a msgpack type that the protocol does not have",
            got=f"byte 0x{data[position]:02x} at {position}",
            wanted="nil, bool, int, float, str, bytes, list or map",
        )
    position += 1
    if head.inline >= 0:
        return position, head.inline * head.children_each
    if not head.width:
        return position + head.body, -1
    length = int.from_bytes(data[position : position + head.width], "big")
    if position + head.width > len(data):
        raise _truncated(position + head.width, len(data))
    position += head.width
    if head.children_each:
        return position, length * head.children_each
    return position + length, -1


def _truncated(wanted: int, end: int) -> ProtocolError:
    return ProtocolError("message ends too early", got=f"{end} bytes", wanted=f"at least {max(wanted, end + 1)}")
