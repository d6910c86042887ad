"""The structural check: it agrees with msgpack on what is well formed, and its bounds hold where msgpack has none."""

from __future__ import annotations

import random
import tracemalloc

import msgpack
import pytest

from vivace.errors import ProtocolError
from vivace.serving.scan import Limits, check_structure

WIDE = Limits(max_bytes=10**6, max_depth=500, max_nodes=10**6)


def accepted(data: bytes, limits: Limits = WIDE) -> bool:
    try:
        check_structure(data, limits)
    except ProtocolError:
        return False
    return True


def well_formed(data: bytes) -> bool:
    """msgpack's own opinion of the structure alone."""
    try:
        msgpack.unpackb(data, strict_map_key=False, unicode_errors="surrogateescape", object_pairs_hook=lambda pairs: 0)
    except (ValueError, msgpack.UnpackException):
        return False
    return True


EXTENSIONS = {0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8}


def test_every_first_byte_is_judged_as_msgpack_judges_it() -> None:
    agreed = 0
    for first in sorted(set(range(256)) - EXTENSIONS):
        for tail in (
            b"",
            b"\x00",
            b"\x00\x00",
            b"\x01\xc0",
            b"\x00\x01\xc0",
            b"\x00\x00\x00\x01\xc0",
            bytes(4),
            bytes(8),
        ):
            data = bytes([first]) + tail
            assert accepted(data) == well_formed(data), data
            agreed += accepted(data)
    assert agreed > 200  # both outcomes were seen


def test_random_messages_are_judged_as_msgpack_judges_them() -> None:
    rng = random.Random(7)
    heads = bytes(sorted(set(range(256)) - EXTENSIONS))
    seen = {True: 0, False: 0}
    for _ in range(20_000):
        data = bytes(rng.choices(heads, k=rng.randrange(1, 12)))
        if rng.random() < 0.7:  # short headers and plain children: most of these are well formed
            data = bytes([0x90 + rng.randrange(4)]) + bytes(
                rng.choices(b"\x00\xc0\x90\x80\xa0\x91\x81", k=rng.randrange(6))
            )
        if any(byte in EXTENSIONS for byte in data):
            continue
        assert accepted(data) == well_formed(data), data
        seen[accepted(data)] += 1
    assert min(seen.values()) > 1000, seen


@pytest.mark.parametrize("first", sorted(EXTENSIONS | {0xC1}))
def test_extension_types_are_not_part_of_the_protocol(first: int) -> None:
    with pytest.raises(ProtocolError, match="does not have"):
        check_structure(bytes([first]) + bytes(20))


def test_depth_is_bounded_exactly() -> None:
    limits = Limits(max_depth=5)
    assert accepted(b"\x91" * 5 + b"\xc0", limits)
    assert not accepted(b"\x91" * 6 + b"\xc0", limits)
    assert not accepted(b"\x81\xa1a" * 6 + b"\xc0", limits)
    with pytest.raises(ProtocolError, match="nested too deeply"):
        check_structure(b"\x91" * 1_000_000 + b"\xc0")


def test_number_of_values_is_bounded_exactly() -> None:
    limits = Limits(max_nodes=10)
    assert accepted(msgpack.packb([None] * 9), limits)
    assert not accepted(msgpack.packb([None] * 10), limits)
    assert not accepted(msgpack.packb([[None] * 3] * 3), limits)
    assert accepted(msgpack.packb({str(i): 0 for i in range(4)}), limits)
    assert not accepted(msgpack.packb({str(i): 0 for i in range(5)}), limits)


def test_size_is_bounded_exactly() -> None:
    assert accepted(b"\xc4\x03abc", Limits(max_bytes=5))
    assert not accepted(b"\xc4\x03abc", Limits(max_bytes=4))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        (b"\xdd\x00\xff\xff\xff" * 30) + b"\xc0" * 1_000_000,
        b"\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000,
        b"\xdd\x00\x0f\x42\x40" + b"\x80" * 1_000_000,
        b"\x91" * 1_000_000,
    ],
    ids=lambda bomb: bomb[:8].hex(),
)
def test_a_bomb_is_refused_without_taking_memory(bomb: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        check_structure(bomb)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20
