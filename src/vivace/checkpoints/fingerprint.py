"""A short hash of a checkpoint's contents, so that a precision plan knows which weights its ranges belong to.

    seen = Fingerprint()
    model = weights.load(config, seen.watch(checkpoint.tensors), ...)     # hashed while they are loaded: no second read
    seen.digest()                                                         # "5f0c..." (16 hex digits)

Hashed of every tensor that is read: its canonical name, shape, dtype, and the bytes of 64 values spread evenly over it.

Detects      other weights: another training run, a further fine-tuning step, a merged adapter, another dtype, a tensor more
             or less. Each of them changes nearly every value of the tensors that it touches.
Does not     detect an edit of a few values that misses the samples, nor damage on purpose: this is no signature. Not
             covered are normalisation statistics, tokenizer and settings, nor tensors that inference never reads.
The same weights have the same hash in every file format, if the format stores the same dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .source import TensorRef

SAMPLES = 64


class Fingerprint:
    """Collects one hash per tensor while the tensors are read, in any order and any number of times."""

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def watch(self, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
        """The same tensors in the same order; reading one also hashes it."""
        return {name: self._watched(name, ref) for name, ref in tensors.items()}

    def digest(self) -> str:
        """16 hex digits over everything read so far; independent of the order."""
        whole = hashlib.sha256()
        for name in sorted(self._parts):
            whole.update(f"{name} {self._parts[name]}\n".encode())
        return whole.hexdigest()[:16]

    def _watched(self, name: str, ref: TensorRef) -> TensorRef:
        def read(device: torch.device) -> Tensor:
            value = ref.read(device)
            self._parts[name] = part(value)
            return value

        return replace(ref, read=read)


def part(value: Tensor) -> str:
    """Hash of one tensor: shape, dtype and sampled bytes. Gathers on the tensor's device; a strided view is not copied."""
    whole = hashlib.sha256(f"{tuple(value.shape)} {value.dtype}".encode())
    count = value.numel()
    if count:
        at = (torch.arange(SAMPLES, device=value.device, dtype=torch.int64) * (count - 1)) // (SAMPLES - 1)
        sampled = value.detach()[torch.unravel_index(at, value.shape)] if value.dim() else value.detach().reshape(1)
        whole.update(sampled.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def fingerprint(tensors: Mapping[str, TensorRef]) -> str:
    """Read all of `tensors` for nothing but their hash."""
    seen = Fingerprint()
    for ref in seen.watch(tensors).values():
        ref.read(torch.device("cpu"))
    return seen.digest()
