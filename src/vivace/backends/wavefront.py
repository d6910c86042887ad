"""The first denoise step runs behind the prefix, layer by layer: layer i of the expert needs no more than layer i's keys.

    main stream    | vision | prefix layer 0 | layer 1 | layer 2 | ...           | keys of the last
    second stream                            | step 1, layer 0 | layer 1 | ...       | rest of step 1 | step 2 | ...

Exact: the same kernels on the same data, in an order that the data allow. Prefix products leave processors idle in their
last wave, and the step's small kernels run there, so that most of one step of the loop disappears.

The kernels of the loop launch programmatically (`ops.launch`): each may begin before its predecessor has ended, and reads
old keys before it waits. That is only right if whatever it reads early was complete when its predecessor began. So a layer
begins with a marker, a plain kernel, which starts when both the keys and the previous layer are complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

URGENT = -1  # stream priority: the small kernels of the step go before the prefix' next wave


class Wavefront:
    """Events of one capture. `written` goes to `Pi.prefill`, `await_keys` to `run_flow`."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=URGENT)
        self._events = [torch.cuda.Event() for _ in range(layers)]
        self._marker = torch.zeros(1, device=device)

    def written(self, layer: int) -> None:
        """Keys and values of `layer` are complete at this point of the current stream."""
        self._events[layer].record()

    def await_keys(self, layer: int) -> None:
        """What the second stream does from here on comes after the keys of `layer`, and after all it did before."""
        self._stream.wait_event(self._events[layer])
        self._marker.zero_()

    @contextmanager
    def behind(self) -> Iterator[None]:
        """Work inside the block goes to the second stream, after layer 0's keys; the current one waits at the end."""
        main = torch.cuda.current_stream()
        with torch.cuda.stream(self._stream):
            self.await_keys(0)
            yield
        main.wait_stream(self._stream)
