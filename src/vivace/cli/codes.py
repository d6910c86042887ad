"""Exit codes of every verb."""

from __future__ import annotations

OK, FAILED, BAD_USE = 0, 1, 2
