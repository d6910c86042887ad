"""What this machine is and what can run on it. Standard library only: this file must work when everything else is broken.

Libraries are never imported here. Each is imported in a child process of its own, so one that crashes, hangs or raises
costs a line in the report and nothing else. Only a torch that this process runs on already is asked here.
`python -m vivace.check.environment` prints the report as JSON even where vivace's own dependencies cannot be imported.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

DEPENDENCIES = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "pillow": "PIL",
    "sentencepiece": "sentencepiece",
    "websockets": "websockets",
    "msgpack": "msgpack",
    "tyro": "tyro",
    "rich": "rich",
    "jaxtyping": "jaxtyping",
}
EXTRAS = {
    "tokenizers": "tokenizers",
    "jax-checkpoints": "tensorstore",
    "metrics": "prometheus_client",
    "report": "matplotlib",
}
GPU_PACKAGES = {"triton": "triton", "tensorrt": "tensorrt", "tensorrt-rtx-cu13": "tensorrt_rtx"}
CHILD_TIMEOUT_S = 120.0

_TORCH_PROBE = """
import json, torch
from vivace.check.environment import torch_facts
print(json.dumps(torch_facts(torch)))
"""
_IMPORT_PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(json.dumps({"name": name}), flush=True)
"""
_COMPILER_PROBE = """
import json
from vivace.ops.toolchain import compiler_missing
print(json.dumps({"missing": compiler_missing()}))
"""
_BACKEND_PROBE = """
import json, sys
from vivace.backends.base import BACKENDS, why_not
for name in sys.argv[1:] or BACKENDS:
    print(json.dumps({"name": name, "all": list(BACKENDS)}), flush=True)
    reasons = {device: why_not(name, device=device) for device in ("cpu", "cuda")}
    print(json.dumps({"name": name, "reasons": reasons}), flush=True)
"""


def collect() -> dict[str, Any]:
    """The facts stored in every result: machine, versions, GPU, commit.

    Takes one import of torch (seconds) in a process that has not done so; in others torch says what it is running with.
    """
    torch = _torch()
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu(),
        "ram_gb": ram_gb(),
        "packages": versions([*DEPENDENCIES, *GPU_PACKAGES]),
        "torch": torch,
        "gpus": _gpus(torch),
        "commit": commit(),
        "state": snapshot(),
    }


def torch_facts(torch: Any) -> dict[str, Any]:
    """What the module `torch` says of itself and of the GPUs that it sees."""
    cuda = torch.cuda.is_available()
    facts = {
        "version": str(torch.__version__), "cuda_build": torch.version.cuda, "cuda_available": cuda,
        "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    gpus = []
    for index in range(torch.cuda.device_count() if cuda else 0):
        p = torch.cuda.get_device_properties(index)
        gpus.append({
            "name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gb": round(p.total_memory / 1e9, 1),
            "multiprocessors": p.multi_processor_count,
        })  # fmt: skip
    return {**facts, "gpus": gpus}


def snapshot() -> dict[str, Any]:
    """What changes while a benchmark runs: load, clocks, temperature. Taken before and after the samples."""
    load = os.getloadavg() if sys.platform != "win32" else ()
    return {
        "time_s": time.time(),
        "load_1m": round(load[0], 2) if load else None,
        "cpu_mhz": _cpu_mhz(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "gpus": nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"),
    }


def cpu() -> dict[str, Any]:
    """Model, cores that this process may use, and cores of the machine."""
    model = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {"model": model, "cores_usable": usable, "cores": os.cpu_count(), "machine": platform.machine()}


def ram_gb() -> dict[str, float | None]:
    """Total and available main memory in gigabytes, None where the system does not say."""
    values = {
        name: _field("/proc/meminfo", key) for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))
    }
    return {name: round(int(text.split()[0]) * 1024 / 1e9, 1) if text else None for name, text in values.items()}


def versions(packages: list[str]) -> dict[str, str | None]:
    """Installed version of each distribution, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any] | None:
    """Commit of the checkout that vivace is imported from, and whether it has local changes; None outside of one."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    head = _output([*git, "rev-parse", "HEAD"], timeout_s=5)
    if head is None or _output([*git, "ls-files", "--error-unmatch", here.name], timeout_s=5) is None:
        return None  # not git, or a package installed inside somebody else's checkout
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"], timeout_s=5)
    return {"hash": head.strip(), "dirty": bool((changed or "").strip())}


