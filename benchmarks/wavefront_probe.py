"""What it brings to run the first denoise step behind the prefix, and to bring weights before the wait: the whole policy as
one graph in each way, in one process.

    PYTHONPATH=src python benchmarks/wavefront_probe.py --out results.json

The serial and the wavefront graph run the same kernels on the same data, so their actions must be equal in every bit; early
weights sum in another order, and are compared with float32 on the same weights. Nothing is timed before that.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from typing import Any

import gpu_probe
import torch
from torch import Tensor

from vivace.backends import cuda_graph
from vivace.config import EngineConfig, ModelConfig
from vivace.model.pi import Pi
from vivace.ops import denoise, prefill, prefill_tuning
from vivace.ops.table import reference_ops
from vivace.precision import calibrate, plan, quantize

ENGINE = EngineConfig(num_denoise_steps=10, prompt_bucket=8)


@dataclass(frozen=True)
class Way:
    """wavefront, early weights in the loop, early launch in the prefix, weights fetched into L2 by the kernel before."""

    wavefront: bool = True
    early: bool = True
    prefix: bool = False
    fetch: bool = False


# early weights hold shared memory while they wait, which the prefix beside them may miss: both orders are timed
WAYS = {
    "serial": Way(wavefront=False, early=False), "wavefront": Way(early=False), "early": Way(),
    "early, serial": Way(wavefront=False), "prefix early": Way(prefix=True), "prefix early, fetch": Way(prefix=True, fetch=True),
}  # fmt: skip


def backend(model: Pi, way: Way) -> cuda_graph.CudaGraphBackend:
    tuning = replace(
        prefill_tuning.TUNED,
        early=("vision", "prefix") if way.prefix else ("vision",),
        ahead_bytes=16 << 20 if way.fetch else 0,
    )
    ops = denoise.denoise_ops(prefill.prefill_ops(model, tuning=tuning), early_weights=way.early)
    return cuda_graph.CudaGraphBackend(model, ENGINE, ops=ops, wavefront=way.wavefront)


@torch.no_grad()
def compare(model: Pi, name: str, truth: dict[str, Tensor], report: dict[str, Any], *, ways: list[str]) -> None:
    for setting, shape in gpu_probe.SETTINGS.items():
        inputs, noise = gpu_probe.request(shape, model.config, 7)
        other = gpu_probe.request(shape, model.config, 8)
        made, replays = {}, {}
        for kind in ways:  # a backend makes the model's operations its own: capture it before the next
            made[kind] = backend(model, WAYS[kind])
            replays[kind] = made[kind].graph_of(inputs, noise)
        answers = {kind: b.infer(inputs, noise) for kind, b in made.items()}
        others = {kind: b.infer(*other) for kind, b in made.items()}
        same = {
            kind: sum(torch.equal(b.infer(inputs, noise), answers[kind]) for _ in range(100))
            for kind, b in made.items()
        }
        row: dict[str, Any] = {
            "equal_to_early": {k: torch.equal(x, answers["early"]) for k, x in answers.items()},
            "equal_to_early_other": {k: torch.equal(x, others["early"]) for k, x in others.items()},
            "error": {kind: gpu_probe.error(x, truth[setting]) for kind, x in answers.items()},
            "bit_identical_of_100": same,
            "changes_with_input": not torch.equal(answers["early"], others["early"]),
        }  # fmt: skip
        for _ in range(2):
            for kind, replay in replays.items():
                row.setdefault(kind, []).append(round(gpu_probe.replay_ms(replay, 60)["p50"], 4))
        report[f"{setting} {name}"] = row
        print(setting, name, row, flush=True)
        del made, replays
        torch.cuda.empty_cache()


@torch.no_grad()
def reference(wide: Pi) -> dict[str, Tensor]:
    """Float32 actions of every setting."""
    b = gpu_probe.eager.create(wide, ENGINE)
    return {s: b.infer(*gpu_probe.request(shape, wide.config, 7)) for s, shape in gpu_probe.SETTINGS.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by ;, early among them")
    args = parser.parse_args()
    ways = args.ways.split(";")
    report: dict[str, Any] = {"environment": gpu_probe.environment()}
    model = gpu_probe.random_model(ModelConfig())
    truth = reference(gpu_probe.float32_copy(model))
    compare(model, "bf16", truth, report, ways=ways)
    model.ops = reference_ops()
    with torch.no_grad(), calibrate.watch(model) as ranges:
        inputs, noise = gpu_probe.request((3, 200, 50), model.config, 99)
        b = gpu_probe.eager.create(model, ENGINE)
        b.denoise(b.prefill(inputs), noise)
    quantize.apply(model, calibrate.with_ranges(plan.preset("fp8-all"), ranges, data="synthetic: probe"))
    compare(model, "fp8-all", truth, report, ways=ways)
    with open(args.out, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
