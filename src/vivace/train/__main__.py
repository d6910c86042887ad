"""`python -m vivace.train RECIPE OUT [SECONDS]`: `vivace train` for bare machines: no tyro, no rich.

Prints every report as a line of JSON and writes it to OUT/log.jsonl. Uses the GPU if there is one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import VivaceError
from .config import read_recipe
from .loop import prepare, train


def main(arguments: list[str]) -> int:
    """0 done, 2 bad use."""
    if len(arguments) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    recipe, out = Path(arguments[0]), Path(arguments[1])
    try:
        seconds = float(arguments[2]) if len(arguments) == 3 else None
        prepare(out)
    except (VivaceError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:

        def report(row: dict[str, Any]) -> None:
            line = json.dumps({"t_s": round(time.perf_counter() - began, 2), **row})
            log.write(line + "\n")
            log.flush()
            print(line, flush=True)

        report({"event": "start", "device": str(device), "torch": torch.__version__})
        try:
            train(
                read_recipe(recipe), out, device=device, report=report, compiled=device.type == "cuda",
                seconds=seconds,
            )  # fmt: skip
        except VivaceError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
