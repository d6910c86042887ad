"""On which device, and by which backend: chosen before anything is loaded as far as that can be known, and never silently.

What "auto" passed over and why is part of the engine's facts: a robot that runs slower than it could must be able to say
so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends import base
from ..config import EngineConfig
from ..errors import ConfigError, Unsupported
from ..model.pi import Pi

logger = logging.getLogger(__name__)

FASTEST_FIRST = ("cuda_graph", "compiled")


@dataclass(frozen=True)
class Chosen:
    """A backend's name, and {faster backend: why it cannot run this} for what was passed over."""

    name: str
    passed_over: dict[str, str] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """For the ResolvedEngine's details; empty where nothing was passed over."""
        return {"passed_over": self.passed_over} if self.passed_over else {}


def device(config: EngineConfig) -> torch.device:
    """The device that `config` names. Raises ConfigError for an unknown one, Unsupported for one that is not there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError("unknown device", got=repr(config.device), wanted="auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("unknown device", got=repr(config.device), wanted="auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Unsupported(
            f"no device {config.device}",
            got=f"{torch.cuda.device_count()} CUDA devices visible to torch {torch.__version__}",
            do="use --device cpu, or install a CUDA build of torch; see `vivace doctor`",
        )  # fmt: skip
    return device


def refuse_early(config: EngineConfig, device: torch.device) -> None:
    """Say that a named backend cannot run on this machine before gigabytes are loaded for it."""
    if config.backend != "auto" and (reason := base.why_not(config.backend, device=str(device), config=config)):
        raise Unsupported(
            f"backend {config.backend!r} cannot run on {device}", got=reason, do="choose another --backend"
        )


def backend(config: EngineConfig, device: torch.device, model: Pi, *, quantised: bool) -> Chosen:
    """The named backend, or the fastest that can run `model`. Raises Unsupported if a plan would only be simulated."""
    if config.backend != "auto":
        return Chosen(config.backend)
    if device.type == "cpu":
        return Chosen("eager")
    passed: dict[str, str] = {}
    for name in FASTEST_FIRST:
        reason = base.why_not(name, device=str(device), model=model)
        if reason is None:
            return Chosen(name, passed)
        logger.warning("%s is not used: %s", name, reason)
        passed[name] = reason
        if quantised:  # the others only simulate 8 bits: slower than bfloat16, and never what was asked for
            raise Unsupported(
                "the kernels cannot run this plan here", got=reason, wanted="a GPU and a network that they fit",
                do="use --precision bfloat16, or name --backend eager to simulate the plan's numbers",
            )  # fmt: skip
    return Chosen("eager", passed)
