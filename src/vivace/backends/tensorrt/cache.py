"""Engines on disk: one file = one line that says what it is, one line of JSON with its identity, the engine's bytes.

An engine is used only if its identity is the wanted one and its bytes hash to what the header says. Everything else is
refused with the reason, and the caller builds anew: a driver, a module or a model that changed must never be met by
an old engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...config import cache_dir
from ...errors import ConfigError, Unsupported
from . import identity
from .identity import Identity
from .module import Module

MAGIC = b"vivace tensorrt engine 1\n"
SUFFIX = ".engine"
LONGEST_HEADER = 1 << 16
FORMAT = 2
"""Raised when engines of an older vivace would be bound or read otherwise, although their network looks the same."""
DRIVER = Path("/proc/driver/nvidia/version")
Machine = Mapping[str, str]
"""What an engine depends on beyond its identity: {"gpu": name, "driver": version}; {} for engines of TensorRT-RTX."""


@dataclass(frozen=True)
class Found:
    """An engine from disk, or None and why every candidate was refused."""

    engine: bytes | None
    path: Path | None
    refused: tuple[str, ...]


def folder() -> Path:
    """Where engines are kept."""
    return cache_dir() / "tensorrt"


def driver(*, path: Path = DRIVER) -> str:
    """The driver's version, "580.65.06"; "unknown" where it does not say."""
    try:
        found = re.search(r"\d+(\.\d+)+", path.read_text())
    except OSError:
        return "unknown"
    return found.group() if found else "unknown"


def machine(module: Module, device: torch.device | None) -> Machine:
    """Full TensorRT times its tactics on this GPU and driver; RTX's engines are compiled anew where they run."""
    if module.is_rtx or not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(device), "driver": driver()}


def key(who: Identity, here: Machine) -> str:
    """24 hex digits of everything that decides, for file names."""
    return hashlib.sha256(f"{who.key} {FORMAT} {sorted(here.items())}".encode()).hexdigest()[:24]


def store(
    where: Path, who: Identity, engine: bytes, *, facts: Mapping[str, Any], machine: Machine | None = None
) -> Path:
    """Write an engine; the file appears complete or not at all.  facts: for people (plan, checkpoint, build time)."""
    here = dict(machine or {})
    part = facts.get("part", "engine")
    path = where / f"{part}-{'-'.join(who.targets) or 'current'}-{key(who, here)}{SUFFIX}"
    header = {
        "identity": asdict(who), "format": FORMAT, "machine": here,
        "sha256": hashlib.sha256(engine).hexdigest(), "facts": dict(facts),
    }  # fmt: skip
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        where.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(MAGIC + json.dumps(header, default=str).encode() + b"\n")
            file.write(engine)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ConfigError(f"cannot write the engine {path}", got=error, do="name another folder") from error
    return path


def header(path: Path) -> dict[str, Any]:
    """The header of an engine file. Raises Unsupported if it is none of ours, or damaged."""
    try:
        with path.open("rb") as file:
            magic, line = file.readline(len(MAGIC) + 1), file.readline(LONGEST_HEADER)
    except OSError as error:
        raise Unsupported("cannot read an engine", got=error, do="build it again with `vivace build`") from error
    try:
        document: dict[str, Any] = json.loads(line) if magic == MAGIC else {}
        identity.read(document["identity"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise Unsupported("not an engine of this vivace", got=path, do="build it again with `vivace build`") from error
    return document


def load(path: Path, wanted: Identity, *, machine: Machine | None = None) -> bytes:
    """The engine in `path`. Raises Unsupported with the reason if it is foreign, stale or damaged."""
    document = header(path)
    reason = wanted.refusal(identity.read(document["identity"])) or _refusal(document, machine or {})
    if reason is None:
        with path.open("rb") as file:
            file.readline()
            file.readline()
            engine = file.read()
        if hashlib.sha256(engine).hexdigest() == document["sha256"]:
            return engine
        reason = "its bytes are not those that were written"
    raise Unsupported(f"the engine {path.name} cannot be used here", got=reason, do="build it with `vivace build`")


def _refusal(document: Mapping[str, Any], machine: Machine) -> str | None:
    theirs, version = document.get("machine", {}), document.get("format", 1)
    if version != FORMAT:
        return f"it has format {version}, wanted {FORMAT}"
    wrong = [name for name in machine if theirs.get(name) != machine[name]]
    return f"it was built with {wrong[0]} {theirs.get(wrong[0])}, here is {machine[wrong[0]]}" if wrong else None


def find(where: Path, wanted: Identity, *, machine: Machine | None = None) -> Found:
    """The first usable engine of a folder; reasons of engines for the same network that are not."""
    refused: list[str] = []
    for path in sorted(where.glob(f"*{SUFFIX}")):
        try:
            document = header(path)
            theirs = identity.read(document["identity"])
            if theirs.network != wanted.network:
                continue  # another network, not a stale one
            return Found(load(path, wanted, machine=machine), path, tuple(refused))
        except Unsupported as error:
            refused.append(f"{path.name}: {error.got}")
    return Found(None, None, tuple(refused))


def runtime_cache(module: str, version: str, capability: str) -> Path:
    """Where TensorRT-RTX keeps what it compiled for this GPU with this driver."""
    return folder() / f"{module}-{version}-{capability}-{driver()}.runtime"
