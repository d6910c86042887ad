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

from ..errors import NumericsError, VivaceError
from ..precision.plan import PrecisionPlan
from . import bench, targets
from .hopper_engines import OURS
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


def memory_row(size: Size, plan: PrecisionPlan | None, *, seed: int, outliers: int, timeout_s: float) -> dict[str, Any]:
    """Load, quantise, capture one bucket and serve one plan in a process of its own, and see what stays and what peaks.

    Peaks are of torch's allocator: `serving` from the first answer on, `start` with loading, quantising and capturing.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = _child(
            size, plan, seed=seed, outliers=outliers, buckets="one", folder=Path(folder), timeout_s=timeout_s
        )
    row = {"setting": size.name, "engine": _label(plan), **found["memory"]}
    return row | {"targets": memory_marks(row, found["memory"]["needed_bytes"])}


def serving_peaks(answer: Callable[[], Any], *, needed: int, calls: int = 20) -> dict[str, Any]:
    """Peaks of allocated and reserved bytes while serving, after what loading left was given back, and their ratios.

    The working memory of captured graphs lies in private pools: reserved for good, and not counted as allocated between
    captures. So reserved is what an engine takes from others, and what is judged.
    Raises: NumericsError where less is reserved than must be held: then something else was measured.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(calls):
        answer()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    if reserved < needed:
        raise NumericsError(
            "less memory is reserved than weights, keys and values take", got=f"{reserved:,} bytes", wanted=f"{needed:,}",
            do="measure in a process of its own",
        )  # fmt: skip
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
        for state in ("cold", "warm"):
            begin = time.time()
            found = _child(
                size, plan, seed=seed, outliers=outliers, buckets="all", folder=Path(folder), timeout_s=timeout_s
            )
            said = {key: value - begin for key, value in found["times"].items()} | found["memory"]
            row = {"setting": size.name, "engine": _label(plan), "caches": state, **said}
            rows.append(row | {"targets": start_marks(row)})
    return rows


def _label(plan: PrecisionPlan | None) -> str:
    return f"{OURS} {plan.name if plan else 'bf16'}"


def _child(
    size: Size, plan: PrecisionPlan | None, *, seed: int, outliers: int, buckets: str, folder: Path, timeout_s: float
) -> dict[str, Any]:
    """What `hopper_start` printed; its kernel caches lie in `folder`."""
    caches = [f"{name}={folder}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VIVACE_CACHE")]
    module = "vivace.check.hopper_start"
    command = ["env", *caches, sys.executable, "-m", module, size.name, str(seed), str(outliers), buckets]
    if plan is not None:
        file = folder / "plan.json"
        file.write_text(plan.to_json())
        command.append(str(file))
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise VivaceError("the process that was to be measured failed", got=done.stderr[-600:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
