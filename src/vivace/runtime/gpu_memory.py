"""Out of memory, said in vivace's words: which step, how much was free, and what would need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import Unsupported

DO = (
    "end other programs on this GPU (nvidia-smi lists them), choose --precision bfloat16 or an FP8 plan, "
    "fewer prompt buckets, or a GPU with more memory"
)


@contextmanager
def explained(step: str, *, device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory error inside the block into Unsupported.  step: "loading the weights".

    What the step had already taken is let go with the exception; nothing is retried on a slower path.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = next((part for part in str(error).split(". ") if part.startswith("Tried to allocate")), "")
        raise Unsupported(
            f"the memory of {device} does not suffice for {step}", got=f"{_free(device)}{asked}",
            wanted="room for the weights of the plan, keys and values, and the graphs of every bucket", do=DO,
        ) from error  # fmt: skip


def _free(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB; "
