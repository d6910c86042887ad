"""openpi's message encoding: msgpack, in which a numpy array is a map with four keys of type bytes.

    ndarray       {b"__ndarray__": True, b"data": C-order bytes, b"dtype": "<f4", b"shape": [2, 3]}
    numpy scalar  {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}

`pack` writes the bytes that openpi writes. `unpack` reads what openpi reads, and refuses everything else by name: a peer's
bytes never choose how much memory is taken, which code runs, or how deep a recursion goes. There is no pickle anywhere.

Decoded arrays are read-only views of the message: copy one before writing into it.
Source: openpi packages/openpi-client msgpack_numpy; bytes checked against the golden folder `websocket`.
"""

from __future__ import annotations

import math
import re
import secrets
import struct
import threading
from typing import Any, Final

import msgpack
import numpy as np

from ..errors import ProtocolError
from .scan import DEFAULT_LIMITS, Limits, check_structure

ARRAY_KEYS: Final = frozenset((b"__ndarray__", b"data", b"dtype", b"shape"))
SCALAR_KEYS: Final = frozenset((b"__npgeneric__", b"data", b"dtype"))
REJECTED_KINDS: Final = "VOc"  # structures, Python objects, complex numbers: openpi rejects them too
MAX_DIMENSIONS: Final = 32
MAX_ELEMENTS: Final = 2**31

# dtype.str, or a plain name such as "float32" as peers in other languages write it. Excludes "f4,f4", "(2,)f4", "O".
_DTYPE = re.compile(r"[<>|=]?[A-Za-z][A-Za-z0-9]{0,15}(\[[0-9]{0,6}[A-Za-z]{1,2}\])?")


