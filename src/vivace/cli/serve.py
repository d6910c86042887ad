"""`vivace serve`: answer robots over openpi's websocket protocol."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from ..errors import ConfigError
from ..serving.options import ServerOptions
from ..serving.server import PolicyServer
from .output import OK, console
from .policy_args import PolicyArgs, load


@dataclass(frozen=True)
class Args:
    """Serve a checkpoint to openpi's clients until SIGINT or SIGTERM.

    Example: vivace serve pi05_droid/ --embodiment droid --port 8000
    """

    path: tyro.conf.Positional[Path]
    """Checkpoint folder: openpi PyTorch, openpi JAX, or LeRobot."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 = every network of this machine: then set --api-key-file."""
    port: int = 8000
    """0 = a free port; the listening line says which."""
    policy: tyro.conf.OmitArgPrefixes[PolicyArgs] = field(default_factory=PolicyArgs)
    backend: str = "auto"
    """How to execute; auto = the fastest that can run here. See vivace doctor."""
    precision: str = "auto"
    """float32, bfloat16, auto = what the checkpoint declares, or a plan file (vivace calibrate)."""
    api_key_file: Path | None = None
    """File with the key that clients must send as Authorization: Api-Key KEY."""
    max_message_mb: int = 64
    """Largest request in MiB; a larger one ends its connection."""
    max_connections: int = 64
    """Clients at once."""
    inline_below_ms: float = 50.0
    """The only client of recorded graphs is answered on the event loop while answers take less than this; 0 = never."""
    metrics: bool | None = None
    """Count for Prometheus at /metrics; None = if prometheus-client is installed."""
    debug: bool = False
    """Error frames carry a traceback, and the log is verbose."""


def run(args: Args) -> int:
    """Load, warm up, listen, serve; ends after a signal."""
    _log_to_stderr(debug=args.debug)
    api_key = None if args.api_key_file is None else _read_key(args.api_key_file)
    options: dict[str, Any] = {
        "host": args.host, "port": args.port, "api_key": api_key, "max_message_bytes": args.max_message_mb * 2**20,
        "max_connections": args.max_connections, "inline_below_ms": args.inline_below_ms, "debug": args.debug,
    }  # fmt: skip
    ServerOptions(**options)  # refuses what cannot be used before minutes of loading
    with console.status(f"loading {args.path}"):
        policy = load(args.path, args.policy, backend=args.backend, precision=args.precision)
    server = PolicyServer(policy, metrics=args.metrics, **options)
    console.print("warming up", highlight=False)
    asyncio.run(server.run(ready=announce))
    return OK


def announce(server: PolicyServer) -> None:
    """Say that clients may come: a line for people on stderr, a line of JSON on stdout for scripts that wait."""
    host, port, engine = server.options.host, server.port, server.engine
    console.print(
        f"listening on ws://{host}:{port}  {engine.policy_kind}, {engine.backend} on {engine.device}, {engine.precision}, "
        f"{engine.num_denoise_steps} steps, horizon {engine.horizon}; healthz"
        + (", metrics" if server.metrics.page() else ", no metrics")
        + (", api key required" if server.options.api_key else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    event = {"event": "listening", "host": host, "port": port, "engine": engine.to_json()}
    sys.stdout.write(json.dumps(event, default=str) + "\n")
    sys.stdout.flush()


def _read_key(path: Path) -> str:
    """The key in a file, without the white space around it."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api key file {path} cannot be read", got=str(error), do="write the key into it") from error


def _log_to_stderr(*, debug: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    # The library logs every port scan as an error with a traceback; refused handshakes are counted instead.
    logging.getLogger("vivace.serving.server.websockets").setLevel(logging.DEBUG if debug else logging.CRITICAL)
