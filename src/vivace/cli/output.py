"""Where the verbs write: people read tables on stderr, machines read JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

OK, FAILED, BAD_USE = 0, 1, 2

console = Console(stderr=True)


def emit(result: Any) -> None:
    """Write one JSON document to stdout."""
    json.dump(result, sys.stdout, indent=1, default=str, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()
