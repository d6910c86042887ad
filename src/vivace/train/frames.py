"""Demonstrations as tensors, and what one training example is.

Images stay uint8 on the training device. Labels exist for every tick, also for those without images: [0] the action that
was executed there, [1:] the chunk that the expert wanted from there on. With d committed actions the target is what was
executed for d ticks, then the expert's chunk of d ticks later: a plan by somebody who knew what the robot would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..robots import prompt
from ..robots.normalize import normalize_lerobot
from ..robots.tokenizer import Tokenizer
from ..types import NormStats, PromptFlavour
from .pieces import Piece

EPS = 1e-8
FLAVOUR: PromptFlavour = "lerobot_pi05"


def statistics(values: NDArray[np.floating]) -> NormStats:
    """Of rows [N, n], float64: everything that LeRobot's and openpi's files hold. Raises ConfigError without spread."""
    wide = values.astype(np.float64)
    q01, q10, q90, q99 = np.quantile(wide, [0.01, 0.1, 0.9, 0.99], axis=0)
    if not np.isfinite(wide).all() or (q99 <= q01).any():
        raise ConfigError(
            "the data cannot be normalised", got=f"q99 - q01 = {(q99 - q01).tolist()}", wanted="finite and positive",
            do="record more, or more varied, demonstrations",
        )  # fmt: skip
    return NormStats(
        mean=wide.mean(0), std=wide.std(0), min=wide.min(0), max=wide.max(0), q01=q01, q99=q99, q10=q10, q90=q90
    )


@dataclass(frozen=True)
class Rows:
    """Some examples. images uint8 [B, V, px, px, 3], tokens int64 [B, L], length int64 [B]."""

    images: Tensor
    tokens: Tensor
    length: Tensor


def ticks_left(piece: Piece) -> NDArray[np.int64]:
    """int64 [R]: how many ticks later a plan may begin that still continues each look.

    Up to the end of the episode, and not beyond the last look with the same prompt: what comes after a new instruction is
    no answer to the old one.
    """
    last = np.full(len(piece.ticks), len(piece.chunk) - 1)
    for i in range(len(last) - 2, -1, -1):
        same = piece.prompts[i] == piece.prompts[i + 1]
        last[i] = last[i + 1] if same else piece.ticks[i]
    left: NDArray[np.int64] = last - piece.ticks
    return left


class Frames:
    """All examples on one device; `add` appends, so corrections can join later.

    Args:
        pieces: the first demonstrations; statistics are theirs and stay.
        tokenizer, max_tokens: prompts are built and encoded here, as serving does.
        width: padded action width.
    """

    def __init__(
        self, pieces: Sequence[Piece], *, tokenizer: Tokenizer, width: int, max_tokens: int, device: torch.device
    ) -> None:
        if not pieces:
            raise ConfigError("no demonstrations", wanted="at least one that succeeded")
        self.state_stats = statistics(np.concatenate([piece.state for piece in pieces]))
        self.action_stats = statistics(np.concatenate([piece.chunk[:, 0] for piece in pieces]))
        self.tokenizer, self.width, self.max_tokens, self.device = tokenizer, width, max_tokens, device
        self.horizon = pieces[0].chunk.shape[1]
        self._labelled, self._seen = 0, 0
        self._parts: dict[str, list[Tensor]] = {}
        self.add(pieces)

    def __len__(self) -> int:
        return len(self.view)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Append examples. Rows keep their numbers."""
        for piece in pieces:
            left = ticks_left(piece)
            self._rows(piece.prompts, piece.state, left=left)
            self._table("label", piece.ticks + self._labelled)
            self._labels(piece.executed, piece.chunk)
            if piece.other_chunk is not None:  # the same pictures once more
                self._rows(piece.other_prompts, piece.state, left=np.zeros_like(left))
                self._table("label", np.arange(len(left)) + self._labelled)
                self._labels(piece.other_chunk[:, 0], piece.other_chunk)
            self._table("views", piece.views)
            self._seen += len(piece.views)
        joined = {name: torch.cat(parts) for name, parts in self._parts.items()}
        self._parts = {name: [value] for name, value in joined.items()}
        self.views, self.left, self.labels = joined["views"], joined["left"], joined["labels"]
        self.view = joined["view"]
        self.length, self.label = joined["length"], joined["label"]
        self.tokens = joined["tokens"][:, : int(self.length.max())]
        self.even = bool((self.length == self.length[0]).all())

    def _table(self, name: str, value: NDArray[Any] | Tensor) -> None:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(value)
        self._parts.setdefault(name, []).append(tensor.to(self.device))

    def _rows(self, prompts: Sequence[str], state: NDArray[np.float32], *, left: NDArray[np.int64]) -> None:
        """Everything of R examples but labels and pictures, which are those that come next."""
        normalized = normalize_lerobot(state, self.state_stats, mode="quantiles", eps=EPS)
        ids = torch.zeros(len(state), self.max_tokens, dtype=torch.int64)
        lengths = torch.zeros(len(state), dtype=torch.int64)
        for i, (task, values) in enumerate(zip(prompts, normalized, strict=True)):
            row = prompt.encode(prompt.segments(FLAVOUR, task, values), self.tokenizer, max_tokens=self.max_tokens)
            ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
            lengths[i] = len(row)
        self._table("tokens", ids)
        self._table("length", lengths)
        self._table("left", left)
        self._table("view", np.arange(len(state)) + self._seen)

    def _labels(self, executed: NDArray[np.float32], chunk: NDArray[np.float32]) -> None:
        """Normalised and padded, float32 [T, 1 + H, width]."""
        both = np.concatenate([executed[:, None], chunk], axis=1)
        scaled = normalize_lerobot(both, self.action_stats, mode="quantiles", eps=EPS)
        padding = ((0, 0), (0, 0), (0, self.width - both.shape[-1]))
        self._table("labels", np.pad(scaled, padding).astype(np.float32))
        self._labelled += len(chunk)

    def rows(self, row: Tensor) -> Rows:
        """Examples number `row`, int64 [B]."""
        return Rows(self.views[self.view[row]], self.tokens[row], self.length[row])

    def targets(self, row: Tensor, committed: Tensor) -> Tensor:
        """Normalised chunks.  row int64 [B], committed int64 [B, R], at most `left` of the row -> [B, R, H, width]."""
        k = torch.arange(self.horizon, device=self.device)
        begin, d = self.label[row][:, None, None], committed[..., None]
        done = k < d
        source = begin + torch.where(done, k, d)
        column = torch.where(done, 0, 1 + k - d)
        targets: Tensor = self.labels[source, column]
        return targets
