"""Decodes the requests of one robot, which differ in their pixels and numbers and in nothing else.

A request whose bytes outside its arrays are those of the one before has its structure, so its arrays lie where they lay
there: nothing is decoded. On a processor that just waited for a GPU that is 60 us instead of 240 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import msgpack
import numpy as np

from .protocol import decode_scalar, dtype_of, unpack
from .scan import Bytes, Limits, byte_strings

_EXTENSION: Final = b"\xd6\x01"
"""Head and type of an extension value of four bytes. No peer can write one: the scan refuses the type."""


LONGEST_PATIENCE: Final = 1024
"""Messages until the next try, where no layout was of use."""
MAX_STRUCTURE_BYTES: Final = 16 * 2**10
"""Outside of arrays, of a message whose structure is remembered; robots' requests have some 500."""


@dataclass(frozen=True)
class _Array:
    """An array of a message: data[begin : begin + its bytes]."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class _Layout:
    """What messages of one structure share.

    length   of a message
    between  (begin, bytes) of everything that is no array's data
    value    the message, with an `_Array` in place of every array
    """

    length: int
    between: tuple[tuple[int, bytes], ...]
    value: Any

    def fits(self, data: bytes) -> bool:
        """Whether `data` is this message but for the data of its arrays."""
        return len(data) == self.length and all(data.startswith(piece, begin) for begin, piece in self.between)


class Decoder:
    """`protocol.unpack` with a memory of the last structure. Same values, same errors."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._length = -1
        self._alike = 0  # messages of that length in a row, after the first
        self._patience = 1
        self._layout: _Layout | None = None
        self._used = False

    def __call__(self, data: bytes) -> Any:
        """Decode one message; see `protocol.unpack`."""
        if self._layout is not None and self._layout.fits(data):
            self._used, self._patience = True, 1
            return _filled(self._layout.value, data)
        value = unpack(data, limits=self._limits)
        self._learn(data)
        return value

    def _learn(self, data: bytes) -> None:
        """Make a layout of the second message of a length; later where none was of use.

        A prompt or a number that changes with every request makes every layout useless, and each costs what decoding does.
        """
        if self._layout is not None and not self._used:
            self._patience = min(2 * self._patience, LONGEST_PATIENCE)
        self._alike = self._alike + 1 if len(data) == self._length else 0
        self._length, self._layout, self._used = len(data), None, False
        if self._alike >= self._patience:
            self._layout, self._alike = _layout_of(data, byte_strings(data)), 0


def _filled(value: Any, data: bytes) -> Any:
    """A value of its own for every message: containers are not shared."""
    if type(value) is _Array:
        array = np.ndarray(value.shape, dtype=value.dtype, buffer=data, offset=value.begin)
        return array if array.flags.aligned else _aligned(array)
    if type(value) is dict:
        return {key: _filled(one, data) for key, one in value.items()}
    if type(value) is list:
        return [_filled(one, data) for one in value]
    return value


def _aligned(array: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """A copy: numbers that begin anywhere in a message are not what other libraries expect. Pixels are never copied."""
    copied = array.copy()
    copied.flags.writeable = False
    return copied


class _NoLayout(Exception):
    """The message has parts whose bytes decide whether it is well formed, or bytes where one would not look for them."""


def _layout_of(data: bytes, strings: Sequence[Bytes]) -> _Layout | None:
    """The layout of a message that `unpack` has taken; None if it has none."""
    # an array's data come behind their name; what else does so is no part of an array, and then there is no layout
    bodies = [two for one, two in pairwise(strings) if one.end == two.head and data[one.body : one.end] == b"data"]
    pieces, between, position, arrays = [], [], 0, 0
    for index, one in enumerate(bodies):
        pieces += [data[position : one.head], _EXTENSION, index.to_bytes(4, "big")]
        between.append((position, data[position : one.body]))
        position = one.end
    between.append((position, data[position:]))
    if sum(len(piece) for _, piece in between) > MAX_STRUCTURE_BYTES:  # what a client chose is not kept for it
        return None

    def of_map(pairs: list[tuple[Any, Any]]) -> Any:
        nonlocal arrays
        fields = dict(pairs)
        if b"__npgeneric__" in fields:
            if type(fields[b"data"]) is Bytes:
                raise _NoLayout
            return decode_scalar(fields)
        if b"__ndarray__" not in fields:
            return fields
        dtype, body = dtype_of(fields[b"dtype"]), fields[b"data"]
        if type(body) is not Bytes or dtype.kind == "b":  # every byte of a boolean has to be looked at
            raise _NoLayout
        arrays += 1
        return _Array(dtype, tuple(fields[b"shape"]), body.body)

    def of_extension(_: int, index: bytes) -> Bytes:
        return bodies[int.from_bytes(index, "big")]

    try:
        value = msgpack.unpackb(
            b"".join([*pieces, data[position:]]), object_pairs_hook=of_map, ext_hook=of_extension, strict_map_key=True
        )
    except (_NoLayout, ValueError):  # ValueError: a body where a key belongs
        return None
    return _Layout(len(data), tuple(between), value) if arrays == len(bodies) else None
