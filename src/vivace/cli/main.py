"""`vivace VERB ...`: one file per verb, imported when it is called, so that `vivace doctor` works when others cannot.

This file and what it imports need the standard library alone.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from ..errors import VivaceError
from .broken import IMPORT_FAILURES, broken_import, explain, plain_doctor
from .codes import BAD_USE, OK

VERBS: dict[str, str] = {
    "inspect": "say what a checkpoint is: kind, sizes, cameras, state, normalisation, prompt, what is missing",
    "serve": "answer robots over openpi's websocket protocol",
    "calibrate": "a precision plan (FP8) from recorded observations, layer sensitivities, a plan within an error bound",
    "check": "compare an engine with the float32 reference, layer by layer, step by step, in robot units",
    "build": "TensorRT engines of a policy, for GPUs that need not be here",
    "bench": "time named engines side by side: percentiles, stages, environment",
    "budget": "what must shrink, and by how much, to reach a control rate",
    "simulate": "success against inference delay in a simulated pick-up task (scripted expert or a policy)",
    "record": "demonstrations of the scripted expert as a LeRobot dataset",
    "train": "flow-matching training of a policy from a recipe: data, steps, checkpoint folder, success rates",
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
        _say(f"unknown verb {verb!r}.{hint}")
        return BAD_USE
    try:
        return _run(verb, rest)
    except IMPORT_FAILURES as error:
        library = broken_import(error)
        if library is None:
            raise
        _say(explain(verb, library, error))
        return plain_doctor() if verb == "doctor" else BAD_USE


def _run(verb: str, rest: Sequence[str]) -> int:
    module = importlib.import_module(f"vivace.cli.{verb.replace('-', '_')}")
    import tyro

    from . import output

    try:
        args = tyro.cli(module.Args, args=list(rest), prog=f"vivace {verb}")
        code: int = module.run(args)
    except VivaceError as error:
        output.console.print(f"[red]{type(error).__name__}:[/red] ", end="")
        output.console.print(str(error), markup=False, highlight=False)
        return BAD_USE
    except SystemExit as stop:  # tyro: 0 after --help, 2 after a bad option
        return stop.code if isinstance(stop.code, int) else BAD_USE
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    return code


def _usage() -> None:
    _say("usage: vivace VERB [options]      vivace VERB --help\n")
    for verb, summary in VERBS.items():
        _say(f"  {verb:16} {summary}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
