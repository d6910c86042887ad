"""Finds a robot's cameras, state and prompt in what a client sent, and says precisely what is missing or malformed.

A client sends an `Observation`, or a dict the way openpi's clients do: literal keys ("observation/image"), nested ones
({"images": {"cam_high": ...}}) or a mix. This is the edge of the system: everything is checked here, nothing after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ObservationError
from ..types import Camera, Embodiment, Observation, StatePart
from .embodiment import did_you_mean
from .images import check_image

PROMPT_KEYS = ("prompt", "task")
"""Accepted beside the embodiment's own prompt key: openpi's name and LeRobot's."""
TOKEN_KEY, TOKEN_MASK_KEY = "tokenized_prompt", "tokenized_prompt_mask"
NOISE_KEY = "noise"
"""Read by `runtime.policy`, not here."""
ABSENT = object()


Pictures = tuple[tuple[str, NDArray[Any]], ...]
"""(view name, uint8 or float image) of the cameras present, in the embodiment's order."""


@dataclass(frozen=True)
class Words:
    """What a request says beside its pictures, checked.

    state   [state_dim], robot units, the dtype that was asked for; None = not sent
    prompt  as typed; None = not sent
    tokens  int32 [L], valid tokens only; None = not sent
    """

    state: NDArray[Any] | None
    prompt: str | None
    tokens: NDArray[np.int32] | None
    t_obs: float | None = None


def pictures_of(request: Observation | Mapping[str, Any], robot: Embodiment) -> Pictures:
    """The pictures of one request. No more than that is done before a GPU can begin with them.

    Raises: ObservationError naming the key, what came and what was wanted.
    """
    if isinstance(request, Observation):
        return _images(_views_of(request, robot), robot, layout_declared=False)
    if not isinstance(request, Mapping):
        raise ObservationError(
            "the request is not an observation", got=type(request).__name__, wanted="an Observation or a dict"
        )
    found = _cameras_of(request, robot)
    try:
        return _images(found, robot, layout_declared=True)
    except ObservationError:
        _refuse_unused_images(request, robot, found)  # a misspelt name says more than the picture that is missing then
        raise


def words_of(request: Observation | Mapping[str, Any], robot: Embodiment, *, dtype: type[np.floating[Any]]) -> Words:
    """The rest of a request that `pictures_of` has accepted. `dtype` of the state: float64 (openpi) or float32 (LeRobot).

    Raises: ObservationError as above, also for a picture that no camera of the robot sends.
    """
    if isinstance(request, Observation):
        return _words_of_observation(request, robot, dtype=dtype)
    _refuse_unused_images(request, robot, _cameras_of(request, robot))
    prompt = _first(request, tuple(dict.fromkeys((robot.prompt_key, *PROMPT_KEYS))))
    tokens = _find(request, TOKEN_KEY)
    return Words(
        state=_state(request, robot.state, dtype=dtype),
        prompt=None if prompt is None else _text(prompt[1], key=prompt[0]),
        tokens=None if tokens is ABSENT else _tokens(tokens, _find(request, TOKEN_MASK_KEY)),
    )


def _words_of_observation(request: Observation, robot: Embodiment, *, dtype: type[np.floating[Any]]) -> Words:
    state = None
    if request.state is not None:
        size = sum(part.size for part in robot.state)
        state = _vector(request.state, key="state", size=size, dtype=dtype)
    tokens = None if request.tokens is None else _tokens(request.tokens, None)
    prompt = _text(request.prompt, key="prompt") or None
    return Words(state=state, prompt=prompt, tokens=tokens, t_obs=request.t_obs)


def _views_of(request: Observation, robot: Embodiment) -> dict[str, tuple[str, Any]]:
    """{view: (name it was sent under, picture)}."""
    found: dict[str, tuple[str, Any]] = {}
    for camera in robot.cameras:
        names = [name for name in (camera.view, camera.key, *camera.aliases) if name in request.views]
        if names:
            found[camera.view] = (names[0], request.views[names[0]])
    unknown = set(request.views) - {name for name, _ in found.values()} - set(robot.ignored_keys)
    if unknown:
        raise ObservationError(
            f"unknown view {sorted(unknown)[0]!r}", wanted=f"some of {[camera.view for camera in robot.cameras]}"
        )
    return found


def _cameras_of(request: Mapping[str, Any], robot: Embodiment) -> dict[str, tuple[str, Any]]:
    """{view: (key it was sent under, picture)}."""
    hits = ((camera.view, _first(request, (camera.key, *camera.aliases))) for camera in robot.cameras)
    return {view: hit for view, hit in hits if hit is not None}


# --- finding ------------------------------------------------------------------------------------------------------


def _find(tree: Mapping[str, Any], path: str) -> Any:
    """The value at `path`: as one literal key, or one mapping per "/"-separated head; ABSENT if it is not there."""
    if path in tree:
        return tree[path]
    for i, letter in enumerate(path):
        if letter == "/" and isinstance(inner := tree.get(path[:i]), Mapping):
            value = _find(inner, path[i + 1 :])
            if value is not ABSENT:
                return value
    return ABSENT


def _first(request: Mapping[str, Any], paths: tuple[str, ...]) -> tuple[str, Any] | None:
    """The first of several names that the request carries; None values count as not sent."""
    for path in paths:
        value = _find(request, path)
        if value is not ABSENT and value is not None:
            return path, value
    return None


def _leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value


