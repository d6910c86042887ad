"""`vivace VERB ...`: one file per verb, imported when it is called, so that `vivace doctor` works when others cannot."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from ..errors import VivaceError
from .output import BAD_USE, OK, console

VERBS: dict[str, str] = {
    "inspect": "say what a checkpoint is: kind, sizes, cameras, state, normalisation, prompt, what is missing",
    "serve": "answer robots over openpi's websocket protocol",
    "calibrate": "a precision plan (FP8) from recorded observations, layer sensitivities, a plan within an error bound",
    "check": "compare an engine with the float32 reference, layer by layer, step by step, in robot units",
    "bench": "time named engines side by side: percentiles, stages, environment",
    "budget": "what must shrink, and by how much, to reach a control rate",
    "report": "one self-contained HTML page from result files",
    "golden": "replay fixtures written by openpi and LeRobot, stage by stage",
    "doctor": "what this machine is and what can run on it",
    "make-checkpoint": "write a random checkpoint of any size, for self-tests without a download",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0 done, 1 a check failed, 2 bad use; as a console script this is the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        _usage()
        return OK if args else BAD_USE
    verb, rest = args[0], args[1:]
    if verb == "--version":
        from .. import __version__

        print(__version__)
        return OK
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " See vivace --help."
        console.print(f"[red]unknown verb {verb!r}.[/red]{hint}", highlight=False)
        return BAD_USE
    return _run(verb, rest)


def _run(verb: str, rest: Sequence[str]) -> int:
    module = importlib.import_module(f"vivace.cli.{verb.replace('-', '_')}")
    import tyro

    try:
        args = tyro.cli(module.Args, args=list(rest), prog=f"vivace {verb}")
        code: int = module.run(args)
    except VivaceError as error:
        console.print(f"[red]{type(error).__name__}:[/red] ", end="")
        console.print(str(error), markup=False, highlight=False)
        return BAD_USE
    except SystemExit as stop:  # tyro: 0 after --help, 2 after a bad option
        return stop.code if isinstance(stop.code, int) else BAD_USE
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    return code


def _usage() -> None:
    console.print("usage: vivace VERB [options]      vivace VERB --help\n", highlight=False, markup=False)
    for verb, summary in VERBS.items():
        console.print(f"  {verb:16} {summary}", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
