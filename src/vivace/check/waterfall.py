"""One technique after the other: what each added to the row above, in milliseconds and in error, from one result.

Read from results of `vivace bench --preset hopper`. A technique that was not measured has no row; nothing is filled in,
and the row below says that it adds both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import number

STEPS: tuple[tuple[str, str], ...] = (
    ("eager", "plain PyTorch, bfloat16"),
    ("compiled graph", "+ torch.compile and one CUDA graph"),
    ("cuda_graph bf16", "+ own kernels, early launch, constants folded"),
    ("cuda_graph fp8-mlp", "+ MLPs of the prefix in FP8"),
    ("cuda_graph fp8-full", "+ QKV and O of the prefix in FP8"),
    ("cuda_graph fp8-prefix+vision", "+ SigLIP in FP8"),
    ("cuda_graph fp8-all", "+ action expert in FP8"),
)
"""Engine of a row, and what it adds to the one above."""
CARRIED = {"eager": "bfloat16", "compiled graph": "+ one CUDA graph"}
"""What the rows below also have where this one was not measured, if that is less than what it adds."""


@dataclass(frozen=True)
class Step:
    """One row.  Errors are against float32 on the same weights; NaN = not measured.

    of_above   p50 of the row above over this one: above 1 = faster
    of_first   the same against the first row
    """

    engine: str
    adds: str
    p50_ms: float
    p99_ms: float
    calls: int
    of_above: float
    of_first: float
    rel_l2: float
    cosine_mean: float
    cosine_worst: float


def alike(document: Mapping[str, Any]) -> str:
    """Equal for results whose rows may stand in one waterfall: GPU, weights, network, engine and batch are the same."""
    gpus = [gpu["name"] for gpu in (document.get("environment") or {}).get("gpus") or []]
    setup = document["setup"]
    return json.dumps([gpus, *(setup.get(name) for name in ("network", "weights", "engine", "batch"))], sort_keys=True)


def merged(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of several results, what `waterfall` reads of one; where two have the same row, the first one's counts."""
    rows: dict[tuple[str, ...], Any] = {}
    scores: dict[tuple[str, ...], Any] = {}
    for document in documents:
        for row in document["rows"]:
            rows.setdefault((row["setting"], row["engine"], row["boundary"]), row)
        for row in document["accuracy"]:
            scores.setdefault((row["setting"], row["engine"]), row)
    return {"rows": list(rows.values()), "accuracy": list(scores.values())}


def settings(document: Mapping[str, Any]) -> list[str]:
    """Settings with rows at B0, in the order of the result."""
    return list(dict.fromkeys(row["setting"] for row in document["rows"] if row["boundary"] == "B0"))


def waterfall(document: Mapping[str, Any], setting: str) -> tuple[Step, ...]:
    """The steps that were measured in this setting at boundary B0."""
    rows = {r["engine"]: r for r in document["rows"] if r["setting"] == setting and r["boundary"] == "B0"}
    steps: list[Step] = []
    passed_over: list[str] = []
    for engine, what in STEPS:
        if engine not in rows:
            passed_over.append(CARRIED.get(engine, what))
            continue
        adds = " ".join([*passed_over, what])
        passed_over = []
        p50 = number(rows[engine]["latency"]["p50_ms"])
        error = _errors(document, setting, engine)
        steps.append(
            Step(
                engine, adds, p50, number(rows[engine]["latency"]["p99_ms"]), int(rows[engine]["calls"]),
                of_above=steps[-1].p50_ms / p50 if steps else 1.0, of_first=steps[0].p50_ms / p50 if steps else 1.0,
                rel_l2=number(error.get("rel_l2", math.nan)), cosine_mean=number(error.get("cosine_mean", math.nan)),
                cosine_worst=number(error.get("cosine_worst", math.nan)),
            )
        )  # fmt: skip
    return tuple(steps)


def _errors(document: Mapping[str, Any], setting: str, engine: str) -> Mapping[str, Any]:
    """Scores of this engine; plain PyTorch's own are stored beside those of every other engine."""
    for row in document["accuracy"]:
        if row["setting"] == setting and (row["engine"] == engine or engine == "eager"):
            found: Mapping[str, Any] = row["plain_bfloat16"] if engine == "eager" else row
            return found
    return {}
