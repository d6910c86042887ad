"""What the language side of the policy reads: the task, and for pi0.5 the robot's state written out as integers.

Five flavours; the checkpoint's origin decides. A wrong one costs success without any error, so each is fixed by fixtures:

    openpi_pi0      [BOS] clean(task), then "\\n" encoded on its own
    openpi_pi05     [BOS] "Task: clean(task), State: 12 255 ...;\\nAction: "    (state_in_prompt False: as openpi_pi0)
    lerobot_pi0     [BOS] task, untouched, plus "\\n" if it does not end with one
    lerobot_pi05    as openpi_pi05, with bins computed in float32
    lerobot04_pi05  as lerobot_pi05, the state padded with zeros to 32 numbers first

Source: openpi models/tokenizer.py; lerobot policies/pi0, pi05 processors (0.4.4, 0.6.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ObservationError
from ..types import PromptFlavour
from .tokenizer import Tokenizer

LEFT_EDGES = np.linspace(-1.0, 1.0, 257)[:-1]
"""Left edges of 256 bins over [-1, 1]; every one is exact in float32."""
FLAVOURS: tuple[PromptFlavour, ...] = ("openpi_pi0", "openpi_pi05", "lerobot_pi0", "lerobot_pi05", "lerobot04_pi05")
LEROBOT04_STATE_WIDTH = 32


@dataclass(frozen=True)
class Segment:
    """One call of the tokenizer; the ids of all segments are concatenated."""

    text: str
    add_bos: bool


def clean(task: str) -> str:
    """Strip, then underscores and newlines become spaces; case is kept."""
    return task.strip().replace("_", " ").replace("\n", " ")


def discretise(state: NDArray[Any]) -> list[int]:
    """Bin of each normalised value: -1 below -1.0, 0..255 inside, 255 above; compared in the dtype of `state`.

    openpi passes float64 and LeRobot float32: just below an edge the two differ by one bin.
    """
    return [int(bin_) - 1 for bin_ in np.searchsorted(LEFT_EDGES, state, side="right")]


def segments(
    flavour: PromptFlavour, task: str, state: NDArray[Any], *, state_in_prompt: bool = True, pad_state_to: int = 0
) -> tuple[Segment, ...]:
    """The texts handed to the tokenizer.

    state            normalised, unpadded, float64; LeRobot's flavours round it to float32 here
    state_in_prompt  openpi_pi05 only: False gives the pi0 form (openpi's `discrete_state_input=False`)
    pad_state_to     zeros up to this width before discretising
    """
    if flavour == "openpi_pi0" or (flavour == "openpi_pi05" and not state_in_prompt):
        return Segment(clean(task), True), Segment("\n", False)
    if flavour == "lerobot_pi0":
        return (Segment(task if task.endswith("\n") else task + "\n", True),)
    if flavour not in FLAVOURS:
        raise ConfigError("unknown prompt flavour", got=repr(flavour), wanted=f"one of {list(FLAVOURS)}")
    values = state if flavour == "openpi_pi05" else state.astype(np.float32)
    if len(values) < pad_state_to:
        values = np.concatenate([values, np.zeros(pad_state_to - len(values), values.dtype)])
    numbers = " ".join(str(bin_) for bin_ in discretise(values))
    return (Segment(f"Task: {clean(task)}, State: {numbers};\nAction: ", True),)


def encode(parts: tuple[Segment, ...], tokenizer: Tokenizer, *, max_tokens: int) -> NDArray[np.int32]:
    """Token ids int32 [L] of a prompt, BOS first, no padding.

    Raises: ObservationError if L > max_tokens. The originals cut the end off, and with it "Action:".
    """
    ids = [token for part in parts for token in tokenizer.encode(part.text, add_bos=part.add_bos)]
    check_length(len(ids), max_tokens=max_tokens)
    return np.asarray(ids, dtype=np.int32)


def check_length(tokens: int, *, max_tokens: int) -> None:
    """Raise ObservationError for a prompt that the policy never saw in training: too long, or empty."""
    if tokens > max_tokens:
        raise ObservationError(
            "the prompt is too long",
            got=f"{tokens} tokens",
            wanted=f"at most {max_tokens}",
            do="shorten the task text, or allow more with --max-prompt-tokens",
        )
    if tokens == 0:
        raise ObservationError("the prompt has no tokens", got=0, wanted=f"1 to {max_tokens}")


def check_ids(tokens: NDArray[np.int32], *, vocab_size: int, source: str) -> None:
    """Raise ObservationError for an id without a row in the embedding; a GPU that reads past it serves nobody after.

    vocab_size  rows of the embedding; 0 = not known
    source      where the ids came from, begins the message
    """
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or (vocab_size and high >= vocab_size):
        raise ObservationError(
            f"{source} gave token ids that the model does not have",
            got=high if low >= 0 else low,
            wanted=f"0 .. {vocab_size - 1}" if vocab_size else ">= 0",
            do="use the tokenizer that the checkpoint was trained with",
        )