def pack(value: Any) -> bytes:
    """Encode a Python value; arrays and numpy scalars anywhere inside it.

    Raises ProtocolError for complex, structured and object arrays and for types that msgpack does not have.
    """
    try:
        message: bytes = _PACKERS.mine.pack(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise _cannot_be_sent(error) from error
    return message


LONG_BYTES: Final = 2**12
"""Arrays from this size on are not copied by `PiecePacker`."""
KEPT_LAYOUTS: Final = 64
KEPT_BYTES: Final = 8 * 2**20
"""What is kept for the next message is no longer than this."""
Piece = bytes | memoryview


class PiecePacker:
    """`pack` without a copy of long arrays; one message at a time.

    A long array is packed with a mark for its bytes, and the message is cut at the marks: the encoder's own loop is a
    few times faster than one over the request in Python, whose code no cache holds after a robot's pause.
    """

    def __init__(self) -> None:
        self._packer = msgpack.Packer(default=self._encode)
        self._token = secrets.token_bytes(16)
        self._mark = _binary_head(len(self._token)) + self._token
        self._layouts: dict[Any, dict[bytes, Any]] = {}
        self._long: list[Piece] = []

    def pieces(self, value: Any) -> list[Piece]:
        """What `pack` returns, in pieces: long arrays are views of the caller's memory. Raises as `pack`."""
        try:
            packed = self._packer.pack(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise _cannot_be_sent(error) from error
        finally:
            views, self._long = self._long, []
        if len(packed) > KEPT_BYTES:  # its memory does not shrink
            self._packer = msgpack.Packer(default=self._encode)
        between = packed.split(self._mark)
        if len(between) != len(views) + 1:  # the caller's own bytes hold the mark
            return [packed] if not views else [pack(value)]
        found: list[Piece] = []
        for before, view in zip(between, views, strict=False):
            found += [before + _binary_head(len(view)), view]
        return [*found, between[-1]]

    def _encode(self, value: Any) -> Any:
        """`_encode` of this module, with the mark for the bytes of a long array."""
        if type(value) is not np.ndarray or value.nbytes < LONG_BYTES or not value.flags.c_contiguous:
            return _encode(value)
        layout = self._layouts.get((value.dtype, value.shape))
        if layout is None:
            if len(self._layouts) >= KEPT_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[value.dtype, value.shape] = {**_encode(value), b"data": self._token}
        self._long.append(_bytes_of(value))
        return layout


def _binary_head(length: int) -> bytes:
    """First bytes of a msgpack byte string."""
    if length < 2**8:
        return struct.pack(">BB", 0xC4, length)
    return struct.pack(">BH", 0xC5, length) if length < 2**16 else struct.pack(">BI", 0xC6, length)


def _cannot_be_sent(error: Exception) -> ProtocolError:
    return ProtocolError("value cannot be sent", got=str(error), wanted="numbers, text, lists, dicts, arrays")


def unpack(data: bytes, *, limits: Limits | None = DEFAULT_LIMITS) -> Any:
    """Decode one message. Arrays are read-only, numpy scalars come back as numpy scalars.

    limits  None = from a peer that may take as much memory as it likes: a robot's own server
    Raises  ProtocolError for anything that is not exactly one well-formed value within `limits`.
    """
    if limits is not None:
        check_structure(data, limits)
    try:
        return msgpack.unpackb(data, object_pairs_hook=_decode_map, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ProtocolError("message cannot be decoded", got=str(error), wanted="openpi's msgpack encoding") from error


def _encode(value: Any) -> Any:
    """msgpack's hook for types it does not know."""
    if isinstance(value, np.ndarray):
        _check_kind(value.dtype)
        return {b"__ndarray__": True, b"data": _bytes_of(value), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        _check_kind(value.dtype)
        if value.dtype.kind in "mM" or isinstance(value, np.longdouble):
            raise ProtocolError("numpy scalar cannot be sent", got=str(value.dtype), wanted="a number, bool or text")
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__}")


def _bytes_of(value: np.ndarray[Any, np.dtype[Any]]) -> bytes | memoryview:
    """C-order bytes; of an array that is stored so, without a copy."""
    if not value.flags.c_contiguous or not value.nbytes or type(value) is not np.ndarray:
        return value.tobytes()  # subclasses (masked arrays, say) have their own idea of a view
    return value.reshape(-1).view(np.uint8).data


class _Packers(threading.local):
    """One packer per thread; it keeps its buffer, so that no request asks the system for half a megabyte again."""

    def __init__(self) -> None:
        self.mine = msgpack.Packer(default=_encode)


_PACKERS: Final = _Packers()


def _decode_map(pairs: list[tuple[Any, Any]]) -> Any:
    """msgpack's hook for every map: an array, a scalar, or the dict itself."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ProtocolError("map has the same key twice", got=f"{len(pairs)} keys, {len(fields)} different")
    if b"__ndarray__" in fields:
        return _decode_array(fields)
    if b"__npgeneric__" in fields:
        return decode_scalar(fields)
    return fields


def _decode_array(fields: dict[Any, Any]) -> np.ndarray[Any, np.dtype[Any]]:
    if fields.keys() != ARRAY_KEYS or fields[b"__ndarray__"] is not True:
        raise ProtocolError("array has other fields than the encoding", got=_names(fields), wanted=sorted(ARRAY_KEYS))
    dtype, shape, data = dtype_of(fields[b"dtype"]), _shape(fields[b"shape"]), fields[b"data"]
    if type(data) is not bytes:
        raise ProtocolError("array data has the wrong type", got=type(data).__name__, wanted="bytes")
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise ProtocolError(
            f"array data does not fill its shape {list(shape)} of {dtype.str}",
            got=f"{len(data)} bytes",
            wanted=f"{wanted} bytes",
        )
    if dtype.kind == "b" and data.translate(None, b"\x00\x01"):
        raise ProtocolError("boolean array has other bytes than 0 and 1")
    return np.ndarray(shape, dtype=dtype, buffer=data)


def decode_scalar(fields: dict[Any, Any]) -> np.generic:
    """The numpy scalar of a decoded map, or ProtocolError."""
    if fields.keys() != SCALAR_KEYS or fields[b"__npgeneric__"] is not True:
        raise ProtocolError("scalar has other fields than the encoding", got=_names(fields), wanted=sorted(SCALAR_KEYS))
    dtype, value = dtype_of(fields[b"dtype"]), fields[b"data"]
    allowed: dict[str, tuple[type, ...]] = {
        "b": (bool,),
        "i": (int,),
        "u": (int,),
        "f": (float, int),
        "U": (str,),
        "S": (bytes,),
    }
    if type(value) not in allowed.get(dtype.kind, ()):
        raise ProtocolError("scalar does not fit its dtype", got=f"{type(value).__name__} as {dtype.str}")
    with np.errstate(over="ignore"):  # 1e300 as float32 is infinite, as in openpi; int overflow raises
        scalar: np.generic = dtype.type(value)
    return scalar


def dtype_of(name: Any) -> np.dtype[Any]:
    """The dtype of a wire name, or ProtocolError."""
    if type(name) is not str or not _DTYPE.fullmatch(name):
        raise ProtocolError("unknown dtype", got=repr(name)[:60], wanted='a numpy dtype such as "<f4"')
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError, Warning) as error:  # a warning where the caller made them errors
        raise ProtocolError("unknown dtype", got=repr(name)[:60], wanted='a numpy dtype such as "<f4"') from error
    _check_kind(dtype)
    if not dtype.itemsize:
        raise ProtocolError("dtype has no size", got=repr(name)[:60], wanted='a numpy dtype such as "<f4"')
    return dtype


def _check_kind(dtype: np.dtype[Any]) -> None:
    if dtype.kind in REJECTED_KINDS or dtype.hasobject:
        raise ProtocolError("dtype cannot be sent", got=str(dtype), wanted="bool, int, float or text")


def _shape(value: Any) -> tuple[int, ...]:
    """The dimensions of a wire list, or ProtocolError."""
    if type(value) is not list or len(value) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in value):
        raise ProtocolError("array has no usable shape", got=repr(value)[:60], wanted="a list of sizes")
    if math.prod(max(n, 1) for n in value) > MAX_ELEMENTS:
        raise ProtocolError("array is too large", got=repr(value)[:60], wanted=f"at most {MAX_ELEMENTS} elements")
    return tuple(value)


def _names(fields: dict[Any, Any]) -> str:
    return repr(sorted(map(repr, fields)))[:200]
