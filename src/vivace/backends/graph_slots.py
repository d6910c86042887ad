"""What the graph backend keeps: recorded graphs, and the buffers that they read, by shape. No word of the network here.

Sight   one kind of pictures (batch, views, pixel type): pixels, and the graph of vision over them
Slot    one bucket: a sight, the prompt's buffers, and the graphs of everything behind vision
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from .buffers import Bucket, FlowBuffers, InputBuffers, choose, input_buffers
from .stage_events import StageEvents

logger = logging.getLogger(__name__)

MAX_BUCKETS = 16
WARM_UP_CALLS = 2  # before a capture: compiles kernels, lets libraries make their handles and workspaces

FlowKey = tuple[int, str]  # horizon, "plain" | "trained" | "guided"
SightKey = tuple[int, int, torch.dtype]  # batch, views, type of the pixels


@dataclass
class Captured:
    """One graph and what it returns; the returned tensors keep their addresses for as long as this lives."""

    graph: torch.cuda.CUDAGraph
    result: Any

    def replay(self) -> Any:
        """Run it again on what the buffers hold now."""
        self.graph.replay()
        return self.result


class Recorder:
    """Records graphs that share one memory pool, so they must run one after the other.

    pool   the allocator's name of it       count  how many so far
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self.count = 0

    def __call__(self, work: Callable[[], Any]) -> Captured:
        """Warm `work` up, then record it. Raises Unsupported if there is no memory for it.

        Both on one stream, the same for all graphs: cuBLAS keeps 32 MB for every stream that it ever saw.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_CALLS):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self.pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        except torch.cuda.OutOfMemoryError as error:
            raise Unsupported(
                "no memory left for another graph",
                got=str(error).split("\n")[0],
                do="use fewer buckets or a smaller plan",
            ) from error
        self.count += 1
        return Captured(graph, result)


@dataclass
class Sight:
    """Pictures of one kind, and their graph; `vision.result` is what the graphs of all buckets of that kind read."""

    images: Tensor
    events: StageEvents
    vision: Captured | None = None


@dataclass(frozen=True)
class Flowing:
    """A graph that ends with actions, what it reads beside the inputs, and the events inside it."""

    buffers: FlowBuffers
    captured: Captured
    events: StageEvents


@dataclass
class Slot:
    """Everything that belongs to one bucket.

    prefix   tokens and `sight.vision` to (embeddings, cache)
    flows    the cache to actions
    whole    pixels to actions
    behind   the same from `sight.vision` on
    """

    bucket: Bucket
    sight: Sight
    buffers: InputBuffers
    prefix: Captured | None = None
    flows: dict[FlowKey, tuple[FlowBuffers, Captured]] = field(default_factory=dict)
    whole: dict[FlowKey, Flowing] = field(default_factory=dict)
    behind: dict[FlowKey, Flowing] = field(default_factory=dict)


class Slots:
    """Slots of at most MAX_BUCKETS buckets, of which the one unused for longest goes first.

    Sights without a slot are dropped once there are MAX_BUCKETS; one more than that can stand, for the next slot.
    """

    def __init__(self, *, image_size: int, state_width: int, device: torch.device) -> None:
        self._image_size, self._state_width, self._device = image_size, state_width, device
        self._slots: OrderedDict[Bucket, Slot] = OrderedDict()
        self._sights: dict[SightKey, Sight] = {}
        self._told: set[Bucket] = set()

    def __iter__(self) -> Iterator[Slot]:
        """The slots, the one unused for longest first."""
        return iter(list(self._slots.values()))

    def sight(self, batch: int, views: int, pixels: torch.dtype) -> Sight:
        """The sight of these pictures, made if need be."""
        key = batch, views, pixels
        if key not in self._sights:
            if len(self._sights) >= MAX_BUCKETS:
                self._forget_sights()
            size = self._image_size
            images = torch.zeros(batch, views, 3, size, size, dtype=pixels, device=self._device)
            self._sights[key] = Sight(images, StageEvents(self._device, ("start", "vision")))
        return self._sights[key]

    def slot(self, wanted: Bucket) -> Slot:
        """The slot to run a request of this bucket in, made if need be."""
        bucket = choose(wanted, self._slots, most=MAX_BUCKETS)
        if bucket not in self._slots:
            sight = self.sight(bucket.batch, bucket.views, bucket.pixels)
            while len(self._slots) >= MAX_BUCKETS:
                torch.cuda.synchronize()
                self._slots.popitem(last=False)
            buffers = input_buffers(bucket, images=sight.images, state_width=self._state_width)
            self._slots[bucket] = Slot(bucket, sight, buffers)
        if bucket.tokens > wanted.tokens and wanted not in self._told:
            self._told.add(wanted)
            logger.warning("%s has no graph of its own and runs as %s, a little slower", wanted.label, bucket.label)
        self._slots.move_to_end(bucket)
        return self._slots[bucket]

    def _forget_sights(self) -> None:
        torch.cuda.synchronize()
        used = {id(slot.sight) for slot in self._slots.values()}
        self._sights = {key: sight for key, sight in self._sights.items() if id(sight) in used}
