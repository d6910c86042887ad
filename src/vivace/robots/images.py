"""Pixels: from what a camera client sends to what the vision tower was trained on.

Two families resize differently, and a policy notices: openpi calls Pillow on uint8 (anti-aliased, rounded to 8 bits, black
bars), LeRobot calls torch on floats in [0, 1] (bilinear, not anti-aliased, bars of `pad`) and only then maps to [-1, 1].
Both keep the aspect ratio with a truncated size and centre the picture; an odd pixel goes to the bottom or right.

openpi's models own two more resizes, used there only when a caller skips the server's transform. They are here
(`resize_torch` with range [-1, 1], and `resize_jax`) because fixtures written by openpi record them.

The only guess about layout is openpi's own rule, `to_hwc`: a leading axis of 3 means [3, h, w].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ObservationError


def fit(height: int, width: int, *, into: tuple[int, int]) -> tuple[int, int]:
    """Size of a picture [height, width] after shrinking or growing it into a box, aspect ratio kept, truncated.

    Raises: ObservationError if a side becomes zero (a picture hundreds of times longer than wide).
    Source: openpi_client/image_tools.py, lerobot vla_utils.resize_with_pad_torch (same arithmetic in both).
    """
    ratio = max(width / into[1], height / into[0])
    size = int(height / ratio), int(width / ratio)
    if min(size) < 1:
        raise ObservationError(
            "an image is too elongated to resize", got=f"{height} x {width} pixels", wanted=f"both sides >= 1 in {into}"
        )
    return size


def resize_pil(image: NDArray[np.uint8], *, height: int = 224, width: int = 224) -> NDArray[np.uint8]:
    """Letterbox uint8 [..., h, w, 3] to [..., height, width, 3] as openpi's server does; bit-exact, untouched if it fits.

    Source: openpi_client/image_tools.py (Pillow, BILINEAR, value 0 around).
    """
    if image.shape[-3:-1] == (height, width):
        return image
    size = fit(image.shape[-3], image.shape[-2], into=(height, width))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    out = np.zeros((*image.shape[:-3], height, width, image.shape[-1]), dtype=np.uint8)
    for index in np.ndindex(image.shape[:-3]):
        small = Image.fromarray(image[index]).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        out[index][top : top + size[0], left : left + size[1]] = np.asarray(small)
    return out


def resize_torch(
    image: NDArray[np.float32] | NDArray[np.uint8],
    *,
    height: int = 224,
    width: int = 224,
    pad: float = 0.0,
    low: float = 0.0,
    high: float = 1.0,
) -> NDArray[np.float32]:
    """Letterbox [3, h, w] to float32 [3, height, width] with torch's bilinear filter, no anti-aliasing.

    image      float32, or uint8 for what divided by 255 (then only the pixels that are read are divided: same bits, a third
               of the time)
    low, high  the result is clamped to this range before the bars of value `pad` are added
    Numerics: bit-equal to torch's CPU kernel as it runs with two or more threads. torch itself is not called: with one
              thread it takes another kernel and rounds differently (2e-7), so answers would depend on who else is running.
    Source: lerobot vla_utils.resize_with_pad_torch; openpi shared/image_tools.py (torch), with [-1, 1] and pad -1.
    """
    if image.shape[-2:] == (height, width):
        return _unit(image)
    size = fit(image.shape[-2], image.shape[-1], into=(height, width))
    small = _bilinear(image, size)
    return _centre(np.clip(small, np.float32(low), np.float32(high)), height=height, width=width, pad=pad)


def _unit(image: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels as LeRobot divides them: uint8 / 255 in float32; floats stay."""
    return image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image


