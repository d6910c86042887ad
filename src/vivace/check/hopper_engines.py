"""The engines of the full-size benchmark: one network, several ways to execute it and several precision plans.

All share the tensors of one bfloat16 network (`hopper_weights.twin`); a plan adds only the E4M3 copies of its own layers.
Besides the two methods of a backend each has `infer` (pixels to actions) and `graph_of` (the same on device buffers with no
copies: boundary B0). Names:

    eager              plain PyTorch in bfloat16, op by op, no graph
    compiled graph     the strongest engine that needs no kernel of its own: torch.compile of vision, prefix and denoise
                       step (static shapes, no padding; default mode unless another is asked for), all steps captured
                       in one CUDA graph
    cuda_graph PLAN    vivace's own, "bf16" or a precision plan
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import __version__
from ..backends import base, eager
from ..backends.loop import run_flow
from ..backends.spans import Spans, span
from ..checkpoints.source import Checkpoint
from ..config import EngineConfig, ResolvedEngine, use_compile_cache
from ..model.pi import Pi
from ..precision import calibrate, quantize
from ..precision.plan import PrecisionPlan, preset
from ..robots.pipeline import RobotPipeline
from ..runtime.collate import collate
from ..runtime.policy import Policy
from ..types import ModelInputs, PrefixCache, PreviousChunk, Trace
from .hopper_weights import twin, weight_bytes
from .targets import Family, Size

OURS, EAGER, COMPILED = "cuda_graph", "eager", "compiled graph"
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
"""The second tries Triton products against the library's and takes minutes; both are captured by hand."""
CONFIG = EngineConfig(num_denoise_steps=10)
"""The defaults of a server: a prompt of 200 tokens runs in the bucket of 208."""


class Whole(base.Backend, Protocol):
    """A backend whose `infer` takes inputs and noise that lie on the host, and that shows what runs without copies."""

    def graph_of(self, inputs: ModelInputs, noise: Tensor) -> Callable[[], Any]:
        """`infer` on device buffers, filled now: what boundary B0 times."""
        ...

    def graph_results(self) -> list[Tensor]:
        """Tensors that graphs hand over, each at an address that a replay must write again; [] without graphs."""
        ...


@dataclass(frozen=True)
class Engine:
    """One way to run the network.  plan None: bfloat16 throughout."""

    name: str
    plan: PrecisionPlan | None
    model: Pi
    backend: Whole
    weights_bytes: int

    @property
    def family(self) -> Family:
        """Which targets apply."""
        return "bfloat16" if self.plan is None else "fp8"

    @property
    def precision(self) -> str:
        """The plan's name, or "bf16"."""
        return "bf16" if self.plan is None else self.plan.name

    @property
    def ours(self) -> bool:
        """vivace's own, or something to compare with."""
        return self.name.startswith(OURS)

    @property
    def graphed(self) -> bool:
        """Whether `graph_of` replays a graph, whose output stands at one address and must be written again."""
        return not isinstance(self.backend, Plain)


class Plain:
    """Any backend, without a graph: `graph_of` is a call on device tensors. Also what tests on a CPU stand in with."""

    def __init__(self, backend: base.Backend, device: torch.device) -> None:
        self._backend, self._device, self.name = backend, device, backend.name
        self.prefill, self.denoise, self.look = backend.prefill, backend.denoise, backend.look
        self.warm_shapes, self.describe = backend.warm_shapes, backend.describe

    def infer(
        self, inputs: ModelInputs, noise: Tensor, *, previous: PreviousChunk | None = None, spans: Spans | None = None
    ) -> Tensor:
        """See Backend.infer."""
        cache = self.prefill(on(inputs, self._device), spans=spans)
        return self.denoise(cache, noise.to(self._device), previous=previous, spans=spans)

    def graph_of(self, inputs: ModelInputs, noise: Tensor) -> Callable[[], Any]:
        """See `Whole.graph_of`."""
        inputs, noise = on(inputs, self._device), noise.to(self._device)
        return lambda: self.denoise(self.prefill(inputs), noise)

    def graph_results(self) -> list[Tensor]:
        """See `Whole.graph_results`."""
        return []


