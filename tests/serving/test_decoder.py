"""The decoder that remembers a structure gives what `unpack` gives: same values, same errors, whatever came before."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vivace.errors import ProtocolError
from vivace.serving import decoder as decoder_module
from vivace.serving import pack, unpack
from vivace.serving.decoder import Decoder, _layout_of
from vivace.serving.scan import DEFAULT_LIMITS, Limits, byte_strings

arrays = st.sampled_from(["u1", "<f4", ">f8", "<i8", "?", "<U2", "S3"]).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.text(max_size=4), arrays,
    st.binary(max_size=4), st.sampled_from([b"data", np.float32(1.5), np.bool_(True)]),
)  # fmt: skip
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def request(seed: int = 0, **changed: Any) -> dict[str, Any]:
    draws = np.random.default_rng(seed)
    return {
        "observation/image": draws.integers(0, 256, (9, 7, 3), np.uint8),
        "observation/state": draws.normal(size=7),
        "images": {"wrist": draws.integers(0, 256, (5, 3), np.uint8), "kinds": [draws.normal(size=2), "rgb"]},
        "gain": np.float32(2.5),
        "prompt": "fold the towel",
        **changed,
    }


def learned(*messages: bytes) -> Decoder:
    """A decoder that has seen these, and knows the structure of the last."""
    decoder = Decoder(DEFAULT_LIMITS)
    for message in messages:
        decoder(message)
    assert decoder._layout is not None
    return decoder


def same(one: Any, two: Any) -> bool:
    """Equal in value, type, dtype, shape and flags."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, np.ndarray):
        shaped = (one.dtype.str, one.shape, one.flags.writeable) == (two.dtype.str, two.shape, two.flags.writeable)
        return shaped and one.tobytes() == two.tobytes()
    return bool(one == two) or one != one


@settings(max_examples=300, deadline=None)
@given(value=values, other=values)
def test_same_values_as_unpack_however_often_and_after_whatever(value: Any, other: Any) -> None:
    decoder, messages = Decoder(DEFAULT_LIMITS), [pack(one) for one in (value, value, value, other, value, value)]
    for message in messages:
        assert same(decoder(message), unpack(message))


def test_requests_of_one_structure_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (pack(request(seed)) for seed in range(3))
    decoder = learned(first, second)
    expected = unpack(third)
    monkeypatch.setattr(msgpack, "unpackb", None)
    assert same(decoder(third), expected)


def test_pixels_are_views_of_the_message_and_numbers_begin_where_numbers_may() -> None:
    message = pack(request(2))
    found = learned(message, message)(message)
    where = np.frombuffer(message, np.uint8)
    assert np.shares_memory(found["observation/image"], where)
    for array in (found["observation/image"], found["observation/state"], found["images"]["kinds"][0]):
        assert array.flags.aligned
        assert not array.flags.writeable


def test_every_answer_has_containers_of_its_own() -> None:
    message = pack(request())
    decoder = learned(message, message)
    first = decoder(message)
    first["images"]["kinds"].append("mine")
    first["images"]["new"] = 1
    assert same(decoder(message), unpack(message))


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": "fold the toweL"},
        {"gain": np.float32(2.25)},
        {"observation/state": np.zeros(7, ">f8")},
        {"observation/image": np.zeros((7, 9, 3), np.uint8)},
        {"observation/state": np.zeros(6)},
    ],
    ids=["text", "scalar", "dtype", "shape", "length"],
)
def test_what_is_no_data_of_an_array_is_never_taken_from_the_message_before(changed: dict[str, Any]) -> None:
    before, after = pack(request()), pack(request(1, **changed))
    assert same(learned(before, before)(after), unpack(after))


def test_a_damaged_message_is_refused_as_ever() -> None:
    """Every byte outside the arrays' data decides; after the error the structure is not forgotten wrongly."""
    message, draws = pack(request()), random.Random(0)
    inside = {i for one in byte_strings(message) if one.end - one.body > 6 for i in range(one.body, one.end)}
    outside = [i for i in range(len(message)) if i not in inside]
    for index in draws.sample(outside, 120):
        damaged = bytearray(message)
        damaged[index] ^= 1 << draws.randrange(8)
        decoder = learned(message, message)
        assert same(_outcome(decoder, bytes(damaged)), _outcome(unpack, bytes(damaged)))
        assert same(decoder(message), unpack(message))


