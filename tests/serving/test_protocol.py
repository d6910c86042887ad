"""The message encoding: golden bytes, equality with openpi's own package, and every malformed map refused by name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vivace.errors import ProtocolError
from vivace.serving import protocol
from vivace.serving.protocol import PiecePacker, pack, unpack


@pytest.fixture(scope="session")
def theirs(openpi_module: Any) -> Any:
    """openpi's own encoding."""
    return openpi_module("msgpack_numpy")


GOLDEN_ARRAY = bytes.fromhex(
    "81a16184c40b5f5f6e6461727261795f5fc3c40464617461c40c000000000000803f00000040c4056474797065a33c6634c40573686170659103"
)
GOLDEN_SCALAR = bytes.fromhex("83c40d5f5f6e7067656e657269635f5fc3c40464617461cb3ff8000000000000c4056474797065a33c6634")


def test_golden_bytes() -> None:
    assert pack({"a": np.arange(3, dtype=np.float32)}) == GOLDEN_ARRAY
    assert pack(np.float32(1.5)) == GOLDEN_SCALAR


dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.unicode_string_dtypes(min_len=1, max_len=4),
)
arrays = dtypes.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary(), arrays
)
scalars = st.sampled_from([np.float32(1.5), np.bool_(True), np.uint8(255), np.int64(-3), np.float16(0.5), np.str_("x")])
values = st.recursive(
    leaves | scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(value=values)
def test_same_bytes_and_same_values_as_openpi(theirs: Any, value: Any) -> None:
    data = pack(value)
    assert data == theirs.packb(value)
    ours = unpack(data)
    assert theirs.packb(ours) == pack(ours) == theirs.packb(theirs.unpackb(data))


@settings(max_examples=300, deadline=None)
@given(value=values, long_bytes=st.sampled_from([1, 9, 33]))
def test_pieces_are_the_same_bytes(value: Any, long_bytes: int) -> None:
    with mock.patch.object(protocol, "LONG_BYTES", long_bytes):
        assert b"".join(PiecePacker().pieces(value)) == pack(value)


@pytest.mark.parametrize("size", [4095, 4096, 65_535, 65_536, 150_528])
def test_pieces_of_long_arrays_are_not_copies(size: int) -> None:
    long, turned = np.arange(size, dtype=np.uint8), np.zeros((90, 80), np.uint8).T
    request = {"images": {"left": long, "turned": turned}, "list": [[long]], "same": long}
    packer = PiecePacker()
    for _ in range(2):
        cut = packer.pieces(request)
        assert b"".join(cut) == pack(request)
        views = [piece for piece in cut if isinstance(piece, memoryview)]
        assert len(views) == (3 if size >= protocol.LONG_BYTES else 0)
        assert all(np.shares_memory(np.frombuffer(view, np.uint8), long) for view in views)


def test_a_caller_whose_bytes_look_like_the_mark_is_understood() -> None:
    packer = PiecePacker()
    request = {"image": np.arange(5000), "odd": packer._token, "more": np.zeros(5000)}
    assert b"".join(packer.pieces(request)) == pack(request)


def test_memory_of_a_huge_message_is_given_back() -> None:
    packer = PiecePacker()
    before = packer._packer
    for request, kept in (({"a": "x" * 10_000}, True), ({"a": np.zeros((3000, 3001), np.uint8).T}, False)):
        assert b"".join(packer.pieces(request)) == pack(request)
        assert (packer._packer is before) == kept
    assert packer._long == []


def test_arrays_of_ever_new_shapes_are_not_remembered_for_ever() -> None:
    packer = PiecePacker()
    for size in range(5000, 5000 + 3 * protocol.KEPT_LAYOUTS):
        request = {"cloud": np.zeros(size, np.uint8)}
        assert b"".join(packer.pieces(request)) == pack(request)
        assert len(packer._layouts) <= protocol.KEPT_LAYOUTS


def test_what_cannot_be_sent_is_refused_in_pieces_too() -> None:
    endless: dict[str, Any] = {"a": np.zeros(5000)}
    endless["b"] = endless
    packer = PiecePacker()
    for wrong in (endless, {"a": np.zeros(5000), "b": object()}, {"a": np.zeros(5000, np.complex64)}, {"\ud800": 1}):
        with pytest.raises(ProtocolError, match="sent"):
            packer.pieces(wrong)
        assert b"".join(packer.pieces({"a": np.arange(3, dtype=np.float32)})) == GOLDEN_ARRAY


def test_other_memory_orders_travel_in_c_order(theirs: Any) -> None:
    array = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    for view in (np.asfortranarray(array), array.transpose(2, 0, 1), array[:, ::-1, ::2], array[1, 2, 3, ...]):
        back = unpack(pack(view))
        assert back.dtype.str == ">i2"
        np.testing.assert_array_equal(back, view)
        assert pack(view) == theirs.packb(view)


def test_decoded_arrays_are_read_only_views_of_the_message() -> None:
    array = unpack(GOLDEN_ARRAY)["a"]
    assert not array.flags.writeable
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(2, np.complex64),
        np.complex64(1),
        np.array([None], dtype=object),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, "V4"),
        np.datetime64("2020-01-01"),
        np.longdouble(1),
        1j,
        {1, 2},
        ...,  # any object that msgpack does not know
        2**64,
        "\ud800",
        {"deep": [...]},
    ],
    ids=repr,
)
def test_what_cannot_be_sent_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError):
        pack(value)


def test_a_list_inside_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ProtocolError):
        pack(endless)


