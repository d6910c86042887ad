"""One request to the model's inputs, and the model's actions back to the robot, in the order of the original software.

openpi (float64):   adapt state -> normalise -> prompt -> pad      | unnormalise -> absolute -> crop -> adapt back
LeRobot (float32):  normalise -> prompt -> pad                     | crop -> unnormalise -> absolute

The order matters: the prompt holds the normalised, unpadded state, and delta actions refer to the unnormalised one.
Views that a request lacks are left out; in the originals they are masked, which gives the same actions.

Source: openpi policies/policy_config.py and transforms.py; lerobot policies/pi0, pi05 processors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NumericsError, ObservationError, ShapeError
from ..types import Embodiment, Observation, PreparedObservation, RobotIO
from .actions import to_absolute
from .aloha import gripper_from_angle, gripper_to_angle
from .images import view_pil, view_torch
from .normalize import normalize_state, unnormalize_actions
from .prompt import check_ids, check_length, encode, segments
from .request import TOKEN_KEY, Words, pictures_of, words_of
from .tokenizer import Tokenizer, missing_tokenizer

MAX_WORKERS = 4  # no robot that pi0 was trained on has more cameras than that to look through
Convert = Callable[[NDArray[Any]], NDArray[Any]]
Empty = Callable[[tuple[int, ...], type[np.generic]], NDArray[Any]]
GRIPPER_ADAPTERS: dict[str, tuple[Convert, Convert]] = {"aloha": (gripper_to_angle, gripper_from_angle)}
"""Name -> (reading to model, model's action to command); "none" is not in it."""


@dataclass(frozen=True)
class SeenRequest:
    """A request of which only the pictures are checked and in model space: views and images as in PreparedObservation."""

    request: Observation | Mapping[str, Any]
    views: tuple[str, ...]
    images: NDArray[Any]


@dataclass(frozen=True)
class RobotPipeline:
    """The host side of a policy; stateless, so one serves every robot and every thread.

    tokenizer  None: only requests that carry `tokenized_prompt` (or `Observation.tokens`) can be answered
    workers    resize the views of one request side by side; Pillow and numpy let go of the interpreter meanwhile
    """

    io: RobotIO
    tokenizer: Tokenizer | None
    workers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="view"), repr=False, compare=False
    )

    def prepare(self, request: Observation | Mapping[str, Any]) -> PreparedObservation:
        """Check one request and bring it into model space: `see` and `read`.

        Raises: ObservationError naming the key, what came and what was wanted; ConfigError if text came and there is no
                tokenizer.
        """
        return self.read(self.see(request))

    def see(self, request: Observation | Mapping[str, Any], *, empty: Empty = np.empty) -> SeenRequest:
        """The first half of `prepare`: pictures found, checked and in model space, so that a GPU can begin with them.

        empty  makes the array that the pictures are written to: (shape, dtype) -> array
        """
        pictures = pictures_of(request, self.io.embodiment)
        views = tuple(view for view, _ in pictures)
        return SeenRequest(request, views, self._views([image for _, image in pictures], empty))

    def read(self, seen: SeenRequest) -> PreparedObservation:
        """The second half: state, prompt, and what should not be there. A GPU may look at the pictures meanwhile."""
        io = self.io
        parts = words_of(seen.request, io.embodiment, dtype=state_dtype(io))
        state_robot = self._state(parts)
        normalized = normalize_state(state_robot, io.normalization) if state_robot.size else state_robot
        tokens, text = self._prompt(parts, normalized)
        padded = np.zeros(io.action_width, dtype=np.float32)
        padded[: len(normalized)] = normalized
        return PreparedObservation(
            images=seen.images,
            tokens=tokens,
            state=padded,
            state_robot=state_robot,
            state_normalized=normalized,
            views=seen.views,
            prompt_text=text,
            t_obs=parts.t_obs,
        )

    def finish(self, actions: NDArray[np.float32], prepared: PreparedObservation) -> NDArray[Any]:
        """Bring actions [H, 32] of the model to the robot: [H, A], robot units, absolute.

        Returns float64 (openpi) or float32 (LeRobot).
        Raises: ShapeError for another width, NumericsError if a value is not finite.
        """
        io, robot = self.io, self.io.embodiment
        if actions.ndim != 2 or actions.shape[1] != io.action_width:
            raise ShapeError("actions have the wrong shape", got=list(actions.shape), wanted=f"[H, {io.action_width}]")
        if not np.isfinite(actions).all():
            raise NumericsError(
                "the network's actions are not finite", got=f"{int((~np.isfinite(actions)).sum())} values"
            )
        if io.normalization.flavour == "lerobot":
            cropped = unnormalize_actions(actions[:, : robot.action_dim], io.normalization)
            return to_absolute(cropped, prepared.state_robot, mask=robot.delta_mask)
        wide = to_absolute(unnormalize_actions(actions, io.normalization), prepared.state_robot, mask=robot.delta_mask)
        return adapt_actions(wide[:, : robot.action_dim], robot)

    def _views(self, images: list[NDArray[Any]], empty: Empty) -> NDArray[Any]:
        """Camera images to [V, 3, size, size], each copied once. A view that needs no resizing is not worth a thread.

        uint8 stays stored as it came, channels last: `collate` leaves the turning of axes to the device.
        """
        io = self.io
        small = all(max(image.shape) <= io.image_size for image in images)
        each = map if small or len(images) < 2 else self.workers.map
        V, size = len(images), io.image_size
        if io.image == "pil":
            out = empty((V, size, size, 3), np.uint8).transpose(0, 3, 1, 2)
        else:
            out = empty((V, 3, size, size), np.float32)
        for place, view in zip(out, each(lambda image: prepare_image(image, io), images), strict=True):
            place[...] = view
        return out

    def _state(self, parts: Words) -> NDArray[Any]:
        if parts.state is not None:
            return adapt_state(parts.state, self.io.embodiment)
        if needs_state(self.io):
            keys = [part.key for part in self.io.embodiment.state]
            raise ObservationError("the state is missing", wanted=f"{keys}")
        return np.zeros(0, dtype=state_dtype(self.io))

    def _prompt(self, parts: Words, normalized: NDArray[Any]) -> tuple[NDArray[np.int32], str]:
        io = self.io
        if parts.tokens is not None:
            check_length(len(parts.tokens), max_tokens=io.max_prompt_tokens)
            check_ids(parts.tokens, vocab_size=io.vocab_size, source=TOKEN_KEY)
            return parts.tokens, ""
        task = io.embodiment.default_prompt if parts.prompt is None else parts.prompt
        if task is None:
            raise ObservationError(
                f"prompt {io.embodiment.prompt_key!r} is missing",
                wanted="the instruction as text",
                do="send it with every request, or set default_prompt in the robot's TOML",
            )
        if self.tokenizer is None:
            raise missing_tokenizer(tried=[])
        parts_of_prompt = segments(
            io.prompt,
            task,
            normalized,
            state_in_prompt=io.embodiment.state_in_prompt,
            pad_state_to=io.pad_state_to,
        )
        tokens = encode(parts_of_prompt, self.tokenizer, max_tokens=io.max_prompt_tokens)
        check_ids(tokens, vocab_size=io.vocab_size, source=f"tokenizer {self.tokenizer.source!r}")
        return tokens, "".join(part.text for part in parts_of_prompt)


