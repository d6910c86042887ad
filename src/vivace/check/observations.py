"""Observations for evidence commands: made up from the robot's description, or recorded ones read from a folder.

Made-up images have what cameras have and noise has not: a lit background, shapes with edges, texture and sensor noise, and
both smooth and busy regions. States are drawn inside the checkpoint's own statistics. Results that used them say
"synthetic": accuracy on made-up scenes shows that two engines compute the same function, not how a robot behaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ObservationError
from ..robots.dataset import is_dataset, read_frames
from ..types import NormStats, RobotIO

PROMPTS = (
    "pick up the red mug and place it on the plate",
    "open the top drawer",
    "fold the towel in half",
    "put the black bowl on the stove",
    "push the button on the left, then wait",
    "hand me the screwdriver next to the blue box",
)
IMAGE_SIZE = (240, 320)
DATASET_FRAMES = 256
NOISE_CORRELATION = 0.2  # of neighbouring pixels: photographs of anything are above 0.8, white noise is at 0


def synthetic(
    io: RobotIO, count: int, *, seed: int = 0, prepare: Callable[[dict[str, Any]], object] | None = None
) -> list[dict[str, Any]]:
    """Requests in openpi's form, keys joined by "/", that fit the robot; the same seed gives the same bytes.

    Args:
        io: the robot; every required and optional camera gets an image.
        count: how many.
        seed: of the generator.
        prepare: `Policy.prepare`; an instruction that is too long for this policy loses words from its end.
    Raises: ObservationError from `prepare`, if one word is too much; ConfigError for a negative seed.
    """
    if seed < 0:
        raise ConfigError("the seed of made-up observations cannot be used", got=seed, wanted="0 or more")
    generator = np.random.default_rng(seed)
    requests = [_request(io, generator, index) for index in range(count)]
    if prepare is not None:
        for request in requests:
            _shorten(request, io.embodiment.prompt_key, prepare)
    return requests


def _shorten(request: dict[str, Any], key: str, prepare: Callable[[dict[str, Any]], object]) -> None:
    while True:
        try:
            prepare(request)
            return
        except ObservationError:
            words = request[key].split()
            if len(words) < 2:
                raise
            request[key] = " ".join(words[:-1])


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Requests from `folder/*.npz` in name order; array names are the request's keys, text as a 0-d string array.

    From a LeRobot dataset: 256 frames spread over all episodes, keys as LeRobot policies name them.
    Raises ConfigError when the folder has none, or a file is not a plain npz archive (pickles are refused).
    """
    if is_dataset(folder):
        return [
            {**frame.images, "observation.state": frame.vectors["observation.state"], "task": frame.task}
            for frame in read_frames(folder, wanted=DATASET_FRAMES)
        ]
    files = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not files:
        raise ConfigError(
            f"no recorded observations in {folder}",
            wanted="a folder of .npz files, one request each, or a LeRobot dataset",
        )
    return [_load(path) for path in files]


def digest(requests: Sequence[Mapping[str, Any]]) -> str:
    """12 hex digits over every key and value of the requests."""
    whole = hashlib.sha256()
    for request in requests:
        for key in sorted(request):
            value = np.asarray(request[key])
            whole.update(f"{key} {value.dtype} {value.shape}\n".encode())
            whole.update(np.ascontiguousarray(value).tobytes())
    return whole.hexdigest()[:12]