def _outcome(decode: Any, data: bytes) -> Any:
    try:
        return decode(data)
    except ProtocolError as error:
        return str(error)


def test_booleans_are_looked_at_every_time() -> None:
    good = pack({"flags": np.array([True, False, True]), "x": np.zeros(3, np.uint8)})
    bad = good.replace(b"\x01\x00\x01", b"\x01\x02\x01")
    decoder = Decoder(DEFAULT_LIMITS)
    for _ in range(3):
        decoder(good)
    with pytest.raises(ProtocolError, match="other bytes than 0 and 1"):
        decoder(bad)


@pytest.mark.parametrize(
    "message",
    [
        pack({"x": np.zeros(3), "list": [b"data", b"raw bytes"]}),
        pack({"x": np.frombuffer(b"data", np.uint8), "after": 1}),
        pack({"x": np.zeros(3), "y": {"data": b"data"}, "z": np.frombuffer(b"data", np.uint8)}),
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": b"abc", b"dtype": "|S3"}}),
        msgpack.packb({b"data": {b"data": b"data", b"raw": b"data"}}),
        msgpack.packb([b"data", {b"raw bytes as a key": 1}]),
    ],
    ids=["list", "the word as data", "the word everywhere", "scalar of bytes", "maps", "key"],
)
def test_bytes_that_look_like_an_array_are_what_they_are(message: bytes) -> None:
    decoder = Decoder(DEFAULT_LIMITS)
    for _ in range(4):
        assert same(decoder(message), unpack(message))


def test_a_remembered_message_with_more_behind_it_is_refused() -> None:
    message = pack(request())
    for damaged in (message + b"\x01", message[:-1]):
        with pytest.raises(ProtocolError, match=r"bytes after its end|ends too early"):
            learned(message, message)(damaged)


def test_what_a_client_chose_is_not_kept() -> None:
    """Text and numbers outside of arrays decide how much a layout holds."""
    decoder = Decoder(DEFAULT_LIMITS)
    for message in (pack(request(prompt="x" * 20_000)), pack(request(list=[1.5] * 4_000))):
        for _ in range(3):
            assert same(decoder(message), unpack(message))
            assert decoder._layout is None


def test_layouts_that_are_of_no_use_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time in every request: each layout costs as much as decoding, and none is used."""
    made: list[bytes] = []
    monkeypatch.setattr(
        decoder_module, "_layout_of", lambda data, strings: made.append(data) or _layout_of(data, strings)
    )
    decoder = Decoder(DEFAULT_LIMITS)
    for index in range(300):
        message = pack(request(index, time=float(index)))
        assert same(decoder(message), unpack(message))
    assert len(made) == 8, "the second, then after 2, 4, 8, ... more"
    for index in range(300):  # the time stands still: it is of use again, at last
        decoder(pack(request(index, time=0.0)))
    assert decoder._used
    assert len(made) == 9
    decoder(pack(request(0, time=1.0)))
    decoder(pack(request(0, time=1.0)))
    assert len(made) == 10, "and then at once"


def test_limits_hold_for_the_first_message_of_a_structure() -> None:
    decoder = Decoder(Limits(max_nodes=20))
    for _ in range(3):
        with pytest.raises(ProtocolError, match="too many parts"):
            decoder(pack(request()))


def test_byte_strings_are_found_where_they_lie() -> None:
    message = pack({"a": b"xy", "b": [b"", np.zeros(300, np.uint8), bytes(70_000)]})
    found = [message[one.body : one.end] for one in byte_strings(message)]
    assert found == [b"xy", b"", b"__ndarray__", b"data", bytes(300), b"dtype", b"shape", bytes(70_000)]
    assert [message[one.head] for one in byte_strings(message)] == [0xC4, 0xC4, 0xC4, 0xC4, 0xC5, 0xC4, 0xC4, 0xC6]
