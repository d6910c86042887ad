"""A clip inside the page: the file's own bytes as a data URL, so that the report stays one file and fetches nothing.

An animation (.webp, .gif) is an image to a browser, an .mp4 a video with controls. The first bytes say what a file really
is: a wrong ending would leave a hole in the page, and nobody would know why.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .report_html import esc

MEDIA_TYPES = {".webp": "image/webp", ".gif": "image/gif", ".mp4": "video/mp4"}
MAX_BYTES = 8_000_000
"""A page with base64 of more than this is slow to open and too large for most mail."""


@dataclass(frozen=True)
class Clip:
    """name: of the file, which becomes the caption. data: the whole file."""

    name: str
    media_type: str
    data: bytes


def is_clip(path: Path) -> bool:
    """Whether the ending is that of a clip."""
    return path.suffix.lower() in MEDIA_TYPES


def read_clip(path: Path) -> Clip:
    """Read a .webp, .gif or .mp4.

    Raises: ConfigError where the file is missing, larger than MAX_BYTES, or something else than its ending says.
    """
    wanted = MEDIA_TYPES[path.suffix.lower()]
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"{path.name} is too large to put into a page", got=f"{size / 1e6:.1f} MB",
                wanted=f"at most {MAX_BYTES / 1e6:g} MB", do="take one shorter episode, or .mp4, which is the smallest",
            )  # fmt: skip
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the clip {path}", got=error) from error
    if (got := media_type(data)) != wanted:
        raise ConfigError(
            f"{path.name} is not what its ending says", got=got or f"bytes {data[:12]!r}", wanted=wanted,
            do="pass a file written with vivace simulate --video FILE",
        )  # fmt: skip
    return Clip(path.name, wanted, data)


def media_type(data: bytes) -> str | None:
    """What the first bytes say; None for anything but the three kinds."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "image/gif"
    return "video/mp4" if data[4:8] == b"ftyp" else None


def figure(clip: Clip) -> str:
    """The clip with its caption, as HTML."""
    source = f"data:{clip.media_type};base64,{base64.b64encode(clip.data).decode('ascii')}"
    if clip.media_type.startswith("video/"):
        shown = f'<video src="{source}" controls autoplay loop muted playsinline></video>'
    else:
        shown = f'<img src="{source}" alt="{esc(clip.name)}">'
    caption = f"{clip.name}, {len(clip.data) / 1e6:.1f} MB, inside this page"
    return f'<figure class="clip">{shown}<figcaption>{esc(caption)}</figcaption></figure>'
