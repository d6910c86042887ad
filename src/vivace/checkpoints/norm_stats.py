"""openpi's statistics: `assets/<asset id>/norm_stats.json`, where an asset id may itself contain slashes.

The file is `{"norm_stats": {"state": {mean, std, q01, q99}, "actions": {...}}}`; older writers left the wrapper out, and
q01/q99 are null where a dataset was measured before quantiles were used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..types import NormStats, PolicyKind, RobotFacts
from .folder import read_json, tokenizer_dir

FILE = "norm_stats.json"
REPAIR = (
    "copy the file again from the training run, or compute the statistics again (openpi: scripts/compute_norm_stats.py)"
)
PROMPT_TOKENS = {"pi0": 48, "pi05": 200}


def openpi_facts(folder: Path, kind: PolicyKind) -> RobotFacts:
    """What an openpi folder says about its robot: only statistics; cameras and action meaning come from an embodiment."""
    stats = load_assets(folder)
    pi05 = kind == "pi05"
    notes = []
    for asset, (state, _) in stats.items():
        if pi05 and state.q01 is None:
            notes.append(f"asset {asset!r} has no quantiles, which pi0.5 normalises with")
    return RobotFacts(
        source="openpi",
        stats=stats,
        state_mode="quantiles" if pi05 else "mean_std",
        action_mode="quantiles" if pi05 else "mean_std",
        eps=1e-6,
        prompt="openpi_pi05" if pi05 else "openpi_pi0",
        max_prompt_tokens=PROMPT_TOKENS[kind],
        tokenizer_dir=tokenizer_dir(folder),
        notes=tuple(notes),
    )


def load_assets(folder: Path) -> dict[str, tuple[NormStats, NormStats]]:
    """{asset id: (state, actions)} of every norm_stats.json under `assets/`; a file in the folder itself has the id ""."""
    root = folder / "assets"
    out = {}
    if (folder / FILE).is_file():
        out[""] = load_norm_stats(folder / FILE)
    if root.is_dir():
        for file in sorted(root.rglob(FILE)):
            out[file.parent.relative_to(root).as_posix()] = load_norm_stats(file)
    return out


def load_norm_stats(file: Path) -> tuple[NormStats, NormStats]:
    """Read one file. Raises CheckpointError naming the entry that is missing, ragged or not finite."""
    table = read_json(file)
    table = table.get("norm_stats", table)
    if not isinstance(table, dict) or "state" not in table or "actions" not in table:
        got = sorted(table) if isinstance(table, dict) else type(table).__name__
        raise CheckpointError(
            f"{file} has no statistics", got=got, wanted="norm_stats with state and actions", do=REPAIR
        )
    return _vector_stats(file, "state", table["state"]), _vector_stats(file, "actions", table["actions"])


def _vector_stats(file: Path, name: str, entry: Any) -> NormStats:
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{file}: {name} has no statistics", got=type(entry).__name__, wanted="a table", do=REPAIR
        )
    arrays = {key: _vector(file, f"{name}.{key}", entry.get(key)) for key in ("mean", "std", "q01", "q99")}
    sizes = {key: array.shape[0] for key, array in arrays.items() if array is not None}
    if len(set(sizes.values())) != 1:
        raise CheckpointError(f"{file}: statistics of {name} differ in length or are empty", got=sizes, do=REPAIR)
    return NormStats(**arrays)


def _vector(file: Path, name: str, value: Any) -> NDArray[np.float64] | None:
    if value is None:
        return None
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {name} is not a list of numbers", got=str(error)[:100], do=REPAIR) from error
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise CheckpointError(
            f"{file}: {name} cannot be used", got=str(value)[:100], wanted="finite numbers, one a dim", do=REPAIR
        )
    return array
