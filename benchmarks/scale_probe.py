"""Would finer scales than one per activation tensor, or INT8, lower the error of quantised inputs? Simulated on a CPU.

    PYTHONPATH=src python benchmarks/scale_probe.py --out results.json

Weights stay as they are; the input of every linear in the blocks is rounded and comes back as float32. Modes:

    tensor    E4M3, one static scale per tensor           row       E4M3, one scale per token, found while running
    step      E4M3, one static scale per denoise step     wide      E4M3, static and 16 times wider than needed
    int8      INT8, one static scale per tensor           int8-row  INT8, one scale per token

Static ranges come from requests that no error is measured on. Error: relative L2 of the final actions after 10 steps.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_probe
import torch
from fp8_error_probe import canonical_model, rounded
from torch import Tensor

from vivace.backends import eager
from vivace.check import environment
from vivace.config import EngineConfig, GemmaConfig, ModelConfig, VisionConfig
from vivace.model.pi import Pi
from vivace.ops.table import reference_ops
from vivace.precision.calibrate import READERS
from vivace.types import ModelInputs

CONFIG = ModelConfig(
    vision=VisionConfig(width=144, layers=6, mlp_width=576, num_heads=2, patch_size=14, image_size=112),
    prefix=GemmaConfig(width=256, layers=8, mlp_width=1024, num_heads=4, num_kv_heads=1, head_dim=64),
    expert=GemmaConfig(width=128, layers=8, mlp_width=512, num_heads=4, num_kv_heads=1, head_dim=64),
    vocab_size=512, horizon=16,
)  # fmt: skip
STEPS, OUTLIERS, TOKENS = 10, 4, 24
RANGES_FROM = (101, 102, 103)
MODES = ("tensor", "row", "step", "wide", "int8", "int8-row")
IN_BLOCKS = re.compile(r"(vision|prefix|expert)\.layers")
SMALLEST = 1e-9


@dataclass
class Ranges:
    """Largest absolute input of every linear: over everything, and per call within one inference."""

    largest: dict[str, float] = field(default_factory=dict)
    per_call: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def see(self, name: str, x: Tensor) -> None:
        value, call = float(x.abs().max()), self.calls.get(name, 0)
        self.calls[name] = call + 1
        self.largest[name] = max(self.largest.get(name, 0.0), value)
        known = self.per_call.setdefault(name, [])
        if call == len(known):
            known.append(value)
        known[call] = max(value, known[call])

    def step_spread(self) -> float:
        """Largest over smallest range between denoise steps, of the linear where that is largest."""
        rows = (row for name, row in self.per_call.items() if name.startswith("expert.layers"))
        return max(max(row) / max(min(row), SMALLEST) for row in rows)


def request(seed: int) -> tuple[ModelInputs, Tensor]:
    g = torch.Generator().manual_seed(seed)
    size = CONFIG.vision.image_size
    images = torch.randint(0, 256, (1, 2, 3, size, size), dtype=torch.uint8, generator=g)
    tokens = torch.randint(0, CONFIG.vocab_size, (1, TOKENS), generator=g)
    return ModelInputs(images, tokens), torch.randn(1, CONFIG.horizon, 32, generator=g)


def actions(model: Pi, inputs: ModelInputs, noise: Tensor) -> Tensor:
    backend = eager.create(model, EngineConfig(num_denoise_steps=STEPS))
    return backend.denoise(backend.prefill(inputs), noise)


def under(model: Pi, change: Callable[[str, Tensor], Tensor], work: Callable[[], Any]) -> Any:
    """`work` with every linear's input changed."""
    table = reference_ops()

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, layer, *rest: operation(change(layer.name, x), layer, *rest)

    model.ops = replace(table, **{name: wrap(getattr(table, name)) for name in READERS})
    try:
        return work()
    finally:
        model.ops = table


def rounding(mode: str, ranges: Ranges) -> Callable[[str, Tensor], Tensor]:
    """How one mode changes inputs; make a new one per inference, it counts calls."""
    calls: dict[str, int] = {}

    def change(name: str, x: Tensor) -> Tensor:
        if not IN_BLOCKS.match(name):
            return x
        call = calls[name] = calls.get(name, -1) + 1
        amax: Tensor | float = ranges.largest[name]
        if mode.endswith("row"):
            amax = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
        elif mode == "step":
            amax = ranges.per_call[name][call]
        elif mode == "wide":
            amax = 16 * ranges.largest[name]
        if mode.startswith("int8"):
            return (x / amax * 127).round().clamp(-127, 127) * amax / 127
        return rounded(x, amax)

    return change


def watched(ranges: Ranges) -> Callable[[str, Tensor], Tensor]:
    def change(name: str, x: Tensor) -> Tensor:
        ranges.see(name, x)
        return x

    return change


@torch.no_grad()
def study(modes: list[str], requests: int) -> dict[str, Any]:
    model, ranges = canonical_model(CONFIG, OUTLIERS, "cpu"), Ranges()
    for seed in RANGES_FROM:
        ranges.calls.clear()
        under(model, watched(ranges), lambda seed=seed: actions(model, *request(seed)))
    made = [request(seed) for seed in range(requests)]
    truth = [actions(model, *one) for one in made]
    found: dict[str, Any] = {"step_spread_of_the_expert": ranges.step_spread(), "modes": {}}
    for mode in modes:
        errors = [
            gpu_probe.error(under(model, rounding(mode, ranges), lambda one=one: actions(model, *one)), true)
            for one, true in zip(made, truth, strict=True)
        ]
        found["modes"][mode] = {"mean": statistics.mean(errors), "errors": errors}
        print(f"{mode:9s} {statistics.mean(errors):.4f}", " ".join(f"{one:.4f}" for one in errors), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors of finer activation scales and of INT8, simulated on a CPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    modes = args.modes.split(",")
    if unknown := set(modes) - set(MODES):
        parser.error(f"unknown modes {sorted(unknown)}, known: {MODES}")
    torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    report = {
        "what": "inputs of all linears in the blocks rounded, weights kept; relative L2 of the final actions to float32",
        "command": f"benchmarks/scale_probe.py --modes {args.modes} --requests {args.requests} --threads {args.threads}",
        "network": {"vision": "144 x 6", "prefix": "256 x 8", "expert": "128 x 8", "outliers": OUTLIERS, "steps": STEPS},
        "ranges_from_requests": list(RANGES_FROM), "environment": environment.collect(), **study(modes, args.requests),
    }  # fmt: skip
    report["seconds"] = round(time.perf_counter() - begin, 1)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