def cameras(requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of the images of these requests, in the order in which they first occur."""
    return list(dict.fromkeys(key for request in requests for key, value in request.items() if np.ndim(value) == 3))


def doubts(requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons to believe that no robot saw these: constant images, white noise, the same observation again and again.

    It recognises the usual stand-ins and nothing more: a good forgery passes.
    """
    found = []
    reasons: dict[str, list[tuple[int, str | None]]] = {key: [] for key in cameras(requests)}
    for index, request in enumerate(requests):
        if not (seen := cameras([request])):
            found.append(f"observation {index} has no image")
        for key in seen:
            reasons[key].append((index, _unlike_a_camera(np.asarray(request[key]))))
    for key, said in reasons.items():
        every = {reason for _, reason in said}
        if len(said) > 1 and len(every) == 1 and None not in every:
            found.append(f"camera {key}: {said[0][1]} in every observation")
        else:
            found += [f"observation {index}, {key}: {reason}" for index, reason in said if reason is not None]
    if len(requests) > 1 and len({digest([request]) for request in requests}) == 1:
        found.append(f"all {len(requests)} observations are the same")
    return found


def unlike_a_robot(doubts: Sequence[str]) -> ConfigError:
    """The error of a calibration on such observations."""
    dark = any("constant" in doubt for doubt in doubts)
    drop = (
        "leave a camera that is not connected out with --without KEY, if the policy can do without it; " if dark else ""
    )
    return ConfigError(
        "these observations are not from a robot", got="; ".join(doubts[:3]), wanted="recorded requests",
        do=f"ranges measured on them mean nothing for a robot; {drop}for self-tests say --synthetic",
    )  # fmt: skip


def without(requests: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The requests without these cameras. Raises ConfigError for a key that is no camera of theirs."""
    known = cameras(requests)
    if unknown := [key for key in keys if key not in known]:
        raise ConfigError("--without names no camera", got=", ".join(unknown), wanted=f"some of {', '.join(known)}")
    return [{key: value for key, value in request.items() if key not in keys} for request in requests]


def _unlike_a_camera(image: NDArray[Any]) -> str | None:
    if image.min() == image.max():
        return "the image is constant"
    channels_first = image.shape[0] in (1, 3, 4) and image.shape[-1] not in (1, 3, 4)
    grey = image.astype(np.float64).mean(axis=0 if channels_first else -1)
    left, right = grey[:, :-1].ravel(), grey[:, 1:].ravel()
    if left.std() == 0.0 or right.std() == 0.0:
        return None
    if np.corrcoef(left, right)[0, 1] < NOISE_CORRELATION:
        return "neighbouring pixels have nothing to do with each other: noise"
    return None


def scene(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """One made-up camera image, uint8 [height, width, 3]."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    light = generator.uniform(60, 140, 3) + np.multiply.outer(y, generator.uniform(-60, 90, 3))
    light = light + np.multiply.outer(x, generator.uniform(-50, 50, 3))
    for _ in range(int(generator.integers(4, 9))):
        inside = _shape(generator, y, x)
        colour = generator.uniform(10, 245, 3)
        shade = 0.75 + 0.25 * (1 - y[inside])
        light[inside] = colour * shade[:, None]
    stripes = 12 * np.sin(2 * np.pi * generator.uniform(10, 40) * (x + generator.uniform(-1, 1) * y))
    light[y > 0.6] += stripes[y > 0.6][:, None]  # texture on the table, none on the wall
    noise = generator.normal(0, 4, light.shape)
    return np.clip(light + noise, 0, 255).astype(np.uint8)


def _shape(generator: np.random.Generator, y: NDArray[Any], x: NDArray[Any]) -> NDArray[np.bool_]:
    cy, cx = generator.uniform(0.1, 0.95, 2)
    ry, rx = generator.uniform(0.04, 0.22, 2)
    round_one = generator.random() < 0.5
    inside = (
        ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1 if round_one else (np.abs(y - cy) < ry) & (np.abs(x - cx) < rx)
    )
    return np.asarray(inside, dtype=np.bool_)


def _request(io: RobotIO, generator: np.random.Generator, index: int) -> dict[str, Any]:
    robot = io.embodiment
    request: dict[str, Any] = {}
    for camera in robot.cameras:
        image = scene(generator, *IMAGE_SIZE)
        request[camera.key] = np.ascontiguousarray(image.transpose(2, 0, 1)) if camera.chw else image
    state = _state(io.normalization.state, sum(part.size for part in robot.state), generator)
    begin = 0
    for part in robot.state:
        request[part.key] = state[begin : begin + part.size]
        begin += part.size
    request[robot.prompt_key] = PROMPTS[index % len(PROMPTS)]
    return request


def _state(stats: NormStats, size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """A state inside the statistics: between the quantiles where known, else around the mean, else in [-1, 1]."""
    part = generator.uniform(0.05, 0.95, size)
    for low, high in ((stats.q01, stats.q99), (stats.min, stats.max)):
        if low is not None and high is not None and min(low.size, high.size) >= size:
            return (low[:size] + part * (high[:size] - low[:size])).astype(np.float32)
    if stats.mean is not None and stats.std is not None and min(stats.mean.size, stats.std.size) >= size:
        return (stats.mean[:size] + (2 * part - 1) * stats.std[:size]).astype(np.float32)
    return (2 * part - 1).astype(np.float32)


def _load(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            items: Mapping[str, NDArray[Any]] = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read {path}", got=error, wanted="an .npz file without pickled objects") from error
    return {key: str(value) if value.dtype.kind in "US" and value.ndim == 0 else value for key, value in items.items()}