def _refuse_unused_images(
    request: Mapping[str, Any], robot: Embodiment, found: Mapping[str, tuple[str, Any]]
) -> None:  # fmt: skip
    """A misspelt camera must not become a missing one: every picture is used, or named in `ignored_keys`."""
    used = {key for key, _ in found.values()}
    cameras = {path: camera.key for camera in robot.cameras for path in (camera.key, *camera.aliases)}
    others = {path for part in robot.state for path in (part.key, *part.aliases)} | {robot.prompt_key, *PROMPT_KEYS}
    passed = used | others | {TOKEN_KEY, TOKEN_MASK_KEY, NOISE_KEY} | set(robot.ignored_keys)
    groups = {_parent(path) for path in cameras} - {_parent(path) for path in others} - {""}
    for path, value in _leaves(request):
        if path in passed or value is None or not (_is_picture(value) or _parent(path) in groups):
            continue
        if path in cameras:
            raise ObservationError(
                f"camera {cameras[path]!r} was sent twice", got=f"also as {path!r}", wanted="one picture of each camera"
            )
        raise ObservationError(
            f"unknown camera {path!r}{did_you_mean(path, cameras)}",
            wanted=f"some of {[camera.key for camera in robot.cameras]}",
            do="correct the name, or list it in ignored_keys of the robot's TOML file",
        )


def _parent(path: str) -> str:
    return path.rpartition("/")[0] if "/" in path else path.rpartition(".")[0]


def _is_picture(value: Any) -> bool:
    """Bytes per value or three axes: no state, prompt or reward of a robot looks like this."""
    return isinstance(value, np.ndarray) and value.ndim > 0 and (value.dtype == np.uint8 or value.ndim > 2)


# --- checking -----------------------------------------------------------------------------------------------------


def _images(found: Mapping[str, tuple[str, Any]], robot: Embodiment, *, layout_declared: bool) -> Pictures:
    """Checked images in the embodiment's order. layout_declared: the camera's `chw` holds (not for an Observation)."""
    out = []
    for camera in robot.cameras:
        if camera.view in found:
            key, value = found[camera.view]
            out.append((camera.view, check_image(value, key=key, chw=camera.chw and layout_declared)))
        elif camera.required:
            raise _missing_camera(camera)
    if not out:
        raise ObservationError("no camera image", wanted=f"at least one of {[camera.key for camera in robot.cameras]}")
    return tuple(out)


def _missing_camera(camera: Camera) -> ObservationError:
    return ObservationError(
        f"image {camera.key!r} is missing", wanted=f"uint8 {'[3, h, w]' if camera.chw else '[h, w, 3]'}"
    )


def _state(
    request: Mapping[str, Any], parts: tuple[StatePart, ...], *, dtype: type[np.floating[Any]]
) -> NDArray[Any] | None:
    """The state parts, concatenated; None if none of them was sent, an error if some of them are missing."""
    found = [(part, _first(request, (part.key, *part.aliases))) for part in parts]
    if all(hit is None for _, hit in found):
        return None
    vectors = []
    for part, hit in found:
        if hit is None:
            raise ObservationError(f"state {part.key!r} is missing", wanted=f"{part.size} numbers {part.units}".strip())
        vectors.append(_vector(hit[1], key=hit[0], size=part.size, dtype=dtype))
    return np.concatenate(vectors)


def _vector(value: Any, *, key: str, size: int, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """A finite vector [size]; a bare number counts as one value."""
    wanted = f"{size} finite numbers"
    try:
        array = np.asarray(value)
    except ValueError as error:  # nested lists of unequal length
        raise ObservationError(f"state {key!r} is not a vector", got=str(error), wanted=wanted) from error
    got = f"{array.dtype} {list(array.shape)}"
    if array.dtype.kind not in "fiu":
        raise ObservationError(f"state {key!r} has the wrong dtype", got=got, wanted=wanted)
    if array.ndim == 0:
        array = array[None]
    if array.shape != (size,):
        raise ObservationError(f"state {key!r} has the wrong size", got=got, wanted=wanted)
    with np.errstate(over="ignore"):
        vector: NDArray[Any] = array.astype(dtype)
    if not np.isfinite(vector).all():
        where = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise ObservationError(f"state {key!r} is not finite", got=f"{array[where]} at index {where}", wanted=wanted)
    return vector


def _text(value: Any, *, key: str) -> str:
    """A string; bytes are UTF-8 (DROID's client), an array with one string is that string (openpi)."""
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ObservationError(f"prompt {key!r} is not UTF-8", got=str(error), wanted="UTF-8 bytes") from error
    if not isinstance(value, str):
        raise ObservationError(f"prompt {key!r} is not text", got=type(value).__name__, wanted="str or UTF-8 bytes")
    return value


def _tokens(value: Any, mask: Any) -> NDArray[np.int32]:
    """Valid token ids of an already tokenised prompt: int [L], `mask` bool [L] or absent."""
    ids = np.asarray(value) if isinstance(value, (np.ndarray, list, tuple)) else np.empty(0, dtype=object)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise ObservationError(f"{TOKEN_KEY!r} is malformed", got=f"{ids.dtype} {list(ids.shape)}", wanted="int [L]")
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise ObservationError(f"{TOKEN_KEY!r} holds impossible ids", got=f"{ids.min()} .. {ids.max()}", wanted=">= 0")
    if mask is None or mask is ABSENT:
        return ids.astype(np.int32)
    valid = np.asarray(mask)
    if valid.dtype != np.bool_ or valid.shape != ids.shape:
        raise ObservationError(
            f"{TOKEN_MASK_KEY!r} is malformed",
            got=f"{valid.dtype} {list(valid.shape)}",
            wanted=f"bool {list(ids.shape)}",
        )
    kept: NDArray[np.int32] = ids[valid].astype(np.int32)
    return kept
