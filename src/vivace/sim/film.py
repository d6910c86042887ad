"""One episode to look at: an annotated clip, and a log for Rerun. Rendered on every frame, so it is slow and apart.

Watching changes nothing: cameras read the state, and the exposure of a frame is a function of the tick.
.mp4 needs PyAV (vivace[video]); .webp and .gif are written by Pillow, which is always there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import ConfigError, Unsupported
from ..types import Observation
from .actors import Options, load
from .arms import EXPERT, Arm
from .campaign import environment, play, warm
from .conveyor import ConveyorEnv
from .episode import HELD, Episode
from .rollout import Moment
from .scene import CONTROL_HZ

Frame = NDArray[np.uint8]
EVERY = 2
"""Ticks per frame: 25 frames a second, real time."""
VIEW_PX = 256
NAMES = ("front", "wrist", "front, 100 ms ago")
CHUNK_COLOURS = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167))
"""One chunk after the other; distinguishable with any colour vision (Okabe and Ito)."""
WAITING = (120, 120, 120)


def record(arm: Arm, *, seed: int, options: Options, video: Path | None, rerun: Path | None) -> Episode:
    """Play one episode of an arm and write it. Raises Unsupported or ConfigError before the episode starts."""
    writers: list[tuple[Path, Callable[[Sequence[Frame], Path], None]]] = []
    if video is not None:
        writers.append((video, video_writer(video)))
    logger = None if rerun is None else RerunLog(rerun)
    env = environment(arm, options=options)
    frames: list[Frame] = []

    def watch(moment: Moment) -> None:
        if moment.tick % EVERY:
            return
        seen = env.look()
        if writers:
            frames.append(annotate(seen, moment, title=_title(arm, env)))
        if logger is not None:
            logger.log(seen, moment)

    try:
        if arm.policy != EXPERT:
            warm(load(arm.policy, arm.engine, arm.precision, arm.steps, options), arm, env, seed=seed)
        episode = play(env, arm, seed=seed, options=options, watch=watch)
    finally:
        env.close()
    for path, write in writers:
        path.parent.mkdir(parents=True, exist_ok=True)
        write([*frames, *[frames[-1]] * 12], path)  # the last frame stays for half a second
    if logger is not None:
        logger.close()
    return episode


def annotate(seen: Observation, moment: Moment, *, title: str) -> Frame:
    """The views side by side, and below them the instruction, the chunk in use, and the age of what is acted on."""
    views = list(seen.views.values())
    width, text = VIEW_PX * len(views), 64
    picture = Image.new("RGB", (width, VIEW_PX + text), (20, 20, 24))
    draw = ImageDraw.Draw(picture)
    small, large = ImageFont.load_default(13), ImageFont.load_default(17)
    for i, (view, name) in enumerate(zip(views, NAMES, strict=True)):
        picture.paste(Image.fromarray(view).resize((VIEW_PX, VIEW_PX), Image.Resampling.NEAREST), (i * VIEW_PX, 0))
        draw.text((i * VIEW_PX + 6, 4), name, fill=(255, 255, 255), font=small, stroke_width=2, stroke_fill=(0, 0, 0))
    waiting = moment.age_ticks == HELD
    colour = WAITING if waiting else CHUNK_COLOURS[moment.chunk % len(CHUNK_COLOURS)]
    draw.rectangle((0, VIEW_PX, width, VIEW_PX + 5), fill=colour)
    draw.text((8, VIEW_PX + 10), f'"{seen.prompt}"', fill=(255, 255, 255), font=large)
    age = (
        "waits"
        if waiting
        else f"chunk {moment.chunk}, action {moment.index}, age {moment.age_ticks * 1000 / CONTROL_HZ:.0f} ms"
    )
    draw.text((8, VIEW_PX + 36), f"{moment.tick / CONTROL_HZ:5.2f} s   {age}", fill=colour, font=large)
    draw.text((width - 8, VIEW_PX + 40), title, fill=(190, 190, 190), font=small, anchor="ra")
    return np.asarray(picture)


def video_writer(path: Path) -> Callable[[Sequence[Frame], Path], None]:
    """How to write this kind of file. Raises ConfigError for another ending, Unsupported where PyAV is missing."""
    ending = path.suffix.lower()
    if ending in (".webp", ".gif"):
        return write_animation
    if ending != ".mp4":
        raise ConfigError("--video", got=str(path), wanted="a name that ends in .mp4, .webp or .gif")
    if importlib.util.find_spec("av") is None:
        raise Unsupported("an .mp4 needs PyAV", do="pip install 'vivace[video]', or write .webp or .gif")
    return write_mp4


def write_mp4(frames: Sequence[Frame], path: Path) -> None:
    """H.264, 25 frames a second, in a pixel format that browsers play; width and height must be even."""
    av: Any = importlib.import_module("av")
    height, width = frames[0].shape[:2]
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=int(CONTROL_HZ / EVERY))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_animation(frames: Sequence[Frame], path: Path) -> None:
    """An endless .webp or .gif."""
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=int(1000 * EVERY / CONTROL_HZ), loop=0)


class RerunLog:
    """Views, action, age and chunk over simulated time, for the Rerun viewer.

    Raises: Unsupported where rerun-sdk is missing or older than 0.23, ConfigError for another ending.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".rrd":
            raise ConfigError("--rerun", got=str(path), wanted="a name that ends in .rrd")
        if importlib.util.find_spec("rerun") is None:
            raise Unsupported("--rerun needs rerun-sdk, which is not installed", do="pip install 'vivace[rerun]'")
        self._rr: Any = importlib.import_module("rerun")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._rr.RecordingStream("vivace")
        self._stream.save(str(path))

    def log(self, seen: Observation, moment: Moment) -> None:
        """One tick."""
        rr, stream = self._rr, self._stream
        stream.set_time("episode", duration=moment.tick / CONTROL_HZ)
        for name, view in seen.views.items():
            stream.log(f"views/{name}", rr.Image(view))
        for name, value in zip(("x", "y", "z", "grip"), moment.action, strict=True):
            stream.log(f"action/{name}", rr.Scalars(float(value)))
        age = float("nan") if moment.age_ticks == HELD else moment.age_ticks * 1000 / CONTROL_HZ
        stream.log("observation_age_ms", rr.Scalars(age))
        stream.log("chunk", rr.Scalars(float(moment.chunk)))
        stream.log("instruction", rr.TextLog(seen.prompt))

    def close(self) -> None:
        """Write what is buffered."""
        self._stream.flush()
        self._stream.disconnect()


def _title(arm: Arm, env: ConveyorEnv) -> str:
    speed = f"{env.world.drawn.belt_m_s:+.2f} m/s"
    return f"{arm.task}, belt {speed}, {arm.mode}, delay {arm.delay.name}"
