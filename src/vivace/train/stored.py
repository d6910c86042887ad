"""Datasets on disk <-> demonstrations: what `vivace record` writes and `vivace train` reads (LeRobot's format)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..robots.dataset import Episode, Frame, read_frames, read_info, write_dataset
from ..sim import scene
from ..sim.conveyor import VIEWS
from ..sim.record import Demo, Plan
from .pieces import Piece

IMAGES = tuple(f"observation.images.{view}" for view in VIEWS)
STATE, ACTION, EXECUTED, CHUNK = "observation.state", "action", "executed", "expert_chunk"
NAMES = {
    STATE: ["hand_x", "hand_y", "hand_z", "gap", "offset_x", "offset_y", "offset_z"],
    ACTION: ["x", "y", "z", "grip"],
    EXECUTED: ["x", "y", "z", "grip"],
}


def episode_of(demo: Demo) -> Episode:
    """A demonstration that was seen at every tick (stride 1)."""
    return Episode(
        images={name: demo.views[:, i] for i, name in enumerate(IMAGES)},
        vectors={
            STATE: demo.state, ACTION: demo.action, EXECUTED: demo.executed,
            CHUNK: demo.chunk.reshape(len(demo), -1),
        },
        tasks=demo.prompts,
    )  # fmt: skip


def write_demos(folder: Path, demos: Iterable[Demo], plan: Plan) -> dict[str, Any]:
    """Write the demonstrations that succeeded and return the dataset's info."""
    if plan.stride != 1:
        raise ConfigError("a dataset has an image at every tick", got=f"stride {plan.stride}", wanted="stride 1")
    extra = {"vivace": {"seed": plan.seed, "sigma": list(plan.sigma), "simulator": scene.versions()}}
    good = (episode_of(demo) for demo in demos if demo.success)
    return write_dataset(
        folder, good, fps=int(scene.CONTROL_HZ), robot_type="sawyer_conveyor", names=NAMES, extra=extra
    )


def read_pieces(folder: Path, *, horizon: int, image_px: int) -> list[Piece]:
    """Episodes for training. Without stored chunks the target is a window of later actions, the last one repeated.

    Raises: ConfigError for a dataset without the conveyor's features, or with images of another size.
    """
    features = read_info(folder)["features"]
    missing = [name for name in (*IMAGES, STATE, ACTION) if name not in features]
    if missing:
        raise ConfigError(f"{folder} lacks features of the conveyor", got=sorted(features), wanted=missing)
    if features[IMAGES[0]]["shape"][:2] != [image_px, image_px]:
        raise ConfigError(f"images of {folder}", got=features[IMAGES[0]]["shape"], wanted=f"{image_px} x {image_px}")
    groups = itertools.groupby(read_frames(folder), key=lambda frame: frame.episode)
    return [_piece(list(frames), horizon) for _, frames in groups]


def _piece(frames: list[Frame], horizon: int) -> Piece:
    action = np.stack([frame.vectors[ACTION] for frame in frames])
    if CHUNK in frames[0].vectors:
        chunk = np.stack([frame.vectors[CHUNK] for frame in frames]).reshape(len(frames), -1, action.shape[1])
    else:
        later = np.minimum(np.arange(len(frames))[:, None] + np.arange(horizon), len(frames) - 1)
        chunk = action[later]
    if chunk.shape[1] < horizon:
        raise ConfigError("stored chunks are too short", got=chunk.shape[1], wanted=f"at least {horizon}")
    return Piece(
        ticks=np.arange(len(frames)),
        views=np.stack([np.stack([frame.images[name] for name in IMAGES]) for frame in frames]),
        state=np.stack([frame.vectors[STATE] for frame in frames]),
        prompts=tuple(frame.task for frame in frames),
        executed=np.stack([frame.vectors.get(EXECUTED, frame.vectors[ACTION]) for frame in frames]),
        chunk=np.ascontiguousarray(chunk[:, :horizon]),
    )
