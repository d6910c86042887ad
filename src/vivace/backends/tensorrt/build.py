"""From a network definition to an engine file's bytes: targets, progress, what went wrong in one sentence."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import Unsupported
from ..on_device import on
from . import audit
from .evaluate import torch_dtype
from .module import Module
from .networks import Network
from .targets import Target, check_types, here, option

Progress = Callable[[str, float], None]
"""Called with a phase of the builder and the fraction of it that is done."""
FIRST_FLOAT32_PRODUCTS = 80
MEMORY_WORDS = ("out of memory", "bad_alloc", "memory allocation", "outofmemory", "cannot allocate")


@dataclass(frozen=True)
class Built:
    """An engine and how it came about.  seconds: of the builder alone, without writing the definition."""

    engine: bytes
    seconds: float


class Log:
    """TensorRT's messages: errors are kept, so that a failed build can say why; warnings and below are dropped."""

    messages: list[str]

    @staticmethod
    def of(module: Module) -> Any:
        """A logger of this module's own base class."""
        base = module.api.ILogger

        class Kept(base):  # type: ignore[misc, valid-type]  # the class exists at run time only
            def __init__(self) -> None:
                base.__init__(self)
                self.messages: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if int(severity) <= int(base.Severity.ERROR):
                    self.messages.append(message)

        return Kept()


def build(
    network: Network, targets: Sequence[Target], *, progress: Progress | None = None,
    device: torch.device | None = None,
) -> Built:  # fmt: skip
    """Build one engine for all of `targets`; [] = for the GPU of this machine (device: which; None = the current one).

    Raises Unsupported: a type that a target lacks, a target that the module lacks, no memory, whatever the builder says.
    """
    module = network.module
    judged = targets or [here(device)]
    check_types(judged, types=types_of(network), module=module)
    _check_products(network, judged)
    config = network.owner.builder.create_builder_config()
    config.clear_flag(module.api.BuilderFlag.TF32)  # float32 parts of a checkpoint's flavour stay float32
    _aim(config, targets, module)
    monitor = None if progress is None else _monitor(module, progress)  # must outlive the build
    if monitor is not None:
        config.progress_monitor = monitor
    begin = time.perf_counter()
    try:
        with on(device):  # "current" means torch's current GPU, and tactics are timed there
            memory = network.owner.builder.build_serialized_network(network.definition, config)
    except MemoryError as error:
        raise _no_memory(network, str(error)) from error
    seconds = time.perf_counter() - begin
    if memory is None:
        raise _explained(network, targets)
    return Built(bytes(memory), seconds)


def types_of(network: Network) -> set[torch.dtype]:
    """Types of a network's inputs, outputs and parameters: its own, not those of the policy that it is a part of."""
    known, definition = dict(network.outlined.named_parameters()), network.definition
    found = {known[name].dtype for name in network.parameters}
    found |= {torch_dtype(definition.get_input(index)) for index in range(definition.num_inputs)}
    return found | {torch_dtype(definition.get_output(index)) for index in range(definition.num_outputs)}


def _check_products(network: Network, targets: Sequence[Target]) -> None:
    """TensorRT-RTX 1.7.1 compiles no float32 product for Turing, and says so in its compiler's words."""
    old = [target for target in targets if target.number < FIRST_FLOAT32_PRODUCTS]
    wide = [product.layer for product in audit.products(network) if product.precision == "float32"] if old else []
    if wide and network.module.is_rtx:
        raise Unsupported(
            f"{old[0].label} has no float32 products in TensorRT-RTX", got=f"{', '.join(wide[:3])} in float32",
            do="leave this target out: RTX 30 and later",
        )  # fmt: skip


def _aim(config: Any, targets: Sequence[Target], module: Module) -> None:
    if not module.is_rtx:
        if targets:
            raise Unsupported(
                f"{module.name} builds for the GPU it runs on only", got=f"--target {','.join(map(str, targets))}",
                do=f"use --target current on the device itself, or {option('module', 'tensorrt_rtx')}",
            )  # fmt: skip
        return
    known = module.api.ComputeCapability
    wanted = [target.member(known) for target in targets] or [known.CURRENT]
    config.num_compute_capabilities = len(wanted)
    for index, member in enumerate(wanted):
        if not config.set_compute_capability(member, index):
            raise Unsupported(f"{module.label} refuses the target {member}", do="see docs/guides/tensorrt.md")


def _monitor(module: Module, progress: Progress) -> Any:
    base = module.api.IProgressMonitor

    class Monitor(base):  # type: ignore[misc, valid-type]  # the class exists at run time only
        def __init__(self) -> None:
            base.__init__(self)
            self._sizes: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._sizes[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, (step + 1) / self._sizes.get(phase_name, step + 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            progress(phase_name, 1.0)

    return Monitor()


def _explained(network: Network, targets: Sequence[Target]) -> Unsupported:
    said = [message.strip() for message in network.owner.log.messages]
    text = "; ".join(said[-2:]) or "no reason given"
    if any(word in text.lower() for word in MEMORY_WORDS):
        return _no_memory(network, text)
    if "driver" in text.lower():
        return Unsupported(
            f"{network.module.label} cannot build for the GPU of this machine", got=text,
            do="name a target (--target sm89), or run this on a machine with a GPU and its driver",
        )  # fmt: skip
    names = ", ".join(map(str, targets)) or "this machine's GPU"
    return Unsupported(f"{network.module.label} could not build {network.label} for {names}", got=text)


def _no_memory(network: Network, text: str) -> Unsupported:
    return Unsupported(
        f"no memory left while building {network.label}", got=text or "MemoryError",
        do=f"use {option('weights', 'inputs')}: engines without weights build in about 1 GB; or more memory",
    )  # fmt: skip
