"""What it brings to run the first denoise step behind the prefix: the whole policy with and without, in one process.

    PYTHONPATH=src python benchmarks/wavefront_probe.py --out results.json

Both graphs run the same kernels on the same data, so their actions must be equal in every bit; nothing is timed before that.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import gpu_probe
import torch

from vivace.backends import cuda_graph
from vivace.config import EngineConfig, ModelConfig
from vivace.model.pi import Pi
from vivace.ops import denoise, prefill
from vivace.precision import calibrate, plan, quantize

ENGINE = EngineConfig(num_denoise_steps=10, prompt_bucket=8)


def backend(model: Pi, *, wavefront: bool) -> cuda_graph.CudaGraphBackend:
    ops = denoise.denoise_ops(prefill.prefill_ops(model))
    return cuda_graph.CudaGraphBackend(model, ENGINE, ops=ops, wavefront=wavefront)


@torch.no_grad()
def compare(model: Pi, name: str, report: dict[str, Any]) -> None:
    for setting, shape in gpu_probe.SETTINGS.items():
        inputs, noise = gpu_probe.request(shape, model.config, 7)
        other = gpu_probe.request(shape, model.config, 8)
        made = {kind: backend(model, wavefront=kind == "wavefront") for kind in ("serial", "wavefront")}
        replays = {kind: b.graph_of(inputs, noise) for kind, b in made.items()}
        answers = {kind: b.infer(inputs, noise) for kind, b in made.items()}
        others = {kind: b.infer(*other) for kind, b in made.items()}
        same = sum(torch.equal(made["wavefront"].infer(inputs, noise), answers["serial"]) for _ in range(200))
        row: dict[str, Any] = {
            "equal": bool(torch.equal(*answers.values())), "equal_other": bool(torch.equal(*others.values())),
            "bit_identical": f"{same}/200", "changes_with_input": not torch.equal(answers["serial"], others["serial"]),
        }  # fmt: skip
        for _ in range(2):
            for kind, replay in replays.items():
                row.setdefault(kind, []).append(round(gpu_probe.replay_ms(replay, 60)["p50"], 4))
        report[f"{setting} {name}"] = row
        print(setting, name, row, flush=True)
        del made, replays
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": gpu_probe.environment()}
    model = gpu_probe.random_model(ModelConfig())
    compare(model, "bf16", report)
    with torch.no_grad(), calibrate.watch(model) as ranges:
        inputs, noise = gpu_probe.request((3, 200, 50), model.config, 99)
        b = gpu_probe.eager.create(model, ENGINE)
        b.denoise(b.prefill(inputs), noise)
    quantize.apply(model, calibrate.with_ranges(plan.preset("fp8-all"), ranges, data="synthetic: probe"))
    compare(model, "fp8-all", report)
    with open(args.out, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
