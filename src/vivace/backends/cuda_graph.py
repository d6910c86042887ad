"""The whole policy as CUDA graphs: a replay launches everything at once, allocates nothing and asks the host nothing.

Per shape bucket (batch, views, prompt bucket, pixel type, masked or not) there are graphs of the two stages that robots
time apart, vision and prefix; per bucket, horizon and kind of chunking one of all denoise steps; and one of everything,
`infer`, from pixels to actions, in which the first denoise step runs behind the prefix (`wavefront`). All share one
memory pool and run one after the other.

What depends on the request is data in fixed buffers: pixels, tokens, masks, noise, the older chunk and its delay. What
depends on nothing is made once: packed weights, the modulation of every step. Graphs are captured when a bucket is first
seen (or by `warm_up`), at most `MAX_BUCKETS` of them; the one unused for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig
from ..errors import ConfigError, ShapeError, Unsupported
from ..model import flow
from ..model.pi import Pi, RopeTables
from ..ops.layers import Int8Linear, Linear
from ..ops.table import OpTable
from ..precision.coverage import Coverage
from ..types import ModelInputs, PrefixCache, PreviousChunk, Trace
from .buffers import Bucket, FlowBuffers, InputBuffers, bucket_of, choose, flow_buffers, input_buffers
from .loop import run_flow
from .spans import Spans, span
from .stage_events import StageEvents
from .wavefront import Wavefront

MAX_BUCKETS = 16
MAX_POSITIONS = 4096  # rotary tables: views, prompt and actions together; a longer request computes its angles
WARM_UP_CALLS = 2  # before a capture: compiles kernels, lets libraries make their handles and workspaces

FlowKey = tuple[int, str]  # horizon, "plain" | "trained" | "guided"


def why_not(*, device: str) -> str | None:
    """None if it can run on `device`."""
    if not device.startswith("cuda"):
        return f"CUDA graphs need an NVIDIA GPU, not {device}"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


def why_not_model(model: Pi) -> str | None:
    """None if every product of the network is in a format that the kernels take, and its heads have a size they take."""
    from ..ops import denoise, prefill_limits

    for stack in (model.vision, model.projector, model.prefix, model.expert):
        for layer in stack.modules():
            if isinstance(layer, Int8Linear):
                return f"{layer.name} is INT8, the kernels take bfloat16 and E4M3; INT8 runs on --backend tensorrt"
            in_block = isinstance(layer, Linear) and layer is not model.vision.patch and ".modulation" not in layer.name
            if in_block and layer.dtype != torch.bfloat16:
                return f"{layer.name} is {layer.dtype}, the kernels take bfloat16 and E4M3{_remedy(str(layer.name))}"
    rows = model.config.horizon if model.config.kind == "pi05" else None
    return denoise.why_not(
        head_dim=model.config.expert.head_dim, device=model.device, rows=rows
    ) or prefill_limits.why_not(device=str(model.device), model=model)


def _remedy(name: str) -> str:
    in_vision = name.startswith(("vision.", "projector"))
    return "; --precision bfloat16+vision rounds what LeRobot keeps in float32" if in_vision else ""


@dataclass
class Captured:
    """One graph and what it returns; the returned tensors keep their addresses for as long as this lives."""

    graph: torch.cuda.CUDAGraph
    result: Any

    def replay(self) -> Any:
        """Run it again on what the buffers hold now."""
        self.graph.replay()
        return self.result


@dataclass(frozen=True)
class Whole:
    """The graph of everything, what it reads beside the inputs, and the events inside it."""

    buffers: FlowBuffers
    captured: Captured
    events: StageEvents


@dataclass
class Slot:
    """Everything that belongs to one bucket."""

    bucket: Bucket
    buffers: InputBuffers
    vision: Captured | None = None
    prefix: Captured | None = None
    flows: dict[FlowKey, tuple[FlowBuffers, Captured]] = field(default_factory=dict)
    whole: dict[FlowKey, Whole] = field(default_factory=dict)


class CudaGraphBackend:
    """See the module's docstring. `ops` executes the model; `model.ops` is replaced by it.

    coverage  filled by `ops` while graphs are captured: {"layer operation": kernel}, what really ran
    """

    name = "cuda_graph"

    def __init__(
        self, model: Pi, config: EngineConfig, *, ops: OpTable, coverage: dict[str, str] | None = None,
        wavefront: bool = True,
    ) -> None:  # fmt: skip
        self.model, self._step, self._coverage = model, config.prompt_bucket, {} if coverage is None else coverage
        model.ops = ops
        with torch.no_grad():
            self._table = model.time_table(config.steps)
            self._rope = model.rope_tables(MAX_POSITIONS)
        self._slots: OrderedDict[Bucket, Slot] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(model.device)
        self._captures = 0
        self._readable: PrefixCache | None = None  # the last prefill's, as long as nothing ran that may use its memory
        # pi0 appends its state token to the keys of all layers when the last one is there: no layer is ready early
        behind = wavefront and model.config.kind == "pi05"
        self._wavefront = Wavefront(model.config.prefix.layers, model.device) if behind else None

    # --- Backend --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, inputs: ModelInputs, *, trace: Trace | None = None, spans: Spans | None = None) -> PrefixCache:
        """See Backend.prefill. The cache lies in memory that the next prefill or `infer` may use: denoise it before."""
        slot = self._filled(inputs)
        model, seen = self.model, slot.buffers.inputs
        if slot.vision is None or slot.prefix is None:
            slot.vision = self._capture(lambda: model.embed_views(seen.images))
            slot.prefix = self._capture(lambda: self._prefix(seen, slot.vision.result))  # type: ignore[union-attr]
        with span(spans, "vision"):
            views = slot.vision.replay()
        with span(spans, "prefix"):
            embeds, cache = slot.prefix.replay()
        if trace is not None:
            trace.vision_tokens, trace.prefix_embeds = (
                views.clone(),
                embeds[:, : views.shape[1] + inputs.tokens.shape[1]],
            )
        self._readable = cache
        made: PrefixCache = cache
        return made

    @torch.no_grad()
    def denoise(
        self, cache: PrefixCache, noise: Tensor, *, previous: PreviousChunk | None = None, trace: Trace | None = None,
        spans: Spans | None = None,
    ) -> Tensor:  # fmt: skip
        """See Backend.denoise. The actions are a copy: the next call does not change them."""
        flow.committed_mask(previous, noise.shape[1], noise.device)  # refuses a delay outside the chunk
        if trace is not None:  # the same kernels on the same data, one by one: the same bits
            with span(spans, "denoise"):
                return run_flow(self.model, None, self._table, cache, noise, previous=previous, trace=trace)
        slot = self._owner(cache)
        key = _flow_key(noise, previous)
        if key not in slot.flows:
            buffers = self._flow_buffers(noise)
            buffers.fill(noise, previous)
            seen = slot.prefix.result[1]  # type: ignore[union-attr]
            slot.flows[key] = buffers, self._capture(lambda: self._flow(seen, buffers, key))
        buffers, captured = slot.flows[key]
        buffers.fill(noise, previous)
        with span(spans, "denoise"):
            actions: Tensor = captured.replay()
        return actions.clone()

    @torch.no_grad()
    def infer(
        self, inputs: ModelInputs, noise: Tensor, *, previous: PreviousChunk | None = None, spans: Spans | None = None
    ) -> Tensor:
        """See Backend.infer: from pixels to actions in one replay."""
        flow.committed_mask(previous, noise.shape[1], noise.device)  # refuses a delay outside the chunk
        slot, key = self._filled(inputs), _flow_key(noise, previous)
        if key not in slot.whole:
            buffers, events = self._flow_buffers(noise), StageEvents(self.model.device)
            buffers.fill(noise, previous)
            captured = self._capture(lambda: self._everything(slot.buffers.inputs, buffers, key, events))
            slot.whole[key] = Whole(buffers, captured, events)
        whole = slot.whole[key]
        whole.buffers.fill(noise, previous)
        actions: Tensor = whole.captured.replay()
        whole.events.report(spans)
        return actions.clone()

    def graph_of(self, inputs: ModelInputs, noise: Tensor) -> Callable[[], Any]:
        """The bare replay behind `infer`, for measurements at the boundary B0; captures it if need be."""
        self.infer(inputs, noise)
        return self._slot(bucket_of(inputs, step=self._step)).whole[_flow_key(noise, None)].captured.replay

    def warm_up(self, requests: list[tuple[ModelInputs, Tensor]]) -> None:
        """Capture the graphs of these requests' buckets before a robot waits for them."""
        for inputs, noise in requests:
            self.infer(inputs, noise)

    def prompt_lengths(self, longest: int) -> tuple[int, ...]:
        """See Backend.prompt_lengths: one that does not fill each bucket, so that the graph with masks is captured."""
        lengths = range(self._step - 1, longest + self._step - 1, self._step)
        if len(lengths) >= MAX_BUCKETS:
            enough = -(-longest // (MAX_BUCKETS - 1))
            raise ConfigError(
                "too many graphs for the prompts that may come", got=f"{longest} tokens in buckets of {self._step}",
                wanted=f"fewer than {MAX_BUCKETS} buckets", do=f"set prompt_bucket to {enough} or more",
            )  # fmt: skip
        return tuple(min(length, longest) for length in lengths)

    def describe(self) -> dict[str, Any]:
        """See Backend.describe."""
        return {
            "prompt_bucket": self._step,
            "buckets": [bucket.label for bucket in self._slots],
            "graphs_captured": self._captures,
            "max_buckets": MAX_BUCKETS,
            "kernels": dict(self._coverage),
        }

    # --- what the graphs contain ----------------------------------------------------------------------------------

    def _prefix(
        self, inputs: ModelInputs, views: Tensor, written: Callable[[int], None] | None = None
    ) -> tuple[Tensor, PrefixCache]:
        embeds, mask = self.model.embed_prefix(inputs, views)
        tables = self._tables(embeds.shape[1])
        return embeds, self.model.prefill(embeds, mask, state=inputs.state, tables=tables, written=written)

    def _flow(
        self, cache: PrefixCache, buffers: FlowBuffers, key: FlowKey,
        await_keys: Callable[[int], None] | None = None,
    ) -> Tensor:  # fmt: skip
        horizon, mode = key
        previous = committed = None
        if mode == "trained":
            previous = PreviousChunk(buffers.older, 0, "trained")
            committed = torch.arange(horizon, device=buffers.delay.device) < buffers.delay
        elif mode == "guided":
            previous = PreviousChunk(buffers.older, 0, "guided", buffers.weights, buffers.max_guidance)
        return run_flow(
            self.model, None, self._table, cache, buffers.noise, previous=previous, committed=committed, trace=None,
            tables=self._tables(cache.k[0].shape[1] + horizon), await_keys=await_keys,
        )  # fmt: skip

    def _tables(self, positions: int) -> RopeTables | None:
        return self._rope if positions + 1 <= MAX_POSITIONS else None

    def _everything(self, inputs: ModelInputs, buffers: FlowBuffers, key: FlowKey, events: StageEvents) -> Tensor:
        wavefront = self._wavefront
        events.mark("start")
        views = self.model.embed_views(inputs.images)
        events.mark("vision")
        cache = self._prefix(inputs, views, None if wavefront is None else wavefront.written)[1]
        events.mark("prefix")
        if wavefront is None:
            actions = self._flow(cache, buffers, key)
        else:
            with wavefront.behind():
                actions = self._flow(cache, buffers, key, wavefront.await_keys)
        events.mark("denoise")
        events.join()
        return actions

    # --- slots and captures -----------------------------------------------------------------------------------------

    def _slot(self, bucket: Bucket) -> Slot:
        bucket = choose(bucket, self._slots)
        if bucket in self._slots:
            self._slots.move_to_end(bucket)
            return self._slots[bucket]
        if len(self._slots) >= MAX_BUCKETS:
            torch.cuda.synchronize()
            self._slots.popitem(last=False)
        config = self.model.config
        buffers = input_buffers(
            bucket, image_size=config.vision.image_size, state_width=config.action_width, device=self.model.device
        )
        self._slots[bucket] = Slot(bucket, buffers)
        return self._slots[bucket]

    def _filled(self, inputs: ModelInputs) -> Slot:
        """The slot of a request, with the request in its buffers. Graphs share memory: no older cache is readable now."""
        if self.model.config.kind == "pi0" and inputs.state is None:
            raise ShapeError("pi0 needs the normalised state", got="none", wanted="float32 [B, 32]")
        self._readable = None
        slot = self._slot(bucket_of(inputs, step=self._step))
        slot.buffers.fill(inputs)
        return slot

    def _owner(self, cache: PrefixCache) -> Slot:
        for slot in self._slots.values():
            if slot.prefix is not None and slot.prefix.result[1] is cache and self._readable is cache:
                return slot
        raise ShapeError(
            "this cache was not made by this backend, or another request came after it and overwrote it",
            got=f"{cache.k[0].shape[1]} keys", do="call prefill and denoise in turn, or use the eager backend",
        )  # fmt: skip

    def _flow_buffers(self, noise: Tensor) -> FlowBuffers:
        return flow_buffers(noise.shape[0], noise.shape[1], noise.shape[2], self.model.device)

    def _capture(self, work: Callable[[], Any]) -> Captured:
        """Warm `work` up, then record it. Raises Unsupported if it cannot be recorded.

        Both on one stream, the same for all graphs: cuBLAS keeps 32 MB for every stream that it ever saw.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_CALLS):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        except torch.cuda.OutOfMemoryError as error:
            raise Unsupported(
                "no memory left for another graph",
                got=str(error).split("\n")[0],
                do="use fewer buckets or a smaller plan",
            ) from error
        self._captures += 1
        return Captured(graph, result)


def _flow_key(noise: Tensor, previous: PreviousChunk | None) -> FlowKey:
    return noise.shape[1], previous.mode if previous else "plain"


def create(model: Pi, config: EngineConfig) -> CudaGraphBackend:
    """Registry constructor: the prefill kernels for large calls, the denoise kernels for small ones."""
    from ..ops import denoise, prefill

    coverage = Coverage(kernel="torch")  # calls that no kernel of ours reports are torch's own
    ops = denoise.denoise_ops(prefill.prefill_ops(model, record=coverage.record), record=coverage.record)
    backend = CudaGraphBackend(model, config, ops=coverage.wrap(ops), coverage=coverage.kernels)
    coverage.clear()  # making the time table is no part of an inference
    return backend
