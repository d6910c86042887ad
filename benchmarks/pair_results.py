"""Pairs the arms of one result of `vivace simulate` with those of another, seed by seed, by the letters of both.

Two campaigns on equal seeds and in the same scene are pairs even if they ran on two machines. What this prints goes by hand
into one of the two files under a name such as "against_float32"; tests/docs/test_pairs.py makes every such block again.

python benchmarks/pair_results.py --by precision plans-fp8-cpu.json plans-cpu.json           every arm against the reference
python benchmarks/pair_results.py --by delay 100ms.json#0 plans-cpu.json untold.json         some arms, by their places

The last file is the reference. An arm is paired with the reference's arm of the same task, belt and delay, of which there
must be one. FILE#0,2 takes the arms at these places alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vivace.errors import ConfigError
from vivace.sim.outcomes import paired_letters

LABELS = {
    "precision": lambda row: Path(row["precision"]).stem,
    "delay": lambda row: row["delay"]["name"],
    "engine": lambda row: row["engine"],
    "mode": lambda row: row["mode"],
}


def arms(given: str) -> list[dict[str, Any]]:
    """The arms of FILE or FILE#0,2, each with what has to be equal for two arms to be pairs, as "where"."""
    file, _, places = given.partition("#")
    document = json.loads(Path(file).read_text(encoding="utf-8"))
    rows = document["arms"]
    chosen = rows if not places else [rows[int(place)] for place in places.split(",")]
    shared = document["seeds"], document["simulator"]["scene_sha256"], document["simulator"]["mujoco"]
    return [
        {**row, "where": [*shared, *(row["arm"][name] for name in ("task", "belt")), row["arm"]["delay"]["ticks"]]}
        for row in chosen
    ]


def pair(given: Sequence[str], reference: str, *, by: str, margin: float = 0.05) -> dict[str, Any]:
    """{label of an arm: `statistics.Paired` of it against the reference's arm}, in the order of the arms.

    Raises: ConfigError where an arm has no pair or several, where no pair ended whole, or where two arms have one label.
    """
    found: dict[str, Any] = {}
    others = arms(reference)
    for row in [row for one in given for row in arms(one)]:
        label = LABELS[by](row["arm"])
        mine = [other for other in others if other["where"] == row["where"]]
        if len(mine) != 1 or label in found:
            got = f"{len(mine)} arms of {reference}" if len(mine) != 1 else "two arms of this name"
            raise ConfigError(f"pairs of {label}", got=got, wanted="one, with equal seeds, scene, task, belt and delay")
        result = paired_letters(row["outcomes"], mine[0]["outcomes"], margin=margin)
        if result is None:
            raise ConfigError(f"pairs of {label}", got="crashes alone")
        found[label] = asdict(result)
    return found


def main() -> None:
    """Print the block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="FILE or FILE#PLACES, the reference last")
    parser.add_argument("--by", choices=LABELS, default="precision", help="what an arm is called")
    parser.add_argument("--margin", type=float, default=0.05, help="of non-inferiority, chosen before the run")
    given = parser.parse_args()
    if len(given.files) < 2:
        parser.error("at least two files: the last one is the reference")
    json.dump(pair(given.files[:-1], given.files[-1], by=given.by, margin=given.margin), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
