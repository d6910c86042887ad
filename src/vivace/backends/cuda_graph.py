"""The whole policy as CUDA graphs: a replay launches everything at once, allocates nothing and asks the host nothing.

Per shape bucket (batch, views, prompt bucket, pixel type, masked or not) there are, each recorded when it is first needed:

    whole            pixels to actions in one graph, the first denoise step behind the prefix (`wavefront`): `infer`
    vision | behind  the same cut in two where the prompt comes in: `look`, then `infer`. Vision is one for all prompts, and
                     runs while the host still writes the prompt; what a served robot gets
    vision | prefix | flow  the stages apart: `prefill`, `denoise`; a flow for each horizon and kind of chunking

All share one memory pool and run one after the other. What depends on the request is data in fixed buffers: pixels, tokens,
masks, noise, the older chunk and its delay. What depends on nothing is made once: packed weights, the modulation of every
step. At most `MAX_BUCKETS` buckets are kept; the one unused for longest goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig
from ..errors import ConfigError, ShapeError
from ..model import flow
from ..model.pi import Pi, RopeTables
from ..ops.layers import Int8Linear, Linear
from ..ops.table import OpTable
from ..precision.coverage import Coverage
from ..types import ModelInputs, PrefixCache, PreviousChunk, Trace
from .buffers import FlowBuffers, bucket_of, flow_buffers, put
from .graph_slots import MAX_BUCKETS, Captured, Flowing, FlowKey, Recorder, Sight, Slot, Slots
from .loop import run_flow
from .on_device import on, on_own_device
from .spans import Spans, span
from .stage_events import StageEvents
from .wavefront import Wavefront

MAX_POSITIONS = 4096  # rotary tables: views, prompt and actions together; a longer request computes its angles


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
    from ..ops import toolchain

    return toolchain.compiler_missing()


def why_not_model(model: Pi) -> str | None:
    """None if every product of the network is in a format that the kernels take, and its heads have a size they take."""
    from ..ops import denoise, prefill_limits

    for stack in (model.vision, model.projector, model.prefix, model.expert):
        for layer in stack.modules():
            if isinstance(layer, Int8Linear) and stack is model.expert:
                return (
                    f"{layer.name} is INT8, which the kernels of the action expert do not take; --backend tensorrt does"
                )
            in_block = isinstance(layer, Linear) and layer is not model.vision.patch and ".modulation" not in layer.name
            if in_block and layer.dtype != torch.bfloat16:
                return (
                    f"{layer.name} is {layer.dtype}, the kernels take bfloat16, E4M3 and INT8{_remedy(str(layer.name))}"
                )
    rows = model.config.horizon if model.config.kind == "pi05" else None
    return denoise.why_not(
        head_dim=model.config.expert.head_dim, device=model.device, rows=rows
    ) or prefill_limits.why_not(device=str(model.device), model=model)


def _remedy(name: str) -> str:
    in_vision = name.startswith(("vision.", "projector"))
    return "; --precision bfloat16+vision rounds what LeRobot keeps in float32" if in_vision else ""


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
        # kept: graphs read the weights that it packed, also when the model gets other operations
        model.ops = self._ops = ops
        with torch.no_grad(), on(model.device):
            self._table = model.time_table(config.steps)
            self._rope = model.rope_tables(MAX_POSITIONS)
        self._slots = Slots(
            image_size=model.config.vision.image_size, state_width=model.config.action_width, device=model.device
        )
        self._record = Recorder(model.device)
        self._looked: Tensor | None = None  # the pictures whose vision graph was started last
        # `look` runs there, so that the prompt's copies need not wait for it
        self._aside = torch.cuda.Stream(model.device)
        self._readable: PrefixCache | None = None  # the last prefill's, as long as nothing ran that may use its memory
        # pi0 appends its state token to the keys of all layers when the last one is there: no layer is ready early
        behind = wavefront and model.config.kind == "pi05"
        self._wavefront = Wavefront(model.config.prefix.layers, model.device) if behind else None

    # --- Backend --------------------------------------------------------------------------------------------------

    @on_own_device
    def prefill(self, inputs: ModelInputs, *, trace: Trace | None = None, spans: Spans | None = None) -> PrefixCache:
        """See Backend.prefill. The cache lies in memory that the next prefill or `infer` may use: denoise it before."""
        slot = self._filled(inputs)
        vision = self._vision(slot.sight)
        if slot.prefix is None:
            slot.prefix = self._record(lambda: self._prefix(slot.buffers.inputs, vision.result))
        with span(spans, "vision"):
            views = vision.replay()
        with span(spans, "prefix"):
            embeds, cache = slot.prefix.replay()
        if trace is not None:
            trace.vision_tokens = views.clone()
            trace.prefix_embeds = embeds[:, : views.shape[1] + inputs.tokens.shape[1]].clone()
        self._readable = cache
        made: PrefixCache = cache
        return made

    @on_own_device
    def denoise(
        self, cache: PrefixCache, noise: Tensor, *, previous: PreviousChunk | None = None, trace: Trace | None = None,
        spans: Spans | None = None,
    ) -> Tensor:  # fmt: skip
        """See Backend.denoise. The actions are a copy: the next call does not change them."""
        self._check(cache.k[0].shape[0], noise, previous)
        if trace is not None:  # the same kernels on the same data, one by one: the same bits
            with span(spans, "denoise"):
                return run_flow(self.model, None, self._table, cache, noise, previous=previous, trace=trace)
        slot = self._owner(cache)
        key = _flow_key(noise, previous)
        if key not in slot.flows:
            buffers = _flow_buffers(noise, self.model.device)
            buffers.fill(noise, previous)
            seen = slot.prefix.result[1]  # type: ignore[union-attr]
            slot.flows[key] = buffers, self._record(lambda: self._flow(seen, buffers, key))
        buffers, captured = slot.flows[key]
        buffers.fill(noise, previous)
        with span(spans, "denoise"):
            actions: Tensor = captured.replay()
        return actions.clone()

    @on_own_device
    def look(self, images: Tensor) -> None:
        """See Backend.look: vision runs from here on, in a graph that all prompts share."""
        sight = self._slots.sight(images.shape[0], images.shape[1], images.dtype)
        vision = self._vision(sight)
        self._join()
        self._readable = None
        put(sight.images, images, "images")
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            vision.replay()
        self._looked = images

    def _join(self) -> None:
        """The current stream waits for the last `look`: graphs share their memory, and vision its pixels."""
        torch.cuda.current_stream().wait_stream(self._aside)

    @on_own_device
    def infer(
        self, inputs: ModelInputs, noise: Tensor, *, previous: PreviousChunk | None = None, spans: Spans | None = None
    ) -> Tensor:
        """See Backend.infer: from pixels to actions in one replay, or what is left of it after `look`."""
        self._check(inputs.images.shape[0], noise, previous)
        looked = self._looked is inputs.images
        slot = self._slot(inputs)
        seen, sight = slot.buffers.inputs, slot.sight
        if looked:
            slot.buffers.fill(inputs, pixels=False)  # beside vision, which reads none of it
            views = self._vision(sight).result
            graph = self._flowing(
                slot.behind, noise, previous, ("start", "prefix", "denoise"),
                lambda buffers, key, events: self._behind(seen, views, buffers, key, events),
            )  # fmt: skip
            self._join()
        else:
            self._join()
            slot.buffers.fill(inputs)
            graph = self._flowing(
                slot.whole, noise, previous, ("start", "vision", "prefix", "denoise"),
                lambda buffers, key, events: self._everything(seen, buffers, key, events),
            )  # fmt: skip
        actions: Tensor = graph.captured.replay()
        if looked:
            sight.events.report(spans)
        graph.events.report(spans)
        return actions.clone()

    def graph_of(self, inputs: ModelInputs, noise: Tensor) -> Callable[[], Any]:
        """The bare replay behind `infer`, for measurements at the boundary B0; captures it if need be."""
        self.infer(inputs, noise)
        return self._slot(inputs).whole[_flow_key(noise, None)].captured.replay

    def graph_results(self) -> list[Tensor]:
        """What the recorded graphs hand over, at the addresses where a replay must write it again: for proofs."""
        found: list[Tensor] = []
        for slot in self._slots:
            if slot.prefix is not None:
                embeds, cache = slot.prefix.result
                found += [embeds, *cache.k, *cache.v]
            found += [one.captured.result for one in (*slot.whole.values(), *slot.behind.values())]
            found += [captured.result for _, captured in slot.flows.values()]
            found += [slot.sight.vision.result] if slot.sight.vision is not None else []
        return found

    @property
    def graph_pool(self) -> tuple[int, int]:
        """The allocator's pool that holds everything between the inputs and the actions of all graphs."""
        return self._record.pool

    def warm_shapes(self, longest: int, *, views: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See Backend.warm_shapes: a prompt that does not fill each bucket, so that the graph with masks is captured.

        With fewer pictures, too, where there is room for all of their buckets; else the longest prompt's, which holds the
        others once no more buckets fit (`buffers.choose`). Buckets of one token mask nothing: none holds another,
        so requests that lack a camera may then wait for a capture.
        """
        fills = range(self._step, longest + self._step, self._step)
        if len(fills) >= MAX_BUCKETS:
            enough = -(-longest // (MAX_BUCKETS - 1))
            raise ConfigError(
                "too many graphs for the prompts that may come", got=f"{longest} tokens in buckets of {self._step}",
                wanted=f"fewer than {MAX_BUCKETS} buckets", do=f"set prompt_bucket to {enough} or more",
            )  # fmt: skip
        sizes = [min(max(fill - 1, 1), longest) for fill in fills] if self._step > 1 else list(fills)
        shapes = [(views[0], size) for size in sizes]
        if len(sizes) * len(views) <= MAX_BUCKETS:
            return tuple((count, size) for count in views for size in sizes)
        return tuple(shapes + [(count, sizes[-1]) for count in views[1 : 1 + MAX_BUCKETS - len(shapes)]])

    def describe(self) -> dict[str, Any]:
        """See Backend.describe."""
        return {
            "prompt_bucket": self._step,
            "buckets": [slot.bucket.label for slot in self._slots],
            "graphs_captured": self._record.count,
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

    def _see(self, sight: Sight) -> Tensor:
        sight.events.mark("start")
        views = self.model.embed_views(sight.images)
        sight.events.mark("vision")
        sight.events.join()
        return views

    def _everything(self, inputs: ModelInputs, buffers: FlowBuffers, key: FlowKey, events: StageEvents) -> Tensor:
        events.mark("start")
        views = self.model.embed_views(inputs.images)
        events.mark("vision")
        return self._after_vision(inputs, views, buffers, key, events)

    def _behind(
        self, inputs: ModelInputs, views: Tensor, buffers: FlowBuffers, key: FlowKey, events: StageEvents
    ) -> Tensor:
        events.mark("start")
        return self._after_vision(inputs, views, buffers, key, events)

    def _after_vision(
        self, inputs: ModelInputs, views: Tensor, buffers: FlowBuffers, key: FlowKey, events: StageEvents
    ) -> Tensor:
        """Prefix and all steps, the first of them beside the prefix where that can be."""
        wavefront = self._wavefront
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

    # --- slots --------------------------------------------------------------------------------------------------------

    def _check(self, batch: int, noise: Tensor, previous: PreviousChunk | None) -> None:
        """Raise ShapeError before anything is captured: for noise of another size, or a delay outside the chunk."""
        width = self.model.config.action_width
        if noise.dim() != 3 or (noise.shape[0], noise.shape[2]) != (batch, width):
            raise ShapeError("noise does not fit the request", got=list(noise.shape), wanted=f"[{batch}, H, {width}]")
        flow.committed_mask(previous, noise.shape[1], noise.device)

    def _slot(self, inputs: ModelInputs) -> Slot:
        """The slot of a request. Graphs share memory: from here on no older cache is readable, nor what `look` saw."""
        if self.model.config.kind == "pi0" and inputs.state is None:
            raise ShapeError("pi0 needs the normalised state", got="none", wanted="float32 [B, 32]")
        self._readable = self._looked = None
        return self._slots.slot(bucket_of(inputs, step=self._step))

    def _filled(self, inputs: ModelInputs) -> Slot:
        """The slot of a request, with the request in its buffers."""
        slot = self._slot(inputs)
        self._join()
        slot.buffers.fill(inputs)
        return slot

    def _vision(self, sight: Sight) -> Captured:
        if sight.vision is None:
            sight.vision = self._record(lambda: self._see(sight))
        return sight.vision

    def _flowing(
        self, graphs: dict[FlowKey, Flowing], noise: Tensor, previous: PreviousChunk | None, stages: tuple[str, ...],
        work: Callable[[FlowBuffers, FlowKey, StageEvents], Tensor],
    ) -> Flowing:  # fmt: skip
        """The graph of `work` for this noise and kind of chunking, with both in its buffers; recorded if need be."""
        key = _flow_key(noise, previous)
        if key in graphs:
            graphs[key].buffers.fill(noise, previous)
            return graphs[key]
        buffers, events = _flow_buffers(noise, self.model.device), StageEvents(self.model.device, stages)
        buffers.fill(noise, previous)
        graphs[key] = Flowing(buffers, self._record(lambda: work(buffers, key, events)), events)
        return graphs[key]

    def _owner(self, cache: PrefixCache) -> Slot:
        for slot in self._slots:
            if slot.prefix is not None and slot.prefix.result[1] is cache and self._readable is cache:
                return slot
        raise ShapeError(
            "this cache was not made by this backend, or another request came after it and overwrote it",
            got=f"{cache.k[0].shape[1]} keys", do="call prefill and denoise in turn, or use the eager backend",
        )  # fmt: skip


def _flow_buffers(noise: Tensor, device: torch.device) -> FlowBuffers:
    return flow_buffers(noise.shape[0], noise.shape[1], noise.shape[2], device)


def _flow_key(noise: Tensor, previous: PreviousChunk | None) -> FlowKey:
    return noise.shape[1], previous.mode if previous else "plain"


def create(model: Pi, config: EngineConfig) -> CudaGraphBackend:
    """Registry constructor: the prefill kernels for large calls, the denoise kernels for small ones."""
    from ..ops import denoise, prefill

    coverage = Coverage(kernel="torch")  # calls that no kernel of ours reports are torch's own
    with on(model.device):
        ops = denoise.denoise_ops(prefill.prefill_ops(model, record=coverage.record), record=coverage.record)
        backend = CudaGraphBackend(model, config, ops=coverage.wrap(ops), coverage=coverage.kernels)
    coverage.clear()  # making the time table is no part of an inference
    return backend
