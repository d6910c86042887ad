"""What works on this machine and what to do about the rest. Standard library only, as `environment`, which it asks.

`vivace doctor` prints these findings as a table; where the libraries that print tables are themselves broken, as plain
lines.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import cache_dir
from . import environment
from .results import result


@dataclass(frozen=True)
class Check:
    """One finding: fine, a problem (needed and broken), or something absent that is optional."""

    name: str
    state: str
    found: str
    do: str = ""


def examine(tokenizer: Path | None = None) -> tuple[list[Check], dict[str, Any]]:
    """Every finding, and the facts of `environment.collect`. Takes a few imports in child processes (seconds)."""
    with ThreadPoolExecutor() as pool:  # children that wait for nothing from each other
        dependencies, backends = pool.submit(_dependencies), pool.submit(_backends)
        facts = environment.collect()
    checks = [
        *_machine(facts),
        *dependencies.result(),
        *_torch(facts["torch"]),
        *backends.result(),
        *_compiler(facts["torch"]),
        *_optional(),
        _cache(),
        _tokenizer(tokenizer),
    ]
    return checks, facts


def healthy(checks: list[Check]) -> bool:
    """Whether nothing that vivace needs is broken."""
    return all(check.state != "problem" for check in checks)


def document(checks: list[Check], facts: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `vivace doctor`."""
    return result("doctor", {"healthy": healthy(checks), "checks": checks}, environment=facts)


def _machine(facts: dict[str, Any]) -> list[Check]:
    cpu, ram, state = facts["cpu"], facts["ram_gb"], facts["state"]
    python = tuple(int(part) for part in facts["python"].split(".")[:2])
    commit = facts["commit"]
    return [
        Check("system", "fine", facts["os"]),
        Check(
            "cpu",
            "fine",
            f"{cpu['model']}, {cpu['cores_usable']} of {cpu['cores']} cores, load {state['load_1m']}, "
            f"governor {state['governor'] or 'not shown'}",
        ),
        Check("memory", "fine", f"{ram['available']} GB free of {ram['total']} GB"),
        Check(
            "python", "fine" if python >= (3, 11) else "problem", facts["python"], "vivace needs Python 3.11 or newer"
        ),
        Check(
            "commit",
            "fine",
            f"{commit['hash'][:12]}{' + local changes' if commit['dirty'] else ''}"
            if commit
            else "an installed package, not a checkout",
        ),
    ]


def _dependencies() -> list[Check]:
    found = environment.versions(list(environment.DEPENDENCIES))
    broken = environment.broken_imports({k: v for k, v in environment.DEPENDENCIES.items() if k != "torch"})
    checks = []
    for name, version in found.items():
        if name in broken:
            checks.append(Check(name, "problem", broken[name], f"pip install --force-reinstall {name}"))
        elif name != "torch":
            checks.append(Check(name, "fine", version or "importable, version not recorded"))
    return checks


def _torch(torch: dict[str, Any]) -> list[Check]:
    if "error" in torch:
        return [Check("torch", "problem", torch["error"], "reinstall torch: https://pytorch.org/get-started/locally")]
    cuda = torch["cuda_build"] or "none"
    found = f"{torch['version']}, CUDA build {cuda}, {torch['threads']} threads, {torch['cpu_capability']}"
    checks = [Check("torch", "fine", found)]
    for gpu in torch["gpus"]:
        found = f"{gpu['name']}, {gpu['memory_gb']} GB, compute capability {gpu['capability']}"
        checks.append(Check("gpu", "fine", found))
    if not torch["gpus"]:
        driver = environment.nvidia_smi()
        do = "a GPU is there but torch does not see it: install a CUDA build of torch" if driver else ""
        checks.append(Check("gpu", "absent", driver[0]["name"] if driver else "none; everything runs on the CPU", do))
    return checks


def _backends() -> list[Check]:
    checks = []
    for name, reasons in environment.backends().items():
        if "error" in reasons:
            state = "problem" if name == "eager" else "absent"
            checks.append(Check(f"backend {name}", state, str(reasons["error"])))
            continue
        works = [device for device, reason in reasons.items() if reason is None]
        refused = "; ".join(f"not on {device}: {reason}" for device, reason in reasons.items() if reason is not None)
        state = "fine" if works else ("problem" if name == "eager" else "absent")
        found = "; ".join(filter(None, [f"runs on {', '.join(works)}" if works else "", refused]))
        checks.append(Check(f"backend {name}", state, found))
    return checks


def _compiler(torch: dict[str, Any]) -> list[Check]:
    """Triton's C compiler, where there is a GPU to launch kernels on."""
    if not torch.get("gpus"):
        return []
    missing = environment.compiler_missing()
    if missing is None:
        return [Check("C compiler", "fine", "Triton finds one, and Python's headers")]
    what, _, do = missing.rpartition("; ")
    return [Check("C compiler", "absent", f"{what}: no kernel can be launched on the GPU", do)]


def _optional() -> list[Check]:
    checks = []
    for extra, module in environment.EXTRAS.items():
        version = environment.versions([module.replace("_", "-")])[module.replace("_", "-")]
        do = "" if version else f"pip install 'vivace[{extra}]'"
        checks.append(Check(f"extra {extra}", "fine" if version else "absent", version or "not installed", do))
    for name, version in environment.versions(list(environment.GPU_PACKAGES)).items():
        checks.append(Check(name, "fine" if version else "absent", version or "not installed"))
    return checks


def _cache() -> Check:
    folder = cache_dir()
    reason = environment.writable(folder)
    do = "set VIVACE_CACHE to a folder that you can write to" if reason else ""
    return Check("cache folder", "problem" if reason else "fine", reason or str(folder), do)


def _tokenizer(path: Path | None) -> Check:
    if path is None:
        return Check(
            "tokenizer", "absent", "not given", "pass --tokenizer FILE, or use a checkpoint folder that ships one"
        )
    if path.exists():
        return Check("tokenizer", "fine", str(path))
    return Check("tokenizer", "problem", f"{path} does not exist", "pass a SentencePiece .model or a tokenizer.json")