def _bilinear(image: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    """Two taps per axis, columns first, only the rows that are needed; [3, h, w] to [3, *size]."""
    top, bottom, top_weight, bottom_weight = _taps(image.shape[1], size[0])
    left, right, left_weight, right_weight = _taps(image.shape[2], size[1])
    needed = np.unique(np.concatenate([top, bottom]))
    rows = image[:, needed]
    rows = _blend(_unit(rows[:, :, left]), left_weight, _unit(rows[:, :, right]), right_weight)
    above, below = rows[:, np.searchsorted(needed, top)], rows[:, np.searchsorted(needed, bottom)]
    return _blend(above, top_weight[:, None], below, bottom_weight[:, None])


@lru_cache(maxsize=64)
def _taps(size_in: int, size_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Neighbours (near, far) and float32 weights (near, far) of each output pixel, pixel centres aligned."""
    stretch = np.float64(np.float32(size_in) / np.float32(size_out))
    at = np.maximum(((np.arange(size_out) + 0.5) * stretch - 0.5).astype(np.float32), np.float32(0))
    near = np.minimum(at.astype(np.int64), size_in - 1)
    far_weight = np.clip(at - near.astype(np.float32), np.float32(0), np.float32(1))
    return near, np.minimum(near + 1, size_in - 1), np.float32(1) - far_weight, far_weight


def _blend(a: NDArray[Any], weight_a: NDArray[Any], b: NDArray[Any], weight_b: NDArray[Any]) -> NDArray[np.float32]:
    """a*weight_a + b*weight_b as torch's compiler contracts it: fma(a, weight_a, round(b*weight_b)).

    A float64 product of two float32 numbers is exact, so the sum rounded once to float32 is the fused multiply-add.
    """
    total: NDArray[np.float64] = np.multiply(a, weight_a, dtype=np.float64)
    total += b * weight_b
    return total.astype(np.float32)


def resize_jax(
    image: NDArray[Any], *, height: int = 224, width: int = 224, pad: float, low: float, high: float
) -> NDArray[Any]:
    """Letterbox [3, h, w] (float32 or uint8) as `jax.image.resize(..., "linear")` with anti-aliasing does.

    Each axis is a product with a matrix of normalised triangle weights, widened when shrinking. uint8 is rounded to the
    nearest value. Source: openpi shared/image_tools.py; jax.image.scale_and_translate for the weights.
    """
    if image.shape[-2:] == (height, width):
        return image
    size = fit(image.shape[-2], image.shape[-1], into=(height, width))
    rows = _triangle_weights(image.shape[-2], size[0])
    columns = _triangle_weights(image.shape[-1], size[1])
    small = rows.astype(np.float64) @ image.astype(np.float64) @ columns.astype(np.float64).T
    if image.dtype == np.uint8:
        small = np.rint(small)
    return _centre(np.clip(small, low, high).astype(image.dtype), height=height, width=width, pad=pad)


def _triangle_weights(size_in: int, size_out: int) -> NDArray[np.float32]:
    """Weights [size_out, size_in]; float32 throughout, because JAX's rounding of positions is visible in the result."""
    f32 = np.float32
    stretch = f32(size_in / size_out)
    at = (np.arange(size_out, dtype=f32) + f32(0.5)) * stretch - f32(0.5)
    distance = np.abs(at[:, None] - np.arange(size_in, dtype=f32)[None, :]) / max(stretch, f32(1))
    weights = np.maximum(f32(0), f32(1) - distance)
    normalised: NDArray[np.float32] = weights / weights.sum(axis=1, keepdims=True, dtype=f32)
    return normalised


def _centre(small: NDArray[Any], *, height: int, width: int, pad: float) -> NDArray[Any]:
    """Paste [3, h, w] into the middle of [3, height, width] filled with `pad`; the odd pixel goes to bottom or right."""
    top, left = (height - small.shape[-2]) // 2, (width - small.shape[-1]) // 2
    out = np.full((*small.shape[:-2], height, width), pad, dtype=small.dtype)
    out[..., top : top + small.shape[-2], left : left + small.shape[-1]] = small
    return out


def check_image(value: Any, *, key: str, chw: bool = False) -> NDArray[Any]:
    """Return the array of one camera, or say what is wrong with it.

    value    uint8, or floating in [0, 1]; [h, w, 3] or [3, h, w] (`chw`: only the latter)
    Raises:  ObservationError naming `key`: not an array, object dtype, wrong rank or channels, an empty side, an integer
             dtype other than uint8, NaN, or floats outside [0, 1], which openpi would wrap around silently.
    """
    wanted = "uint8 or float in [0, 1], " + ("[3, h, w]" if chw else "[h, w, 3] (or [3, h, w])")
    if not isinstance(value, np.ndarray):
        raise ObservationError(f"image {key!r} is not an array", got=type(value).__name__, wanted=wanted)
    if value.dtype != np.uint8 and value.dtype.kind != "f":
        raise ObservationError(f"image {key!r} has the wrong dtype", got=_described(value), wanted=wanted)
    channels_first = value.ndim == 3 and value.shape[0] == 3
    channels_last = value.ndim == 3 and value.shape[2] == 3 and not chw
    if not channels_first and not channels_last:
        raise ObservationError(f"image {key!r} has the wrong shape", got=_described(value), wanted=wanted)
    if 0 in value.shape:
        raise ObservationError(f"image {key!r} is empty", got=_described(value), wanted="at least one pixel per side")
    if value.dtype.kind == "f":
        _check_float_range(value, key=key)
    return value


def _described(value: NDArray[Any]) -> str:
    return f"{value.dtype} {list(value.shape)}"


def _check_float_range(value: NDArray[Any], *, key: str) -> None:
    low, high = float(value.min()), float(value.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ObservationError(f"image {key!r} contains NaN or infinity", got=f"{value.dtype}", wanted="finite pixels")
    # The bounds of what truncates to 0..255: a resampling that overshoots 1.0 by a rounding is still a picture.
    if low * 255 <= -1 or high * 255 >= 256:
        raise ObservationError(
            f"float image {key!r} is outside [0, 1]",
            got=f"[{low:.4g}, {high:.4g}]",
            wanted="[0, 1]",
            do="send uint8, or divide by 255",
        )


def to_hwc(image: NDArray[Any]) -> NDArray[Any]:
    """Move channels last: a leading axis of 3 is taken as [3, h, w] (openpi's rule, libero_policy.py)."""
    return np.moveaxis(image, 0, -1) if image.shape[0] == 3 else image


def to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Float [0, 1] to uint8 by truncation, `255 * x`; uint8 stays (openpi's rule, libero_policy.py)."""
    if image.dtype == np.uint8:
        return image
    return np.asarray(255 * image).astype(np.uint8)


def view_pil(image: NDArray[Any], *, size: int = 224) -> NDArray[np.uint8]:
    """One checked camera image to uint8 [3, size, size], openpi's way; `/255*2-1` is left to the model.

    What needs no resizing comes back as a view of `image`.
    """
    pixels = to_hwc(to_uint8(image))
    if pixels.shape[:2] != (size, size):
        pixels = resize_pil(np.ascontiguousarray(pixels), height=size, width=size)
    return pixels.transpose(2, 0, 1)


def view_torch(image: NDArray[Any], *, size: int = 224, pad: float = 0.0) -> NDArray[np.float32]:
    """One checked camera image to float32 [3, size, size] in [-1, 1], LeRobot's way.

    pad  bar value before `x*2-1`: 0 (bars become -1), or -1 for LeRobot <= 0.4 (bars become -3)
    """
    chw = np.moveaxis(to_hwc(image), -1, 0)
    if chw.dtype != np.uint8:
        chw = chw.astype(np.float32)
    resized = resize_torch(np.ascontiguousarray(chw), height=size, width=size, pad=pad)
    return np.ascontiguousarray(resized * np.float32(2) - np.float32(1))
