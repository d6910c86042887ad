"""What the machine can do, what an engine keeps in memory, and how long it takes to start."""

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
from .hopper_engines import OURS, make, policy_of
from .hopper_robot import Scenes, pipeline, request, toy_tokenizer
from .hopper_rows import kv_bytes
from .hopper_weights import load, random_checkpoint
from .targets import Size

H100_CEILINGS = {"bf16_tflops": 790.0, "fp8_tflops": 1300.0, "copy_gb_s": 2960.0}
"""Used where nothing can be measured; measured on an H100 SXM, see docs/measured.md."""


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
    left_over = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    checkpoint = random_checkpoint(config, seed=seed, outliers=outliers)
    network = load(checkpoint, device=torch.device("cuda"), precision="bfloat16")
    engine = make(OURS, network, plan=plan, in_place=True)
    del network
    pipe = pipeline(size, config, toy_tokenizer(config.vocab_size))
    policy = policy_of(engine, size, pipe, checkpoint)
    one = request(pipe, size, Scenes.make(1, views=3, image_size=config.vision.image_size, seed=seed), 0)
    policy.infer(one)
    start = torch.cuda.max_memory_allocated()
    needed = engine.weights_bytes + kv_bytes(config, size)
    peaks = serving_peaks(lambda: policy.infer(one), needed=needed, left_over=left_over)
    return {
        "setting": size.name, "engine": engine.name, "precision": engine.precision, "weights_bytes": engine.weights_bytes,
        "kv_bytes": kv_bytes(config, size), "peak_start_bytes": start - left_over[0], **peaks,
        "left_over_bytes": left_over[0], "targets": memory_marks(peaks, needed),
    }  # fmt: skip


def serving_peaks(
    answer: Callable[[], Any], *, needed: int, left_over: tuple[int, int] = (0, 0), calls: int = 20
) -> dict[str, Any]:
    """Peaks of allocated and reserved bytes while serving, after what loading left was given back, and their ratios.

    The working memory of captured graphs lies in private pools: reserved for good, and not counted as allocated between
    captures. So reserved is what an engine takes from others, and what is judged.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(calls):
        answer()
    allocated = torch.cuda.max_memory_allocated() - left_over[0]
    reserved = torch.cuda.max_memory_reserved() - left_over[1]
    return {
        "peak_serving_bytes": allocated, "peak_reserved_bytes": reserved,
        "ratio_allocated": allocated / needed, "ratio": reserved / needed,
    }  # fmt: skip


def memory_marks(peaks: dict[str, Any], needed: int) -> list[targets.Target]:
    """Judged on what is reserved."""
    return [targets.of_memory(reserved=peaks["peak_reserved_bytes"], needed=needed)]


def start_rows(
    size: Size, plan: PrecisionPlan | None, *, seed: int, outliers: int, timeout_s: float
) -> list[dict[str, Any]]:
    """Process start until every bucket is warm: once with empty kernel caches, once with those that the first run left.

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
        for state in ("cold", "warm"):
            begin = time.time()
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
            if done.returncode != 0:
                raise VivaceError("the process that was to start did not", got=done.stderr[-600:])
            found = json.loads(done.stdout.splitlines()[-1])
            said = {key: value - begin for key, value in found["times"].items()} | found["memory"]
            row = {"setting": size.name, "engine": f"{OURS} {plan.name if plan else 'bf16'}", "caches": state, **said}
            rows.append(row | {"targets": start_marks(row)})
    return rows


def start_marks(row: dict[str, Any]) -> list[targets.Target]:
    """A server answers when every bucket is warm, not after the first action; `first_action_s` is information."""
    return [
        targets.of_start(row["caches"], every_bucket_s=row["every_bucket_s"]),
        targets.of_memory(reserved=row["peak_reserved_bytes"], needed=row["needed_bytes"]),
    ]


def _median_s(work: Callable[[], Any], *, repeats: int = 10) -> float:
    timer, times = bench.CudaTimer(spin_ms=bench.SPIN_MS), []
    for _ in range(3):
        work()
    for _ in range(repeats):
        timer.start()
        work()
        times.append(timer.stop() / 1e3)
    return float(np.median(times))
