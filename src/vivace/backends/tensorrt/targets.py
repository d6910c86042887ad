"""GPUs that an engine can be built for, and what each of them can do.

TensorRT-RTX names its targets by compute capability and has none for Hopper (9.0), data-centre Blackwell (10.0, 10.3),
Jetson Orin (8.7) and Thor (11.0): there full TensorRT is the way, built on the device. Its own list decides; what is
written here is which types a target computes in, and the sentence for a target that is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...config import TensorRTBase
from ...errors import ConfigError, Unsupported
from .module import Module

KNOWN: dict[str, str] = {
    "sm75": "RTX 20", "sm80": "A100", "sm86": "RTX 30", "sm87": "Jetson Orin", "sm89": "RTX 40, L4, L40",
    "sm90": "H100, H200", "sm100": "B200", "sm103": "B300", "sm110": "Jetson Thor", "sm120": "RTX 50, RTX PRO",
    "sm121": "GB10",
}  # fmt: skip
FIRST: dict[torch.dtype, tuple[int, str]] = {torch.float8_e4m3fn: (89, "FP8"), torch.bfloat16: (80, "BF16")}


def option(name: str, value: str) -> str:
    """How a person asks for a TensorRT option: `vivace build` has flags, the verbs that run engines have one text."""
    return f"--{name} {value} (serve, check, bench: --tensorrt {name}={value})"


INSTEAD = {
    torch.float8_e4m3fn: f"use an INT8 plan (vivace calibrate --preset int8-mlp) or --precision bfloat16, below 8.0 with "
    f"{option('base', 'fp16')}, or leave this target out",
    torch.bfloat16: f"use {option('base', 'fp16')}",
}
CURRENT = "current"


@dataclass(frozen=True, order=True)
class Target:
    """A compute capability, 10 times: 8.9 is 89."""

    number: int

    def __str__(self) -> str:
        return f"sm{self.number}"

    @property
    def label(self) -> str:
        """For people: "sm89 (RTX 40, L4, L40)"."""
        return f"{self} ({KNOWN[str(self)]})" if str(self) in KNOWN else str(self)

    def member(self, known: Any) -> Any:
        """The module's own name of this target. Raises Unsupported where it has none."""
        found = known.__members__.get(f"SM{self.number}")
        if found is None:
            names = ", ".join(name.lower() for name in known.__members__ if name.startswith("SM"))
            raise Unsupported(
                f"TensorRT-RTX has no target {self.label}", got=str(self), wanted=names,
                do="there full TensorRT is the way: on the device, vivace build --module tensorrt --target current, or "
                "--tensorrt module=tensorrt of serve, check and bench",
            )  # fmt: skip
        return found


def parse(text: str) -> tuple[Target, ...]:
    """ "sm89,sm120" as targets; "current" = () = the GPU of this machine. Raises ConfigError."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if names == [CURRENT]:
        return ()
    wrong = [name for name in names if name not in KNOWN]
    if wrong or not names:
        raise ConfigError(
            "unknown target", got=repr(", ".join(wrong) or text), wanted=f"current, or some of {', '.join(KNOWN)}"
        )
    return tuple(sorted({Target(int(name.removeprefix("sm"))) for name in names}))


def choose_base(wanted: TensorRTBase | Literal["auto"], number: int, *, float32: bool) -> TensorRTBase:
    """Compute type of the engines: float32 for a float32 model, else what was asked for or what the GPU has.

    number  of the oldest target.  Raises ConfigError where a narrower type is asked of a float32 model.
    """
    if float32:
        if wanted not in ("auto", "fp32"):
            raise ConfigError(
                f"engines in {wanted} of a model in float32", got=option("base", wanted),
                wanted="a model in bfloat16", do="add --precision bfloat16 (or a plan), or leave base out",
            )  # fmt: skip
        return "fp32"
    if wanted != "auto":
        return wanted
    return "bf16" if number >= FIRST[torch.bfloat16][0] else "fp16"


def here(device: torch.device | str | None = None) -> Target:
    """The GPU of this machine, as torch sees it; None = the current one. Raises Unsupported if there is none."""
    if not torch.cuda.is_available():
        raise Unsupported("no CUDA device is visible to torch", do="name targets: --target sm89,sm120")
    major, minor = torch.cuda.get_device_capability(device)
    return Target(10 * major + minor)


def check_types(targets: Sequence[Target], *, types: Collection[torch.dtype], module: Module) -> None:
    """Raise Unsupported if a target lacks one of these types, or if the module does not know a target at all."""
    for target in targets:
        if module.is_rtx:
            target.member(module.api.ComputeCapability)
        for dtype, (first, name) in FIRST.items():
            if dtype in types and target.number < first:
                raise Unsupported(
                    f"{target.label} has no {name}", got=f"a network with {name} values",
                    wanted=f"compute capability {first / 10:.1f} or later", do=INSTEAD[dtype],
                )  # fmt: skip