def array_map(**changed: Any) -> bytes:
    fields = {b"__ndarray__": True, b"data": bytes(12), b"dtype": "<f4", b"shape": [3]}
    fields.update({key.encode(): value for key, value in changed.items()})
    return bytes(msgpack.packb({key: value for key, value in fields.items() if value is not ...}))


BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"data": bytes(11)}, "does not fill"),
    ({"data": bytes(13)}, "does not fill"),
    ({"data": "text"}, "wrong type"),
    ({"data": None}, "wrong type"),
    ({"data": [0] * 12}, "wrong type"),
    ({"data": ...}, "other fields"),
    ({"shape": ...}, "other fields"),
    ({"dtype": ...}, "other fields"),
    ({"extra": 1}, "other fields"),
    ({"__ndarray__": False}, "other fields"),
    ({"__ndarray__": 1}, "other fields"),
    ({"shape": [-3]}, "no usable shape"),
    ({"shape": [-1, -3]}, "no usable shape"),
    ({"shape": [3.0]}, "no usable shape"),
    ({"shape": [True, 3]}, "no usable shape"),
    ({"shape": ["3"]}, "no usable shape"),
    ({"shape": 3}, "no usable shape"),
    ({"shape": None}, "no usable shape"),
    ({"shape": {"0": 3}}, "no usable shape"),
    ({"shape": [1] * 33 + [3]}, "no usable shape"),
    ({"shape": [2**62, 2**62]}, "too large"),
    ({"shape": [0, 2**63], "data": b""}, "too large"),
    ({"shape": [2**64 - 1]}, "too large"),
    ({"shape": []}, "does not fill"),
    ({"dtype": "O"}, "cannot be sent"),
    ({"dtype": "|O"}, "unknown dtype|cannot be sent"),
    ({"dtype": "<c8"}, "cannot be sent"),
    ({"dtype": "V4"}, "cannot be sent"),
    ({"dtype": "f4,f4"}, "unknown dtype"),
    ({"dtype": "(3,)f4"}, "unknown dtype"),
    ({"dtype": "{'names': ['a']}"}, "unknown dtype"),
    ({"dtype": "<f3"}, "unknown dtype"),
    ({"dtype": "<f400000000000"}, "unknown dtype"),
    ({"dtype": "nothing"}, "unknown dtype"),
    ({"dtype": ""}, "unknown dtype"),
    ({"dtype": "f4\n"}, "unknown dtype"),
    ({"dtype": b"<f4"}, "unknown dtype"),
    ({"dtype": 4}, "unknown dtype"),
    ({"dtype": None}, "unknown dtype"),
    ({"dtype": "S0", "data": b""}, "no size"),
    ({"dtype": "<U0", "data": b""}, "no size"),
    ({"dtype": "|b1", "shape": [12], "data": b"\x02" + bytes(11)}, "0 and 1"),
]


@pytest.mark.parametrize(("changed", "words"), BAD_ARRAYS, ids=str)
def test_a_malformed_array_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        unpack(array_map(**changed))


def test_the_unchanged_array_is_accepted() -> None:
    """The control of the cases above."""
    np.testing.assert_array_equal(unpack(array_map()), np.zeros(3, np.float32))
    assert unpack(array_map(dtype="float32")).dtype.str == "<f4"
    assert unpack(array_map(shape=[3, 0], data=b"")).shape == (3, 0)


BAD_SCALARS: list[dict[bytes, Any]] = [
    {b"data": "1.5", b"dtype": "<f4"},
    {b"data": None, b"dtype": "<f4"},
    {b"data": [1], b"dtype": "<f4"},
    {b"data": 1.5, b"dtype": "<i4"},
    {b"data": True, b"dtype": "<i4"},
    {b"data": 1, b"dtype": "|b1"},
    {b"data": 300, b"dtype": "|u1"},
    {b"data": -1, b"dtype": "|u1"},
    {b"data": 2**63, b"dtype": "<i8"},
    {b"data": 1.5, b"dtype": "O"},
    {b"data": 1.5, b"dtype": "<c8"},
    {b"data": 1, b"dtype": "<M8[s]"},
    {b"data": 1.5, b"dtype": "evil"},
    {b"data": 1.5},
    {b"dtype": "<f4"},
    {b"data": 1.5, b"dtype": "<f4", b"shape": []},
]


@pytest.mark.parametrize("fields", BAD_SCALARS, ids=str)
def test_a_malformed_scalar_is_refused(fields: dict[bytes, Any]) -> None:
    with pytest.raises(ProtocolError):
        unpack(msgpack.packb({b"__npgeneric__": True, **fields}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x80\x80",
        b"\x81\xa1a",
        b"\xa1\xff",  # not UTF-8
        b"\x81\x01\x02",  # keys that are numbers
        b"\x82\xa1a\x01\xa1a\x02",  # the same key twice
        b"\x81\x90\x01",  # a list as key
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\x80\x04\x95pickle",
    ],
    ids=repr,
)
def test_malformed_msgpack_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(data)


def test_a_refused_value_leaves_nothing_in_the_next_message() -> None:
    for wrong in ({"a": np.ones(4000), "b": object()}, {"a": np.array([1j])}):
        with pytest.raises(ProtocolError, match="sent"):
            pack(wrong)
        assert pack({"a": np.arange(3, dtype=np.float32)}) == GOLDEN_ARRAY


def test_messages_of_several_threads_do_not_mix() -> None:
    values = [{"a": np.full(50_000, index), "b": [str(index)] * 500} for index in range(8)]
    wanted = [pack(value) for value in values]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            assert list(pool.map(pack, values)) == wanted
