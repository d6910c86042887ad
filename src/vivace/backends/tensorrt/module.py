"""Which TensorRT: the one file that imports NVIDIA's modules, which carry no types.

    tensorrt       full TensorRT 10.13 and later: data-centre cards, Jetson Thor and Orin, RTX. Builds where it runs.
    tensorrt_rtx   TensorRT-RTX: RTX 20 to 50 and GB10. Builds for other GPUs than the one at hand, and without any.

Both speak the same network-definition API, so the rest of this package is written once. Their engine files are never
interchangeable. Where one of them can do what the other cannot, `Module` says so; nothing else asks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ...config import TensorRTModule
from ...errors import Unsupported

Definition: TypeAlias = Any
"""An INetworkDefinition, its layers and tensors."""

OLDEST = (10, 13)
CHOICES: tuple[TensorRTModule, ...] = ("tensorrt", "tensorrt_rtx")
INSTALL = "pip install 'vivace[tensorrt]' (TensorRT-RTX), or tensorrt 10.13 or later for Jetson and data-centre cards"


@dataclass(frozen=True)
class Module:
    """One importable TensorRT.

    name      "tensorrt" or "tensorrt_rtx"
    version   as the module says
    api       the module itself
    """

    name: str
    version: str
    api: Any

    @property
    def label(self) -> str:
        """For people: "tensorrt_rtx 1.7.1.116"."""
        return f"{self.name} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """TensorRT-RTX: has targets, scales may be inputs of a network, no Hopper, no Jetson."""
        return self.name == "tensorrt_rtx"

    @property
    def strongly_typed(self) -> int:
        """Flags of a strongly typed network: TensorRT 10 wants one set, later ones and RTX know nothing else."""
        flag = getattr(getattr(self.api, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
        return 0 if self.is_rtx or flag is None else 1 << int(flag)

    def offers(self, layer: str) -> bool:
        """Whether the network definition has `add_<layer>`: fused layers differ between versions."""
        return getattr(self.api.INetworkDefinition, f"add_{layer}", None) is not None

    def dtype(self, dtype: torch.dtype) -> Any:
        """TensorRT's name of a torch dtype."""
        kinds = self.api.DataType
        return {
            torch.float32: kinds.FLOAT, torch.float16: kinds.HALF, torch.bfloat16: kinds.BF16,
            torch.float8_e4m3fn: kinds.FP8, torch.int8: kinds.INT8, torch.bool: kinds.BOOL, torch.int32: kinds.INT32,
        }[dtype]  # fmt: skip


def load(wanted: TensorRTModule = "auto", *, find: Callable[[str], Any] = importlib.import_module) -> Module:
    """The module that was asked for; "auto" takes what is installed, full TensorRT first.

    Raises Unsupported naming the extra where nothing is installed, or the version where it is too old.
    """
    reasons = []
    for name in CHOICES if wanted == "auto" else (wanted,):
        try:
            api = find(name)
        except (ImportError, OSError) as error:  # OSError: a library of it cannot be loaded
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        version = str(getattr(api, "__version__", "0"))
        if name == "tensorrt" and numbers(version) < OLDEST:
            reasons.append(f"tensorrt {version} is older than {'.'.join(map(str, OLDEST))}")
            continue
        return Module(name, version, api)
    raise Unsupported("no usable TensorRT is installed", got="; ".join(reasons), do=INSTALL)


def numbers(version: str) -> tuple[int, ...]:
    """(1, 7, 1, 116) of "1.7.1.116"; anything after a part that is no number is dropped."""
    found: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)
