"""Pixels: torch and Pillow as independent references, layouts, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vivace.errors import ObservationError
from vivace.robots.images import check_image, fit, resize_jax, resize_pil, resize_torch, to_uint8, view_pil, view_torch

SIZES = [(60, 80), (80, 60), (224, 224), (225, 224), (480, 640), (223, 97), (1, 1), (2, 300), (300, 7)]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def torch_reference(image: np.ndarray, pad: float) -> np.ndarray:
    """torch itself, with two threads: its kernel for one thread rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        h, w = fit(*image.shape[:2], into=(224, 224))
        small = torch.nn.functional.interpolate(x, size=(h, w), mode="bilinear", align_corners=False).clamp(0, 1)
        left, top = (224 - w) // 2, (224 - h) // 2
        return (torch.nn.functional.pad(small, (left, 224 - w - left, top, 224 - h - top), value=pad) * 2 - 1)[
            0
        ].numpy()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pad", [0.0, -1.0])
def test_torch_flavour_is_bit_equal_to_torch(size: tuple[int, int], pad: float) -> None:
    image = picture(*size)
    got = view_torch(image, pad=pad)
    wanted = torch_reference(image, pad)
    assert got.dtype == np.float32
    assert np.array_equal(got, wanted), np.abs(got - wanted).max()


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_flavour_does_not_depend_on_threads(threads: int) -> None:
    image = picture(60, 80)
    wanted = view_torch(image)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(view_torch(image), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 5])
def test_pil_flavour_is_pillow(size: tuple[int, int]) -> None:
    image = picture(*size)
    ratio = max(size[1] / 224, size[0] / 224)
    h, w = int(size[0] / ratio), int(size[1] / ratio)
    canvas = Image.new("RGB", (224, 224), 0)
    canvas.paste(
        Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR), (int((224 - w) / 2), int((224 - h) / 2))
    )
    assert np.array_equal(np.moveaxis(view_pil(image), 0, -1), np.asarray(canvas))


def test_the_flavours_differ() -> None:
    image = picture(480, 640)
    pil, torch_ = view_pil(image).astype(float), (view_torch(image) + 1) * 127.5
    assert np.abs(pil - torch_).max() > 50
    jax = resize_jax(np.moveaxis(image, -1, 0).astype(np.float32) / 255, pad=0, low=0, high=1) * 255
    assert np.abs(jax - pil).max() < 1.5  # both anti-aliased
    assert np.abs(jax - torch_).max() > 50


def test_padding_is_centred_and_the_odd_pixel_is_at_the_end() -> None:
    out = resize_pil(np.full((223, 224, 3), 9, dtype=np.uint8), height=226, width=224)
    rows = np.flatnonzero(out.any(axis=(1, 2)))
    assert (rows[0], 225 - rows[-1]) == (1, 2)
    old = view_torch(np.full((112, 224, 3), 255, dtype=np.uint8), pad=-1.0)
    assert set(np.unique(old)) == {-3.0, 1.0}


def test_a_view_of_the_right_size_is_untouched() -> None:
    image = picture(224, 224)
    assert np.array_equal(np.moveaxis(view_pil(image), 0, -1), image)
    assert np.array_equal(view_torch(image), np.moveaxis(image, -1, 0).astype(np.float32) / np.float32(255) * 2 - 1)


def test_channels_first_is_recognised() -> None:
    image = picture(60, 80)
    assert np.array_equal(view_pil(np.moveaxis(image, -1, 0)), view_pil(image))
    assert np.array_equal(view_torch(np.moveaxis(image, -1, 0)), view_torch(image))


def test_float_images_are_truncated_for_openpi_and_kept_for_lerobot() -> None:
    floats = np.full((224, 224, 3), 0.999, dtype=np.float32)
    assert to_uint8(floats).max() == 254  # 254.745 truncated, not rounded
    assert np.allclose(view_torch(floats), 0.998)
    assert to_uint8(np.ones((2, 2, 3), dtype=np.float64)).max() == 255


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_any_picture_stays_in_range_or_is_refused(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > 224:
        with pytest.raises(ObservationError, match="elongated"):
            fit(height, width, into=(224, 224))
        return
    image = picture(height, width)
    out = view_torch(image)
    assert out.shape == (3, 224, 224)
    assert out.min() >= -1
    assert out.max() <= 1
    assert view_pil(image).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([[1]], "not an array"),
        (np.zeros((4, 4, 3), dtype=np.int64), "wrong dtype"),
        (np.zeros((4, 4, 3), dtype=object), "wrong dtype"),
        (np.zeros((4, 4, 3), dtype=bool), "wrong dtype"),
        (np.zeros((4, 4), dtype=np.uint8), "wrong shape"),
        (np.zeros((4, 4, 4), dtype=np.uint8), "wrong shape"),
        (np.zeros((1, 4, 4, 3), dtype=np.uint8), "wrong shape"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "is empty"),
        (np.full((4, 4, 3), np.nan, dtype=np.float32), "NaN or infinity"),
        (np.full((4, 4, 3), 200.0, dtype=np.float32), "outside"),
        (np.full((4, 4, 3), -0.5, dtype=np.float32), "outside"),
    ],
)
def test_bad_images_are_named(value: object, match: str) -> None:
    with pytest.raises(ObservationError, match=match) as caught:
        check_image(value, key="cameras/front")
    assert "cameras/front" in str(caught.value)


def test_declared_channels_first_refuses_the_other_layout() -> None:
    with pytest.raises(ObservationError, match=r"wanted uint8 or float in \[0, 1\], \[3, h, w\]"):
        check_image(picture(4, 5), key="images/cam_high", chw=True)


def test_resize_torch_clamps() -> None:
    out = resize_torch(np.full((3, 10, 10), 1.5, dtype=np.float32))
    assert out.max() == 1.0