class CompiledGraph:
    """torch.compile under CUDA graphs captured by hand; one shape at a time.  mode: torch.compile's, without graphs."""

    name = COMPILED

    def __init__(self, model: Pi, config: EngineConfig, *, mode: str = "default") -> None:
        use_compile_cache()
        self.model, self._device, self._mode = model, model.device, mode
        with torch.no_grad():
            self._table = model.time_table(config.steps)
        self._views = torch.compile(model.embed_views, dynamic=False, fullgraph=True, mode=mode)
        self._prefix = torch.compile(self._prefix_program, dynamic=False, fullgraph=True, mode=mode)
        self._step = torch.compile(model.denoise_step, dynamic=False, fullgraph=True, mode=mode)
        self._inputs: ModelInputs | None = None
        self._noise: Tensor | None = None
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def _prefix_program(self, inputs: ModelInputs, views: Tensor) -> PrefixCache:
        embeds, mask = self.model.embed_prefix(inputs, views)
        return self.model.prefill(embeds, mask, state=inputs.state)

    @torch.no_grad()
    def prefill(self, inputs: ModelInputs, *, trace: Trace | None = None, spans: Spans | None = None) -> PrefixCache:
        """See Backend.prefill; traces are not filled."""
        seen = self._fill(inputs)
        with span(spans, "vision"):
            views = self._run("vision", lambda: self._views(seen.images))
        with span(spans, "prefix"):
            cache: PrefixCache = self._run("prefix", lambda: self._prefix(seen, views))
        return cache

    @torch.no_grad()
    def denoise(
        self, cache: PrefixCache, noise: Tensor, *, previous: PreviousChunk | None = None, trace: Trace | None = None,
        spans: Spans | None = None,
    ) -> Tensor:  # fmt: skip
        """See Backend.denoise; no real-time chunking."""
        held = self._fill_noise(noise)
        with span(spans, "denoise"):
            actions: Tensor = self._run("denoise", lambda: self._flow(cache, held))
        return actions.clone()

    def look(self, images: Tensor) -> None:
        """See Backend.look: does nothing."""

    @torch.no_grad()
    def infer(
        self, inputs: ModelInputs, noise: Tensor, *, previous: PreviousChunk | None = None, spans: Spans | None = None
    ) -> Tensor:
        """See Backend.infer; no real-time chunking."""
        actions: Tensor = self._run("whole", self._everything(inputs, noise))
        return actions.clone()

    @torch.no_grad()
    def graph_of(self, inputs: ModelInputs, noise: Tensor) -> Callable[[], Any]:
        """See `Whole.graph_of`."""
        everything = self._everything(inputs, noise)
        self._run("whole", everything)
        return lambda: self._run("whole", everything)

    def graph_results(self) -> list[Tensor]:
        """See `Whole.graph_results`."""
        return [result for _, result in self._graphs.values() if isinstance(result, Tensor)]

    def _everything(self, inputs: ModelInputs, noise: Tensor) -> Callable[[], Tensor]:
        """Pixels to actions on the buffers, filled now."""
        seen, held = self._fill(inputs), self._fill_noise(noise)
        return lambda: self._flow(self._prefix(seen, self._views(seen.images)), held)

    def warm_shapes(self, longest: int, *, views: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See Backend.warm_shapes."""
        return ((views[0], longest),)

    def describe(self) -> dict[str, Any]:
        """See Backend.describe."""
        return {"torch": torch.__version__, "mode": self._mode, "graphs": sorted(self._graphs)}

    def _flow(self, cache: PrefixCache, noise: Tensor) -> Tensor:
        return run_flow(self.model, self._step, self._table, cache, noise, previous=None, trace=None)

    def _run(self, name: str, work: Callable[[], Any]) -> Any:
        """Replay the graph `name`, captured first if need be."""
        if name not in self._graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = work()
            self._graphs[name] = graph, result
        graph, result = self._graphs[name]
        graph.replay()
        return result

    def _fill(self, inputs: ModelInputs) -> ModelInputs:
        held = self._inputs
        if held is None or held.images.shape != inputs.images.shape or held.tokens.shape != inputs.tokens.shape:
            self._graphs.clear()
            held = self._inputs = on(inputs, self._device, copy=True)
        held.images.copy_(inputs.images, non_blocking=True)
        held.tokens.copy_(inputs.tokens, non_blocking=True)
        return held

    def _fill_noise(self, noise: Tensor) -> Tensor:
        if self._noise is None or self._noise.shape != noise.shape:
            self._noise = torch.empty(noise.shape, device=self._device)
        self._noise.copy_(noise, non_blocking=True)
        return self._noise


def on(inputs: ModelInputs, device: torch.device, *, copy: bool = False) -> ModelInputs:
    """Pixels and tokens on `device`; pi0.5 has no more."""
    return ModelInputs(inputs.images.to(device, copy=copy), inputs.tokens.to(device, copy=copy))


def make(
    name: str, network: Pi, *, plan: PrecisionPlan | None = None, config: EngineConfig = CONFIG, in_place: bool = False,
    compile_mode: str = "default",
) -> Engine:  # fmt: skip
    """An engine over the tensors of `network`. On a CPU every engine is the eager one, so that the logic can be tested.

    in_place  `network` itself becomes the engine's, so that nothing of it stays in bfloat16 where the plan says E4M3
    Raises    Unsupported with the backend's reason.
    """
    model = network if in_place else twin(network)
    if plan is not None:
        quantize.apply(model, plan)
    device = model.device
    backend: Whole
    if name == EAGER or device.type == "cpu":
        backend = Plain(eager.create(model, config), device)
    elif name == COMPILED:
        backend = CompiledGraph(model, config, mode=compile_mode)
    else:
        backend = base.build(name, model, config, plan=plan)  # type: ignore[assignment]
    label = f"{name} {plan.name if plan else 'bf16'}" if name == OURS else name
    return Engine(label, plan, model, backend, weight_bytes(model))


def as_served(engine: Engine, inputs: ModelInputs, noise: Tensor) -> None:
    """Give the engine the graphs that a warmed-up server runs such a request in: those that read masks.

    A server warms up with prompts that do not fill their buckets, and from then on no prompt runs without masks, however
    long (`cuda_graph.warm_shapes`, `buffers.choose`). So one token fewer is run first. Without prompt tokens there is no
    mask, and no server.
    """
    if engine.ours and engine.graphed and inputs.tokens.shape[1] > 1:
        engine.backend.infer(replace(inputs, tokens=inputs.tokens[:, :-1].contiguous()), noise)


def plans_of(names: Sequence[str], ranges: calibrate.Ranges, *, data: str) -> list[PrecisionPlan]:
    """Presets with these ranges."""
    return [calibrate.with_ranges(preset(name), ranges, data=data) for name in names]


def ranges_of(network: Pi, inputs: Sequence[tuple[ModelInputs, Tensor]], *, config: EngineConfig = CONFIG) -> Any:
    """Activation ranges of every linear over these requests, from plain PyTorch in bfloat16."""
    model = twin(network)
    backend = eager.create(model, config)
    with calibrate.watch(model) as ranges:
        for one, noise in inputs:
            ranges.begin_prefill()
            cache = backend.prefill(one)
            ranges.begin_denoise()
            backend.denoise(cache, noise)
    return ranges


def policy_of(engine: Engine, size: Size, pipe: RobotPipeline, checkpoint: Checkpoint) -> Policy:
    """The engine as a robot meets it: boundary B2."""
    resolved = ResolvedEngine(
        backend=engine.backend.name, device=str(engine.model.device), precision=engine.precision,
        num_denoise_steps=CONFIG.steps, seed=0, checkpoint=str(checkpoint.path), policy_kind=checkpoint.model.kind,
        horizon=size.horizon, action_dim=pipe.io.embodiment.action_dim, flavour=checkpoint.model.flavour,
        version=__version__,
    )  # fmt: skip
    return Policy(
        checkpoint=checkpoint, io=pipe.io, pipeline=pipe, backend=engine.backend, model=engine.model, engine=resolved,
        plan=engine.plan,
    )  # fmt: skip


def model_inputs(pipe: RobotPipeline, request: dict[str, Any], *, device: torch.device) -> ModelInputs:
    """A request as the network sees it; a request without text has no prompt tokens."""
    if "prompt" in request:
        return collate([pipe.prepare(request)], kind="pi05", device=device)
    prepared = pipe.prepare({**request, "prompt": "x"})
    made = collate([prepared], kind="pi05", device=device)
    return ModelInputs(made.images, made.tokens[:, :0].contiguous())
