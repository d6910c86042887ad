"""How long TensorRT engines of the full-size policy take to build without a GPU, how large they are, what they compute in.

    PYTHONPATH=src python benchmarks/tensorrt_build.py -o results.json [--loop]

pi0.5 at full size (27 + 18 + 18 layers), 3 views and 200 prompt tokens, weights as inputs, no checkpoint: names, shapes and types are
all that these networks need. Every network is audited against its plan before it is built. Seconds are of the builder alone; they
say nothing about how fast an engine runs. "rows": one per plan, network and targets; "coverage": products and FLOPs by precision.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vivace.backends.tensorrt import audit, module, networks, skeleton, targets
from vivace.backends.tensorrt.build import build
from vivace.backends.tensorrt.networks import Network, Part, Shapes
from vivace.check import environment
from vivace.check.results import result, write_result
from vivace.config import ModelConfig, TensorRTBase
from vivace.model.pi import Pi
from vivace.precision.coverage import Coverage, rows, summary
from vivace.precision.fit import all_layers
from vivace.precision.plan import PrecisionPlan, preset

VIEWS, PROMPT, STEPS = 3, 200, 10
SHAPES: dict[Part, Shapes] = {
    "vision": Shapes(batch=VIEWS), "prefix": Shapes(keys=VIEWS * 256 + PROMPT),
    "step": Shapes(keys=VIEWS * 256 + PROMPT), "loop": Shapes(keys=VIEWS * 256 + PROMPT, steps=STEPS),
}  # fmt: skip
PLANS: tuple[tuple[str, TensorRTBase], ...] = (
    ("bf16", "fp16"), ("bf16", "bf16"), ("fp8-mlp", "fp16"), ("fp8-full", "fp16"), ("fp8-all", "fp16"),
    ("int8-mlp", "fp16"), ("int8-full", "fp16"),
)  # fmt: skip
TARGETS = ("sm89", "sm120", "sm89,sm120")
WITHOUT_FP8 = "sm86"


def outlined(config: ModelConfig, plan: PrecisionPlan, base: TensorRTBase) -> Pi:
    """The network under a plan, without numbers."""
    with torch.device("meta"):
        names = all_layers(Pi(config))
    return skeleton.outline(config, base=base, formats=plan.formats(names))


def built(network: Network, wanted: str, *, repeats: int) -> dict[str, Any]:
    """Builder seconds (each time) and engine size."""
    made = [build(network, targets.parse(wanted)) for _ in range(repeats)]
    return {"targets": wanted, "build_seconds": [round(one.seconds, 3) for one in made], "bytes": len(made[0].engine)}


def network_rows(
    model: Pi, plan: PrecisionPlan, base: TensorRTBase, part: Part, *, rtx: module.Module, repeats: int, seen: Coverage
) -> list[dict[str, Any]]:
    """One row per target of one network."""
    begin = time.perf_counter()
    network = networks.write(part, model, rtx, SHAPES[part])
    written = time.perf_counter()
    found = audit.check(network, plan.format_of)
    audited = time.perf_counter()
    if part != "loop":
        audit.record(seen, found, part=part, kernel=rtx.name)
    flops = Counter[str]()
    for product in found:
        flops[product.precision] += product.flops
    facts = {
        "plan": plan.name, "base": base, "network": network.label, "part": part,
        "layers": network.definition.num_layers, "products": dict(Counter(product.precision for product in found)),
        "gflops": {name: round(value / 1e9, 3) for name, value in flops.items()},
        "write_seconds": round(written - begin, 3), "audit_seconds": round(audited - written, 3),
    }  # fmt: skip
    wanted = TARGETS if part != "loop" else TARGETS[-1:]
    if not any(plan.format_of(product.layer) == "e4m3" for product in found) and part != "loop":
        wanted = (*wanted, WITHOUT_FP8)
    return [{**facts, **built(network, text, repeats=repeats)} for text in wanted]


def main() -> None:
    """Build, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loop", action="store_true", help="also all denoise steps in one engine, once: minutes")
    args = parser.parse_args()
    rtx, config, table, coverage = module.load("tensorrt_rtx"), ModelConfig(), [], []
    begin, before = time.perf_counter(), environment.collect()
    with torch.no_grad():
        for name, base in PLANS:
            plan, seen = preset(name), Coverage(kernel=rtx.name)
            model = outlined(config, plan, base)
            for part in ("vision", "prefix", "step"):
                table += network_rows(model, plan, base, part, rtx=rtx, repeats=args.repeats, seen=seen)
                print(json.dumps(table[-1]), flush=True)
            coverage.append({"plan": name, "base": base, **summary(rows(seen, steps=STEPS, plan=plan))})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if args.loop:
            plan = preset("bf16")
            model, seen = outlined(config, plan, "fp16"), Coverage(kernel=rtx.name)
            table += network_rows(model, plan, "fp16", "loop", rtx=rtx, repeats=1, seen=seen)
    body = {
        "module": rtx.label, "model": "pi05, full size, weights as inputs", "views": VIEWS, "prompt_tokens": PROMPT,
        "steps": STEPS, "what": "builder seconds without a GPU and engine bytes; no engine was run",
        "rows": table, "coverage": coverage, "peak_memory_bytes": peak,
        "peak_memory_bytes_with_loop": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
    write_result(
        args.out, result("tensorrt-build", body, environment={**before, "after": environment.collect()["state"]})
    )


if __name__ == "__main__":
    main()