def state_dtype(io: RobotIO) -> type[np.floating[Any]]:
    """The arithmetic of the flavour: float64 for openpi, float32 for LeRobot."""
    return np.float64 if io.normalization.flavour == "openpi" else np.float32


def needs_state(io: RobotIO) -> bool:
    """Whether a request must carry the state: all but openpi's pi0.5 with neither state in the prompt nor delta actions."""
    return io.prompt != "openpi_pi05" or io.embodiment.state_in_prompt or any(io.embodiment.delta_mask)


def prepare_image(image: NDArray[Any], io: RobotIO) -> NDArray[Any]:
    """One checked camera image to [3, size, size]: uint8 (openpi) or float32 in [-1, 1] (LeRobot)."""
    if io.image == "pil":
        return view_pil(image, size=io.image_size)
    return view_torch(image, size=io.image_size, pad=io.image_pad)


def adapt_state(state: NDArray[Any], robot: Embodiment) -> NDArray[Any]:
    """Robot's own signs and gripper reading to those of the training data; identity for most robots."""
    signed = state * np.asarray(robot.joint_signs, dtype=state.dtype) if robot.joint_signs else state
    return _grippers(signed, robot, way=0)


def adapt_actions(actions: NDArray[Any], robot: Embodiment) -> NDArray[Any]:
    """Inverse direction, for action commands [..., A]; not the exact inverse of `adapt_state` for ALOHA's grippers."""
    signed = actions * np.asarray(robot.joint_signs, dtype=actions.dtype) if robot.joint_signs else actions
    return _grippers(signed, robot, way=1)


def _grippers(values: NDArray[Any], robot: Embodiment, *, way: int) -> NDArray[Any]:
    if robot.gripper_adapter == "none":
        return values
    out = values.copy()
    dims = list(robot.gripper_dims)
    out[..., dims] = GRIPPER_ADAPTERS[robot.gripper_adapter][way](values[..., dims])
    return out
