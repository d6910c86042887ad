"""Prompts beyond the fixture table: properties of the bins, the two precisions, length limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vivace.errors import ConfigError, ObservationError
from vivace.robots.prompt import FLAVOURS, clean, discretise, encode, segments


@given(st.lists(st.floats(-4, 4, allow_nan=False), max_size=32))
def test_bins_are_numpy_digitize(values) -> None:
    x = np.asarray(values, dtype=np.float64)
    assert discretise(x) == (np.digitize(x, np.linspace(-1, 1, 257)[:-1]) - 1).tolist()


def test_float32_and_float64_bins_differ_below_an_edge() -> None:
    just_below = np.asarray([0.9921874999999999])
    assert discretise(just_below) == [254]
    assert discretise(just_below.astype(np.float32)) == [255]
    assert "254" in segments("openpi_pi05", "x", just_below)[0].text
    assert "255" in segments("lerobot_pi05", "x", just_below)[0].text


def test_range_is_minus_one_to_255() -> None:
    assert discretise(np.asarray([-1.01, -1, 0, 1, 50])) == [-1, 0, 128, 255, 255]


def test_clean_keeps_case_and_inner_spaces() -> None:
    assert clean(" Pick_up\nthe  CUP ") == "Pick up the  CUP"


def test_every_flavour_has_one_bos_at_the_start(characters) -> None:
    for flavour in FLAVOURS:
        ids = encode(segments(flavour, "a_b", np.zeros(2)), characters, max_tokens=200)
        assert ids.dtype == np.int32
        assert ids[0] == 2
        assert (ids == 2).sum() == 1


def test_padding_to_32_numbers() -> None:
    text = segments("lerobot04_pi05", "x", np.zeros(8), pad_state_to=32)[0].text
    assert text.count("128") == 32
    assert segments("lerobot04_pi05", "x", np.zeros(40), pad_state_to=32)[0].text.count("128") == 40


def test_unknown_flavour() -> None:
    with pytest.raises(ConfigError, match="unknown prompt flavour"):
        segments("openpi_fast", "x", np.zeros(1))  # type: ignore[arg-type]


def test_overflow_says_how_many_and_the_cap(characters) -> None:
    parts = segments("openpi_pi0", "w" * 46, np.zeros(0))
    assert len(encode(parts, characters, max_tokens=48)) == 48
    with pytest.raises(ObservationError, match="got 49 tokens; wanted at most 48"):
        encode(segments("openpi_pi0", "w" * 47, np.zeros(0)), characters, max_tokens=48)
