"""What the machine can do, what an engine keeps in memory, whether it stays as fast, and how long it takes to start."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import ModelConfig
from ..errors import VivaceError
from ..precision.plan import PrecisionPlan
from . import bench, targets
from .hopper_engines import OURS, Engine, make, policy_of
from .hopper_robot import Scenes, pipeline, request, toy_tokenizer
from .hopper_rows import kv_bytes
from .hopper_weights import load, random_checkpoint
from .targets import Size

H100_CEILINGS = {"bf16_tflops": 790.0, "fp8_tflops": 1300.0, "copy_gb_s": 2960.0}
"""Used where nothing can be measured; measured on an H100 SXM, see docs/measured.md."""
PARTS = 10
"""A soak is compared in tenths."""


def ceilings(device: torch.device) -> dict[str, Any]:
    """Rates that torch reaches here on large work: bfloat16 and E4M3 products of 8192, a copy of 1 GB (read + written)."""
    if device.type != "cuda":
        return {**H100_CEILINGS, "measured": False}
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    flop = 2.0 * n**3
    found: dict[str, Any] = {
        "bf16_tflops": flop / _median_s(lambda: a @ b) / 1e12,
        "copy_gb_s": 2 * source.numel() / _median_s(lambda: target.copy_(source)) / 1e9,
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        eight = _median_s(lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
        found["fp8_tflops"] = flop / eight / 1e12
    return {"fp8_tflops": found["bf16_tflops"], **found, "measured": True}


def memory_row(
    config: ModelConfig, size: Size, plan: PrecisionPlan | None, *, seed: int, outliers: int
) -> dict[str, Any]:
    """Load, quantise, capture and serve one plan with nothing else on the device, and see what stays and what peaks.

    Must run when no other network is alive. Peaks are of torch's allocator, less what earlier phases left: `serving` from
    the first answer on, `start` with loading, quantising and capturing. What a process holds in all, the start rows say.
    """
    gc.collect()
    torch.cuda.empty_cache()
    left_over = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    checkpoint = random_checkpoint(config, seed=seed, outliers=outliers)
    device = torch.device("cuda")
    network = load(checkpoint, device=device, precision="bfloat16")
    engine = make(OURS, network, plan=plan, in_place=True)
    del network
    pipe = pipeline(size, config, toy_tokenizer(config.vocab_size))
    policy = policy_of(engine, size, pipe, checkpoint)
    one = request(pipe, size, Scenes.make(1, views=3, image_size=config.vision.image_size, seed=seed), 0)
    policy.infer(one)
    start = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        policy.infer(one)
    peak, keys = torch.cuda.max_memory_allocated() - left_over, kv_bytes(config, size)
    ratio = peak / (engine.weights_bytes + keys)
    return {
        "setting": size.name, "engine": engine.name, "precision": engine.precision, "weights_bytes": engine.weights_bytes,
        "kv_bytes": keys, "peak_serving_bytes": peak, "peak_start_bytes": start - left_over,
        "ratio": ratio, "left_over_bytes": left_over,
        "targets": [targets.at_most("peak while serving over weights + K,V", ratio, targets.MEMORY)],
    }  # fmt: skip


def soak_row(size: Size, engine: Engine, replay: Callable[[], Any], *, calls: int) -> dict[str, Any]:
    """Call `replay` without a pause and see whether it stays as fast, gives the same bits and takes no more memory."""
    cuda = engine.model.device.type == "cuda"
    timer = bench.CudaTimer() if cuda else None
    for _ in range(20):
        first = replay().clone()
    held, times, same = _allocated(cuda), [], True
    for turn in range(calls):
        begin = time.perf_counter()
        if timer is not None:
            timer.start()
        output = replay()
        times.append(timer.stop() if timer is not None else (time.perf_counter() - begin) * 1e3)
        if turn % 100 == 0:
            same = same and torch.equal(output, first)
    found, grown = bench.summary(times), _allocated(cuda) - held
    tail = found.p99_ms / found.p50_ms
    return {
        "setting": size.name, "engine": engine.name, "precision": engine.precision, "boundary": "B0", "calls": calls,
        "latency": found, "p50_of_tenths_ms": [float(np.median(part)) for part in np.array_split(times, min(PARTS, calls))],
        "allocated_growth_bytes": grown, "same_bits": same,
        "targets": [
            targets.at_most("p99 / p50", tail, targets.TAIL),
            targets.at_most("growth of allocated memory, bytes", grown, 0),
        ],
    }  # fmt: skip


def start_rows(
    size: Size, plan: PrecisionPlan | None, *, seed: int, outliers: int, timeout_s: float
) -> list[dict[str, Any]]:
    """Process start to first action: once with empty kernel caches, once with those that the first run left.

    The weights are drawn on the GPU; reading 6.7 GB from a disk comes on top of it.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = [f"{name}={folder}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VIVACE_CACHE")]
        command = [
            "env",
            *caches,
            sys.executable,
            "-m",
            "vivace.check.hopper_start",
            size.name,
            str(seed),
            str(outliers),
        ]
        if plan is not None:
            file = Path(folder) / "plan.json"
            file.write_text(plan.to_json())
            command.append(str(file))
        for state, limit in (("cold", targets.COLD_START_S), ("warm", targets.WARM_START_S)):
            begin = time.time()
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
            if done.returncode != 0:
                raise VivaceError("the process that was to start did not", got=done.stderr[-600:])
            found = json.loads(done.stdout.splitlines()[-1])
            said = {key: value - begin for key, value in found["times"].items()} | found["memory"]
            what = f"process start to first action, {state} kernel caches, s"
            rows.append({
                "setting": size.name, "engine": f"{OURS} {plan.name if plan else 'bf16'}", "caches": state, **said,
                "targets": [
                    targets.at_most(what, said["first_action_s"], limit),
                    targets.at_most("peak while serving over weights + K,V", said["ratio"], targets.MEMORY),
                ],
            })  # fmt: skip
    return rows


def _median_s(work: Callable[[], Any], *, repeats: int = 10) -> float:
    timer, times = bench.CudaTimer(), []
    for _ in range(3):
        work()
    for _ in range(repeats):
        timer.start()
        work()
        times.append(timer.stop() / 1e3)
    return float(np.median(times))


def _allocated(cuda: bool) -> int:
    return torch.cuda.memory_allocated() if cuda else 0