def nvidia_smi(fields: str = "name,driver_version,compute_cap,memory.total,clocks.max.sm") -> list[dict[str, str]]:
    """One row per GPU from nvidia-smi; empty without the tool or a working driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    text = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], timeout_s=20)
    names = fields.split(",")
    return [
        dict(zip(names, map(str.strip, line.split(",")), strict=False)) for line in (text or "").splitlines() if line
    ]


def broken_imports(modules: Mapping[str, str]) -> dict[str, str]:
    """Which modules cannot be imported, with the last line of the reason. Keys are distribution names.

    One child imports them one after the other; the one at which it dies is broken, and the next child goes on behind it.
    """
    broken: dict[str, str] = {}
    left = list(modules.items())
    while left:
        lines, error = _child(_IMPORT_PROBE, *(module for _, module in left))
        if error is None:
            return broken
        name, _ = left[min(len(lines), len(left) - 1)]
        broken[name] = error
        left = left[len(lines) + 1 :]
    return broken


def backends() -> dict[str, dict[str, Any]]:
    """Per registered backend, the reason why it cannot run on "cpu" and on "cuda"; None = it can."""
    found: dict[str, dict[str, Any]] = {}
    left: list[str] = []
    while True:
        lines, error = _child(_BACKEND_PROBE, *left)
        if not lines:
            return found or {"eager": {"error": error or "the registry is empty"}}
        for line in lines:
            found[line["name"]] = line.get("reasons", {"error": error})
        left = [name for name in lines[0]["all"] if name not in found]
        if not left:
            return found


def compiler_missing() -> str | None:
    """What Triton would not find when it compiles the launcher of a kernel; None = it finds all, or cannot be asked."""
    missing = probe(_COMPILER_PROBE).get("missing")
    return None if missing is None else str(missing)


def writable(folder: Path) -> str | None:
    """Why files cannot be created under `folder`, or None. Looks at the nearest folder that exists; creates nothing."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return f"{there} is not a folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable"


def probe(code: str) -> dict[str, Any]:
    """Run Python code in a child that prints one JSON object as its last line; {"error": reason} when it does not."""
    lines, error = _child(code)
    if error is not None:
        return {"error": error}
    return lines[-1] if lines else {"error": "the probe printed no JSON"}


def _torch() -> dict[str, Any]:
    """`torch_facts`, here if this process has imported torch, else from a child; {"error": reason} if torch is broken."""
    loaded = sys.modules.get("torch")
    if loaded is None:
        return probe(_TORCH_PROBE)
    try:
        if loaded.cuda.is_available() and not loaded.cuda.is_initialized():
            return probe(_TORCH_PROBE)  # a GPU that nobody here has used: asking it can hang, and takes memory
        return torch_facts(loaded)
    except (RuntimeError, AssertionError, OSError) as error:  # a driver that is gone, say: a line, as from a child
        return {"error": f"{type(error).__name__}: {error}"}


def _child(code: str, *arguments: str) -> tuple[list[dict[str, Any]], str | None]:
    """The JSON objects that a child printed, one a line, and why it did not end well; None = it did."""
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
        return _objects(
            printed.decode() if isinstance(printed, bytes) else printed
        ), f"no answer in {CHILD_TIMEOUT_S:g} s"
    except OSError as error:
        return [], str(error)
    said = done.stderr.strip().splitlines()
    error_line = None if done.returncode == 0 else (said[-1] if said else f"exit code {done.returncode}")
    return _objects(done.stdout), error_line


def _objects(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue  # a library that prints while it is imported
        if isinstance(value, dict):
            found.append(value)
    return found


def _gpus(torch: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [dict(gpu) for gpu in torch.get("gpus", [])]
    driver = nvidia_smi()
    if not rows:
        return [dict(row) for row in driver]
    for row in rows:
        row["driver"] = driver[0].get("driver_version") if driver else None
    return rows


def _cpu_mhz() -> float | None:
    text = _field("/proc/cpuinfo", "cpu MHz")
    return round(float(text), 0) if text else None


def _field(path: str, key: str) -> str | None:
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _output(command: list[str], *, timeout_s: float) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    report = collect()
    report["broken"] = broken_imports(DEPENDENCIES)
    print(json.dumps(report, indent=1))
