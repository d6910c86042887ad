"""Where the verbs write: people read tables on stderr, machines read JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

OK, FAILED, BAD_USE = 0, 1, 2

# a log file has no width: keep tables whole there instead of folding them at 80 columns
console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


def emit(result: Any) -> None:
    """Write one JSON document to stdout."""
    json.dump(result, sys.stdout, indent=1, default=str, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()
