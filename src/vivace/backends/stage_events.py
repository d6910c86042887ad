"""When the stages inside one CUDA graph ended, without standing in the way of what comes next.

A graph is one launch, so the host cannot time its parts. Events recorded inside it can: each lies on a branch of its own,
which waits for the stage and which nothing waits for but the end of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from .spans import Spans


class StageEvents:
    """Marks of one captured graph; a replay records them anew. Read them before the next replay.

    names  of the marks in their order: the first begins, each other one ends a stage of that name
    """

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self._branch = torch.cuda.Stream(device)
        self._marks = {name: torch.cuda.Event(enable_timing=True, external=True) for name in names}

    def mark(self, name: str) -> None:
        """`name` ends where the current stream stands."""
        self._branch.wait_stream(torch.cuda.current_stream())
        self._marks[name].record(self._branch)

    def join(self) -> None:
        """The current stream waits for the marks; a capture must end with no branch left open."""
        torch.cuda.current_stream().wait_stream(self._branch)

    def report(self, spans: Spans | None) -> None:
        """Hand the stages of the last replay to `spans`; each begins where the one before it ends, so they add up."""
        if spans is not None:
            for (_, before), (name, mark) in pairwise(self._marks.items()):
                spans.place(name, before, mark)
