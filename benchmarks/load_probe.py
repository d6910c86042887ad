"""Loads a full-size pi0.5 onto a GPU and reports how much host memory that took, then runs it once per backend.

    python benchmarks/load_probe.py make FOLDER     write a random full-size checkpoint (8.3 GB, bfloat16)
    python benchmarks/load_probe.py load FOLDER     load it in a fresh process; prints one JSON line

The bound (issue: largest tensor + 1 GB): the embedding table is the largest tensor, 257152 x 2048.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def peak_host_bytes() -> int:
    """High-water mark of this process' resident memory, mapped files included (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no VmHWM in /proc/self/status")


def load(folder: Path) -> dict[str, Any]:
    from vivace.backends import base
    from vivace.check import observations
    from vivace.config import EngineConfig
    from vivace.runtime.policy import load_policy

    torch.zeros(1, device="cuda")
    before = peak_host_bytes()
    start = time.perf_counter()
    policy = load_policy(folder, embodiment="libero", config=EngineConfig(backend="eager", precision="bfloat16"))
    torch.cuda.synchronize()
    seconds, after = time.perf_counter() - start, peak_host_bytes()
    largest = 257152 * 2048 * 2
    request = observations.synthetic(policy.io, 1)[0]
    request.pop("prompt")
    request |= {"tokenized_prompt": list(range(2, 50)), "tokenized_prompt_mask": [True] * 48}
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "load_s": round(seconds, 1),
        "host_growth_gb": round((after - before) / 1e9, 2),
        "largest_tensor_gb": round(largest / 1e9, 2),
        "within_bound": after - before <= largest + 1e9,
        "gpu_weights_gb": round(torch.cuda.memory_allocated() / 1e9, 2),
    }
    first = policy.infer(request)
    again = policy.infer(request)
    found["eager_ms"] = {k: round(v, 1) for k, v in again.milliseconds.items()}
    found["eager_repeats_to_the_bit"] = bool((first.actions == again.actions).all())
    if (reason := base.why_not("cuda_graph", device="cuda")) is None:
        policy.backend = base.build("cuda_graph", policy.model, EngineConfig(precision="bfloat16"))
        graph = policy.infer(request)
        for _ in range(20):
            graph = policy.infer(request)
        found["cuda_graph_ms"] = {k: round(v, 2) for k, v in graph.milliseconds.items()}
        difference = (
            abs(graph.actions_normalized - first.actions_normalized).max() / abs(first.actions_normalized).max()
        )
        found["cuda_graph_against_eager_bfloat16"] = float(difference)
    else:
        found["cuda_graph"] = reason
    return found


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "make":
        from vivace.checkpoints.make import Recipe, make_checkpoint

        start = time.perf_counter()
        make_checkpoint(folder, Recipe(size="full", kind="pi05", format="openpi", dtype="bfloat16"))
        print(
            json.dumps(
                {"make_s": round(time.perf_counter() - start, 1), "host_peak_gb": round(peak_host_bytes() / 1e9, 2)}
            )
        )
    else:
        print(json.dumps(load(folder)))


if __name__ == "__main__":
    main()
