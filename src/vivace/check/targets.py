"""What speed, memory and accuracy are aimed at on one H100, beside what was measured.

A setting is (views, prompt tokens, chunk); batch 1, 10 Euler steps, 224-pixel views of 256 tokens. Latencies are p50 at
boundary B0 (graph replay on device buffers). "must" is the sum of pieces that were each measured alone before they were
put together; "stretch" nobody has shown. A number that is not finite meets nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError

Family = Literal["bfloat16", "fp8"]


@dataclass(frozen=True)
class Size:
    """One setting."""

    views: int
    prompt_tokens: int
    horizon: int

    @property
    def name(self) -> str:
        """As it is written in commands and results: "3,200,50"."""
        return f"{self.views},{self.prompt_tokens},{self.horizon}"


@dataclass(frozen=True)
class Target:
    """One number against its marks.  stretch None: there is none; the two `met` fields follow from the others."""

    what: str
    got: float
    rule: Literal["at most", "at least"]
    must: float
    stretch: float | None = None
    must_met: bool = False
    stretch_met: bool | None = None


SIZES: dict[str, Size] = {
    size.name: size for size in (Size(3, 200, 50), Size(3, 16, 50), Size(2, 0, 63), Size(2, 48, 10), Size(1, 48, 50))
}
"""The settings that results are compared in."""

# p50 at B0, milliseconds: (must, stretch)
LATENCY_MS: dict[tuple[str, Family], tuple[float, float]] = {
    ("3,200,50", "bfloat16"): (15.0, 12.0), ("3,200,50", "fp8"): (11.0, 8.5),
    ("3,16,50", "bfloat16"): (13.5, 11.0), ("3,16,50", "fp8"): (10.0, 8.0),
    ("2,0,63", "bfloat16"): (11.5, 9.0), ("2,0,63", "fp8"): (9.0, 7.0),
    ("2,48,10", "bfloat16"): (10.0, 8.0), ("2,48,10", "fp8"): (8.0, 6.0),
    ("1,48,50", "bfloat16"): (9.5, 7.5), ("1,48,50", "fp8"): (8.0, 6.0),
}  # fmt: skip
RIVAL_RATIO: dict[str, tuple[float, float]] = {
    "3,200,50": (2.3, 3.0), "3,16,50": (2.3, 2.9), "2,0,63": (2.2, 2.8), "2,48,10": (2.6, 3.5), "1,48,50": (2.2, 3.0),
}  # fmt: skip
"""FP8 against realtime-vla (a public engine, bfloat16) in the same rounds, p50 at B0: (must, stretch). That engine is no
part of this project: a result without it lists these among `not_run`, see `hopper_realtime_vla`."""
REUSE_MS: dict[Family, tuple[float, float]] = {"bfloat16": (6.5, 5.0), "fp8": (5.5, 4.0)}
"""A frame that reuses the prefix, chunk 50: the graph of the denoise stage alone."""
HOST_MS = 1.0
"""What `policy.infer` may add to a replay: B2 - B0."""
SERVED_MS = 1.5
"""What a websocket on the same machine may add to `policy.infer`: B3 - B2."""
TAIL = 1.05
"""p99 over p50."""
MEMORY = 1.15
"""Peak that torch reserves on the GPU while serving, over the plan's weights and keys and values."""
START_S = {"warm": 30.0, "cold": 120.0}
"""Process start until every bucket is warm, which is when a server listens; with and without compiled kernels on disk."""
FP8_COSINE_MEAN, FP8_COSINE_WORST = 0.999, 0.995
"""Final actions against float32, matched noise."""


def parse_size(text: str) -> Size:
    """ "3,200,50" -> Size. Raises ConfigError."""
    try:
        views, tokens, horizon = (int(part) for part in text.split(","))
    except ValueError as error:
        wanted = f"VIEWS,PROMPT TOKENS,CHUNK, e.g. one of {list(SIZES)}"
        raise ConfigError("cannot read a setting", got=repr(text), wanted=wanted) from error
    if views < 1 or tokens < 0 or horizon < 1:
        raise ConfigError("a setting needs a view and an action", got=text, wanted=f"e.g. one of {list(SIZES)}")
    return Size(views, tokens, horizon)


def at_most(what: str, got: float, must: float, stretch: float | None = None) -> Target:
    """A mark that small numbers meet."""
    met = None if stretch is None else got <= stretch
    return Target(what, got, "at most", must, stretch, math.isfinite(got) and got <= must, met)


def at_least(what: str, got: float, must: float, stretch: float | None = None) -> Target:
    """A mark that large numbers meet."""
    met = None if stretch is None else got >= stretch
    return Target(what, got, "at least", must, stretch, math.isfinite(got) and got >= must, met)


def holds(what: str, good: float, of: float) -> Target:
    """A mark that only all of `of` meet; nothing looked at is not met."""
    return at_least(what, good if of > 0 else math.nan, of)


