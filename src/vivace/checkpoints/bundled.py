"""Policies that come with vivace, found by name: `vivace serve conveyor-small`.

A folder of that name in the working directory goes first, so that a name never hides what a person made.
"""

from __future__ import annotations

from pathlib import Path

POLICIES = Path(__file__).parent.parent / "policies"


def names() -> list[str]:
    """What can be asked for."""
    return sorted(folder.name for folder in POLICIES.iterdir() if folder.is_dir()) if POLICIES.is_dir() else []


def find(path: Path) -> Path:
    """The bundled folder, if `path` is a name and nothing else; otherwise `path` itself."""
    if not path.exists() and len(path.parts) == 1 and path.name in names():
        return POLICIES / path.name
    return path
