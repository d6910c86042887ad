"""A `vivace serve` in a process of its own, for the examples that drive one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(checkpoint: Path | str, *options: str) -> Iterator[int]:
    """Serve a checkpoint on a free port of this machine; yields the port that the listening line names.

    The server is stopped by its own handle. Raises SystemExit if it ends before it listens.
    """
    command = [sys.executable, "-m", "vivace.cli.main", "serve", str(checkpoint), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            event = json.loads(server.stdout.readline() or '{"event": "the server ended before it listened"}')
            if event["event"] != "listening":
                raise SystemExit(f"server: {event}")
            yield int(event["port"])
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=30)