def of_latency(setting: str, family: Family, *, p50_ms: float, p99_ms: float) -> list[Target]:
    """Marks of a row at B0; none for a setting that is not in the table."""
    if (setting, family) not in LATENCY_MS:
        return []
    must, stretch = LATENCY_MS[setting, family]
    return [at_most("B0 p50, ms", p50_ms, must, stretch), at_most("B0 p99 / p50", p99_ms / p50_ms, TAIL)]


def of_reuse(family: Family, *, p50_ms: float, same: int, calls: int) -> list[Target]:
    """Marks of replays of the denoise stage alone, chunk 50."""
    must, stretch = REUSE_MS[family]
    return [at_most("frame that reuses the prefix, ms", p50_ms, must, stretch), same_bits(same, calls)]


def same_bits(same: int, calls: int) -> Target:
    """Every call gives the bits of the first."""
    return holds("calls with the bits of the first", same, calls)


def warmed_up(stable: bool) -> Target:
    """The timing of an engine that still changes says little."""
    return holds("warm-up ended because times had settled", int(stable), 1)


def of_memory(*, reserved: int, needed: int) -> Target:
    """What the engine keeps from others, over what it must hold. Reserved: a graph's working memory is never free."""
    return at_most("peak reserved while serving over weights + K,V", reserved / needed, MEMORY)


def of_start(caches: Literal["cold", "warm"], *, every_bucket_s: float) -> Target:
    """A server listens when every bucket is warm."""
    what = f"process start until every bucket is warm, {caches} kernel caches, s"
    return at_most(what, every_bucket_s, START_S[caches])


def of_two_calls(*, same: int, of: int) -> Target:
    """What is timed (`infer`), what a robot gets (`look`, `infer`) and what conformance looks at give the same bits."""
    return holds("observations in which infer, with and without look, has the bits of denoise(prefill)", same, of)


def of_coverage(*, ran: int, fell: int) -> list[Target]:
    """Marks of a coverage row: something was written down, and nothing ran otherwise than the plan says."""
    return [
        at_least("operations that were seen to run", ran, 1),
        at_most("layers that did not run as the plan says", fell, 0),
    ]


def of_proof(row: Mapping[str, Any]) -> list[Target]:
    """Marks of a proof row: every change moved the actions and back, and poisoned memory changed nothing."""
    parts = [value for part in ("fresh", "fresh_policy") for value in row.get(part, {}).values()]
    poison = row["poisoned"]
    return [
        holds("changes of the request that are seen, and undone", sum(map(bool, parts)), len(parts)),
        holds("replays over poisoned memory with the same bits", poison["same"], poison["replays"]),
    ]


def of_soak(
    *, tail: float, allocated_growth: int, reserved_growth: int, same: int, checks: int
) -> list[Target]:  # fmt: skip
    """Marks of a soak: as fast at the end, no more memory, the same bits at every check."""
    return [
        at_most("p99 / p50", tail, TAIL),
        at_most("growth of allocated memory, bytes", allocated_growth, 0),
        at_most("growth of reserved memory, bytes", reserved_growth, 0),
        holds("checks with the bits of the first call", same, checks),
    ]


def of_accuracy(family: Family, summary: Mapping[str, Any], plain: Mapping[str, Any]) -> list[Target]:
    """Marks of final actions: bfloat16 against plain PyTorch in bfloat16, FP8 against absolute cosines."""
    if family == "bfloat16":
        what = "relative L2 of the actions, at most plain bfloat16's"
        return [at_most(what, float(summary["rel_l2"]), float(plain["rel_l2"]))]
    return [
        at_least("mean cosine of the actions", float(summary["cosine_mean"]), FP8_COSINE_MEAN),
        at_least("worst cosine of the actions", float(summary["cosine_worst"]), FP8_COSINE_WORST),
    ]


TABLES = ("rows", "accuracy", "proof", "memory", "soak", "start", "coverage")


def missed(document: Mapping[str, Any]) -> list[str]:
    """One line per "must" that a result of `vivace bench --preset hopper` does not meet."""
    lines = []
    for table in TABLES:
        for row in document.get(table, []):
            for target in _plain(row.get("targets", [])):
                if not target["must_met"]:
                    where = " ".join(str(row[key]) for key in ("setting", "engine", "boundary") if key in row)
                    lines.append(f"{where}: {target['what']} {target['got']}, {target['rule']} {target['must']}")
    return lines


def passed(document: Mapping[str, Any]) -> bool:
    """The run came to its end, every must is met, and everything that was asked for ran.

    What this program can never run does not count; files from before 2026-11-30 do not say whether they came to an end.
    """
    not_run = [row for row in document["not_run"] if not row.get("informational")]
    return not missed(document) and not not_run and bool(document.get("finished", True))


def _plain(found: Sequence[Any]) -> list[Mapping[str, Any]]:
    return [vars(one) if isinstance(one, Target) else one for one in found]
