"""Runs an engine on torch's tensors: addresses are bound, nothing is copied, everything goes to torch's current stream.

A call may be recorded into a CUDA graph: it allocates its outputs with torch's allocator and enqueues; it never waits. The
first call of a context must not be the recorded one (TensorRT sets up resources then), which the graph backend's warm-up
sees to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import NumericsError, ShapeError, Unsupported
from ..on_device import on
from .build import MEMORY_WORDS, Log
from .evaluate import torch_dtype
from .module import Module
from .targets import option

ROOM = (
    "end other programs on this GPU (nvidia-smi lists them), use fewer prompt lengths or smaller batches, or "
    f"{option('weights', 'inputs')}: one copy of the weights for all engines"
)


class NoMemory(Unsupported):
    """The engine is sound, the GPU has no room for it: building it again would not help."""


class Engine:
    """An execution context with its weights bound.

    weights   {input: tensor} that stay bound: parameters of the model, on the device
    compiled  file of TensorRT-RTX's run-time cache; None = do not keep one
    """

    def __init__(
        self, module: Module, plan: bytes, *, weights: Mapping[str, Tensor], device: torch.device,
        compiled: Path | None = None,
    ) -> None:  # fmt: skip
        self._device, self._log = device, Log.of(module)
        with on(device):  # an engine lives on the GPU that is current when it is made
            self._open(module, plan, compiled)
        self._inputs, self._outputs = self._tensors(module)
        self._bound: dict[str, Tensor] = {}
        for name in [name for name in self._inputs if name in weights]:
            self._bind(name, weights[name])
            self._bound[name] = weights[name]

    def _open(self, module: Module, plan: bytes, compiled: Path | None) -> None:
        self._runtime = module.api.Runtime(self._log)
        engine = self._runtime.deserialize_cuda_engine(plan)
        said = "; ".join(self._log.messages[-2:]) or "no reason given"
        if engine is None and any(word in said.lower() for word in MEMORY_WORDS):
            raise NoMemory(f"no memory left for an engine of {len(plan) / 1e6:.0f} MB", got=said, do=ROOM)
        if engine is None:
            raise Unsupported(f"{module.label} refuses the engine", got=said)
        self._engine = engine
        self._cache: Any = None
        self._context = self._create(module, compiled)
        if self._context is None:
            raise _no_context(module, engine, said="; ".join(self._log.messages[-2:]) or "no reason given")

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Enqueue one run.  {input: contiguous tensor on the device} -> {output: new tensor}."""
        missing = self._inputs.keys() - feeds.keys() - self._bound.keys()
        if missing:
            raise ShapeError("inputs of the engine were not given", got=sorted(feeds), wanted=sorted(missing))
        for name, value in feeds.items():
            self._bind(name, value)
        outputs = {}
        for name, (shape, dtype) in self._outputs.items():
            outputs[name] = torch.empty(shape, dtype=dtype, device=self._device)
            self._address(name, outputs[name])
        with on(self._device):
            works = self._context.execute_async_v3(self._stream())
        if not works:
            raise NumericsError("the engine did not run", got="; ".join(self._log.messages[-2:]) or "no reason given")
        return outputs

    def save(self, compiled: Path) -> None:
        """Keep what TensorRT-RTX compiled for this GPU, so that the next start compiles nothing."""
        if self._cache is None:
            return
        compiled.parent.mkdir(parents=True, exist_ok=True)
        partial = compiled.with_name(compiled.name + ".partial")
        partial.write_bytes(bytes(self._cache.serialize()))
        partial.replace(compiled)

    def _create(self, module: Module, compiled: Path | None) -> Any:
        if not module.is_rtx or compiled is None:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        self._cache = config.create_runtime_cache()
        if compiled.is_file():
            self._cache.deserialize(compiled.read_bytes())
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def _tensors(self, module: Module) -> tuple[dict[str, Any], dict[str, Any]]:
        """{name: (shape, dtype)} of inputs and of outputs."""
        inputs: dict[str, Any] = {}
        outputs: dict[str, Any] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            facts = (tuple(self._engine.get_tensor_shape(name)), _dtype(self._engine, name))
            is_input = self._engine.get_tensor_mode(name) == module.api.TensorIOMode.INPUT
            (inputs if is_input else outputs)[name] = facts
        return inputs, outputs

    def _bind(self, name: str, value: Tensor) -> None:
        if name not in self._inputs:
            raise ShapeError("the engine has no such input", got=name, wanted=sorted(self._inputs)[:12])
        shape, dtype = self._inputs[name]
        if (tuple(value.shape), value.dtype) != (shape, dtype) or not value.is_contiguous():
            got = (tuple(value.shape), value.dtype, "contiguous" if value.is_contiguous() else "strided")
            raise ShapeError(f"input {name} of the engine", got=got, wanted=(shape, dtype, "contiguous"))
        if value.device != self._device:
            raise ShapeError(f"input {name} of the engine", got=value.device, wanted=self._device)
        self._address(name, value)

    def _address(self, name: str, value: Tensor) -> None:
        if not self._context.set_tensor_address(name, value.data_ptr()):
            raise ShapeError(f"TensorRT refuses the address of {name}", got=tuple(value.shape))

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0


def _no_context(module: Module, engine: Any, *, said: str) -> NoMemory:
    """TensorRT answers None where the memory that an engine works in cannot be had."""
    needed = int(engine.device_memory_size_v2)
    return NoMemory(
        f"{module.label} made no execution context, for want of memory as far as is known", got=said,
        wanted=f"{needed / 2**20:.0f} MiB of working memory", do=ROOM,
    )  # fmt: skip


class _Typed:
    """What `torch_dtype` looks at."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype


def _dtype(engine: Any, name: str) -> torch.dtype:
    return torch_dtype(_Typed(engine.get_tensor_dtype(name)))
