"""Folders to write to, tried before the work whose result goes there: hours may lie between the two."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .errors import ConfigError


def writable_folder(folder: Path, *, name: str) -> None:
    """Make a folder and write a file in it. Raises ConfigError where that fails; `name` says what the folder is for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{name} cannot be written to", got=f"{folder}: {error}", wanted="a folder") from error
