"""The seam between "what the network is" and "who executes it": two methods, a reason why not, a lazy registry.

A backend consumes a loaded `model.Pi` (weights and definition) and runs its one forward. It may fuse, capture or compile,
but it never defines the network again. Every backend must pass `tests/conformance`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ..config import EngineConfig
from ..errors import ConfigError, Unsupported
from ..types import ModelInputs, PrefixCache, PreviousChunk, Trace
from .spans import Spans

if TYPE_CHECKING:
    from ..model.pi import Pi
    from ..precision.plan import PrecisionPlan


class Backend(Protocol):
    """Executes one policy network on one device."""

    name: str

    def prefill(self, inputs: ModelInputs, *, trace: Trace | None = None, spans: Spans | None = None) -> PrefixCache:
        """Encode the observation. Opens the spans "vision" and "prefix"; fills vision_tokens and prefix_embeds of trace.

        The cache may live in buffers that the next `prefill` overwrites: consume it first.
        """
        ...

    def denoise(
        self,
        cache: PrefixCache,
        noise: Tensor,
        *,
        previous: PreviousChunk | None = None,
        trace: Trace | None = None,
        spans: Spans | None = None,
    ) -> Tensor:
        """Integrate the flow from noise [B, H, 32] float32 to actions [B, H, 32] float32. Opens the span "denoise"."""
        ...

    def look(self, images: Tensor) -> None:
        """Begin with the pictures of the next `infer` while the host prepares the rest of the request; may do nothing.

        images  [B, V, 3, 224, 224]: the very tensor that `ModelInputs.images` of that `infer` will be
        """
        ...

    def infer(
        self, inputs: ModelInputs, noise: Tensor, *, previous: PreviousChunk | None = None, spans: Spans | None = None
    ) -> Tensor:
        """`denoise` of `prefill`, the same bits, at once: what a robot calls, for backends that gain by seeing both."""
        ...

    def warm_shapes(self, longest: int, *, views: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(views, prompt length) of what to run before a robot waits, so that as little as can be meets a cold path.

        longest  the longest prompt that may come
        views    how many pictures a request may have, all cameras first
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for the ResolvedEngine: buckets, graphs, kernels, caches."""
        ...


WhyNot = Callable[..., str | None]


@dataclass(frozen=True)
class BackendEntry:
    """One row of the registry: the module is imported only when the backend is asked for.

    judges_model  the module also has `why_not_model(model)`: not every network that fits the device fits its kernels
    reads_options its `why_not` also takes `config`: an option decides whether it can run
    audits_plan   its `create` also takes `plan`, and refuses what it would build in other formats than the plan says
    """

    module: str
    summary: str
    judges_model: bool = False
    reads_options: bool = False
    audits_plan: bool = False


BACKENDS: dict[str, BackendEntry] = {
    "eager": BackendEntry("vivace.backends.eager", "plain PyTorch, op by op; the reference"),
    "compiled": BackendEntry(
        "vivace.backends.compiled", "torch.compile, static shapes per prompt bucket", judges_model=True
    ),
    "cuda_graph": BackendEntry(
        "vivace.backends.cuda_graph", "Triton kernels, captured as CUDA graphs per shape bucket", judges_model=True
    ),
    "tensorrt": BackendEntry(
        "vivace.backends.tensorrt",
        "TensorRT or TensorRT-RTX engines, built from the model",
        judges_model=True,
        reads_options=True,
        audits_plan=True,
    ),
}


def why_not(name: str, *, device: str, model: Pi | None = None, config: EngineConfig | None = None) -> str | None:
    """Return why backend `name` cannot run on `device`, or cannot run `model` there; None if it can.

    Raises ConfigError for an unknown name.
    """
    module = _load(name)
    options = {"config": config} if BACKENDS[name].reads_options else {}
    reason: str | None = module.why_not(device=device, **options)
    if reason is None and model is not None and BACKENDS[name].judges_model:
        reason = module.why_not_model(model)
    return reason


def build(name: str, model: Pi, config: EngineConfig, *, plan: PrecisionPlan | None = None) -> Backend:
    """Construct a backend around a loaded model, or raise Unsupported with the reason.

    plan  what `model` was quantised by; None = no layer of it is
    """
    device = str(model.device)
    if reason := why_not(name, device=device, model=model, config=config):
        raise Unsupported(f"backend {name!r} cannot run on {device}", got=reason, do="choose another --backend")
    audited = {"plan": plan} if BACKENDS[name].audits_plan else {}
    backend: Backend = _load(name).create(model, config, **audited)
    return backend


def _load(name: str) -> Any:
    if name not in BACKENDS:
        raise ConfigError("unknown backend", got=repr(name), wanted=f"one of {sorted(BACKENDS)}")
    return importlib.import_module(BACKENDS[name].module)
