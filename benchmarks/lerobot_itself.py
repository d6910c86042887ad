"""LeRobot's own loader, processors and network beside vivace's, on folders that vivace wrote: names, values, actions.

    PYTHONPATH=src python benchmarks/lerobot_itself.py -o results.json

Needs lerobot with its extra pi. What is done, which three places of LeRobot are told our sizes, and what each number means:
tests/checkpoints/lerobot_side.py. tests/checkpoints/test_lerobot_itself.py holds the same numbers to their bounds.
"cases": {case: what `compare` returns}; "changed_in_lerobot": what of the installation is not as released, as told;
"outside_lerobots_bounds": packages of another version than its metadata wants.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from vivace.check import environment
from vivace.check.results import result, write_result

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "checkpoints"))
import lerobot_side  # noqa: E402  (beside the tests that use it too)

PACKAGES = ("lerobot", "transformers", "torch", "torchvision", "sentencepiece", "numpy")


def outside_bounds() -> dict[str, str]:
    """{package: its version, and what LeRobot with its extra pi wants}, of installed ones that it does not want."""
    from packaging.requirements import Requirement  # comes with lerobot

    found = {}
    for one in map(Requirement, metadata.requires("lerobot") or []):
        if one.marker is not None and not any(one.marker.evaluate({"extra": extra}) for extra in ("", "pi")):
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(one.name)
            if not one.specifier.contains(version, prereleases=True):
                found[one.name] = f"{version}, wanted {one.specifier}"
    return found


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description="LeRobot itself on our folders.")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--changed", default="nothing", help="what of the installed LeRobot is not as released")
    args = parser.parse_args()
    begin, before, cases = time.perf_counter(), environment.collect(), {}
    for case, write in lerobot_side.FOLDERS.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "policy"
            write(folder)
            cases[case] = found = lerobot_side.compare(folder)
        print(
            f"{case}: max abs {found['max_abs']:.2e} of {found['scale']:.2f}, relative L2 {found['rel_l2']:.2e}",
            flush=True,
        )
    body = {
        "what": "from_pretrained(strict=True) told our sizes; actions of one random observation, same noise",
        "versions": {name: metadata.version(name) for name in PACKAGES}, "changed_in_lerobot": args.changed,
        "outside_lerobots_bounds": outside_bounds(),
        "cases": cases, "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
    after = environment.collect()["state"]
    write_result(args.out, result("lerobot-itself", body, environment={**before, "after": after}))


if __name__ == "__main__":
    main()
