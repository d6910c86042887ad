"""How long each phase of the full-size benchmark takes on one H100, so that one command can be made to fit.

Estimates, not measurements of a whole run: latencies are those of docs/log.md (mean over settings), set-up, captures and
processes come from runs with few calls. A result's `phase_seconds` says what a run really took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .hopper_rows import in_process
from .hopper_run import Options

CALL_S = 0.0106
"""One call of our engines at B0: mean over the five settings of bfloat16 (12.0 ms) and fp8-all (9.2 ms)."""
SPIN_S = 0.0004
HOST_S = 0.0020
"""What tokenising, pixels and the way back add at B2, taken widely."""
SERVED_S = 0.0025
"""What a websocket adds at B3."""
RIVAL_S = 0.0215
"""One call of torch.compile's graph, in the largest setting."""
REALTIME_VLA_S = 0.025
"""One call of realtime-vla in the largest setting (the founding report's 25.1 ms on an H100)."""
PLAIN_S = 0.2
"""One call of plain PyTorch: its mean, which is above its median of 185 ms."""
WAYS = 3
"""Of coming to the actions; their bits are compared in every observation of the accuracy rows."""
CAPTURE_S = 2.5
"""An engine in one setting: capture, first check, warm-up at three boundaries."""
FIXED_S = {
    "setup": 20.0, "setup of a setting": 10.0, "client": 2.0, "rival": 40.0, "plain": 10.0,
    "proof": 3.0, "memory": 27.0, "start": 65.0,
}  # fmt: skip
"""rival: compiled, captured, its accuracy; plain: warm-up and stages or parts, at each boundary."""


def seconds(options: Options, phases: Sequence[str]) -> dict[str, float]:
    """Seconds per phase of this command, "setup" first."""
    o, settings = options, len(options.sizes)
    head = headlines(o)
    few, few_settings = len(o.plans) + len(o.plan_files) - head, min(o.few_settings, settings)
    talking = sum(size.prompt_tokens > 0 for size in o.sizes)
    reusing = sum(size.horizon == 50 for size in o.sizes)
    timed = settings * head * (o.calls * (CALL_S + SPIN_S) + o.host_calls * CALL_S)
    timed += talking * (head * o.host_calls * (3 * (CALL_S + HOST_S) + 2 * SERVED_S) + 2 * FIXED_S["client"])
    timed += few_settings * few * o.few_calls * (CALL_S + SPIN_S)
    timed += reusing * head * o.reuse_calls * CALL_S / 2
    per_observation = (o.draws + WAYS) * CALL_S
    found = {
        "rows": timed + (settings * head + few_settings * few) * CAPTURE_S,
        "accuracy": per_observation * (
            settings * head * o.observations + few_settings * few * min(o.few_observations, o.observations)
        ),
        "rivals": (0.0 if o.realtime_vla is None else settings * realtime_vla_s(o))
        + sum(rival_s(o, boundary) for size in o.sizes[: o.rival_settings] for boundary in in_process(size))
        + sum(plain_s(o, boundary) for size in o.sizes[: o.plain_settings] for boundary in in_process(size)),
        "soak": o.soak_calls * (CALL_S + SPIN_S),
        "proof": FIXED_S["proof"] * settings * head,
        "memory": FIXED_S["memory"] * 2,
        "start": FIXED_S["start"],
    }  # fmt: skip
    setup = FIXED_S["setup"] + FIXED_S["setup of a setting"] * settings
    return {"setup": setup} | {name: value for name, value in found.items() if name in phases}


def headlines(options: Options) -> int:
    """How many of the plans get all calls in every setting."""
    return sum(options.is_headline(name) for name in (*options.plans, *(path.stem for path in options.plan_files)))


def rival_s(options: Options, boundary: str) -> float:
    """torch.compile and our headline engines in the same rounds, in one setting; at B0 with compiling and accuracy."""
    fixed = FIXED_S["rival"] if boundary == "B0" else 0.0
    return fixed + options.rival_calls * _round_s(RIVAL_S, headlines(options), boundary)


def realtime_vla_s(options: Options) -> float:
    """realtime-vla and our headline engines in the same rounds, in one setting, with its weights, kernels and accuracy."""
    accuracy = options.observations * options.draws * REALTIME_VLA_S
    return FIXED_S["rival"] + accuracy + options.rival_calls * _round_s(REALTIME_VLA_S, headlines(options), "B0")


def plain_s(options: Options, boundary: str) -> float:
    """Plain PyTorch and one engine of ours in the same rounds, in one setting."""
    return FIXED_S["plain"] + options.plain_calls * _round_s(PLAIN_S, 1, boundary)


def later_s(estimated: Mapping[str, float], phase: str) -> float:
    """What the phases behind this one take, out of `seconds`."""
    names = list(estimated)
    return sum(estimated[name] for name in names[names.index(phase) + 1 :])


def _round_s(rival_s: float, ours: int, boundary: str) -> float:
    """One call of a rival and of each of our engines beside it."""
    return rival_s + ours * CALL_S + (1 + ours) * (HOST_S if boundary == "B2" else 0.0)
