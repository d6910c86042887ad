"""A library that cannot be imported: say which, in one line. Standard library only, because any library may be the one.

Libraries break in many ways (missing, built for another machine, compiled against another version), and raise what they
like. What tells such an error from a mistake of ours is where it came from: the body of a module that is not vivace's,
while that module was being imported.
"""

from __future__ import annotations

import json
import sys
import traceback

from ..check import health
from .codes import FAILED

IMPORT_FAILURES = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    NameError,
    SyntaxError,
    SystemError,
)
"""What libraries were seen to raise while they are imported; `broken_import` then looks at where it came from."""


def broken_import(error: BaseException) -> str | None:
    """The library whose import raised `error`, or None when something else did."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "<module>" and (name := _library(str(frame.f_globals.get("__name__", "")))):
            found = name  # the innermost: torch may be fine and what it imports broken
    if found is None and isinstance(error, ImportError):
        found = _library(error.name or "")
    if found is None and isinstance(error, SyntaxError):
        found = error.filename
    return found


def explain(verb: str, library: str, error: BaseException) -> str:
    """One line: what is broken, and where to look."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    reason = f"{type(error).__name__}: {said}"
    look = "" if verb == "doctor" else "; see vivace doctor"
    return f"vivace {verb}: {library} cannot be imported ({reason}){look}"


def plain_doctor() -> int:
    """The findings of `vivace doctor` as plain lines on stderr and as JSON on stdout; its options are not read."""
    print("this is the plain report, options are ignored", file=sys.stderr)
    checks, facts = health.examine()
    for check in checks:
        do = f"; {check.do}" if check.do and check.state != "fine" else ""
        print(f"{check.state:8} {check.name}: {check.found}{do}", file=sys.stderr)
    json.dump(health.document(checks, facts), sys.stdout, indent=1)
    print()
    return FAILED


def _library(module: str) -> str | None:
    top = module.partition(".")[0]
    return top if top and top not in {"vivace", "__main__", *sys.stdlib_module_names} else None
