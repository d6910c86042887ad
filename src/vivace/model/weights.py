"""Checkpoint tensors into the model's packed parameters: every tensor used exactly once, nothing half loaded.

Parameters are created directly on the target device in the target dtype; each checkpoint tensor is read (memory-mapped),
moved, checked for NaN and infinity, and copied into its rows. So the host never holds more than one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import GemmaConfig, ModelConfig
from ..errors import CheckpointError
from ..ops.table import OpTable
from .pi import Pi


class TensorSource(Protocol):
    """One tensor of a checkpoint, not yet in memory (`checkpoints.source.TensorRef`)."""

    @property
    def key(self) -> str:
        """How the file calls it, which is what a person can look for."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored under vivace's name."""
        ...

    def read(self, device: torch.device) -> Tensor:
        """The tensor on `device`, in its stored dtype."""
        ...


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor goes: rows [start, start + count) of a parameter, or the whole of it."""

    parameter: str
    start: int
    count: int


def slots(config: ModelConfig) -> dict[str, Slot]:
    """{checkpoint tensor (vivace's names): its place}. Tensors that the forward never reads are in `dead`."""
    out: dict[str, Slot] = {}
    for name, rows in _plain(config):
        parameter = {"embedding.weight": "embedding", "vision.position.weight": "vision.position"}.get(name, name)
        out[name] = Slot(parameter, 0, rows)
    for i in range(config.vision.layers):
        out.update(_vision_block(f"vision.layers.{i}", config))
    for i in range(config.prefix.layers):
        out.update(_gemma_block(f"prefix.layers.{i}", config.prefix, norms=True, only_kv=i + 1 == config.prefix.layers))
    for i in range(config.expert.layers):
        out.update(_gemma_block(f"expert.layers.{i}", config.expert, norms=config.kind == "pi0", only_kv=False))
    if config.kind == "pi05":
        rows = 3 * config.expert.width
        norms = [f"expert.layers.{i}.norm{n}" for i in range(config.expert.layers) for n in (1, 2)] + ["expert.norm"]
        for index, norm in enumerate(norms):
            for part in ("weight", "bias"):
                out[f"{norm}.modulation.{part}"] = Slot(f"expert.modulation.{part}", index * rows, rows)
    return out


def dead(config: ModelConfig) -> set[str]:
    """Checkpoint tensors that exact pruning never reads: all of the last prefix layer but its norm, keys and values."""
    last = f"prefix.layers.{config.prefix.layers - 1}"
    return {f"{last}.{part}.weight" for part in ("attn.q", "attn.o", "norm2", "mlp.gate", "mlp.up", "mlp.down")}


def load(
    config: ModelConfig,
    tensors: Mapping[str, TensorSource],
    *,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
    ops: OpTable | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pi:
    """Build a model on `device` from checkpoint tensors.

    dtype_of  canonical tensor name -> dtype of its parameter (`precision.flavours.parameter_dtype`)
    progress  called with (tensors loaded, tensors in all)
    Raises    CheckpointError listing every tensor that is missing, unknown, of another shape, or not finite.
    """
    with torch.device("meta"):
        model = Pi(config, ops=ops)
    places = slots(config)
    _audit(places, tensors, config)
    parameters = _materialise(model, places, device, dtype_of)
    damaged = []
    # in the checkpoint's own order: neighbours may share a stored array that is decoded once
    wanted = [name for name in tensors if name in places]
    for count, name in enumerate(wanted, start=1):
        slot, value = places[name], tensors[name].read(device)
        if not bool(torch.isfinite(value).all()):
            damaged.append(f"{name} (in the file: {tensors[name].key})")
            continue
        target = parameters[slot.parameter]
        target[slot.start : slot.start + slot.count].copy_(value.reshape(slot.count, *target.shape[1:]))
        del value
        if progress is not None:
            progress(count, len(wanted))
    if damaged:
        raise CheckpointError("tensors with NaN or infinity", got=_some(damaged), do="restore the file from its source")
    return model.requires_grad_(False).eval()


def _plain(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Tensors that fill a whole parameter, with their number of rows."""
    D, E, W = config.prefix.width, config.expert.width, config.vision.width
    yield "embedding.weight", config.vocab_size
    yield "vision.position.weight", config.vision.tokens
    heads = {"vision.patch": W, "vision.norm": W, "projector": D, "action_in": E, "action_out": config.action_width}
    if config.kind == "pi05":
        heads |= {"time_in": E, "time_out": E}
    else:
        heads |= {"state": E, "action_time_in": E, "action_time_out": E}
        yield "expert.norm.weight", E
    for name, rows in heads.items():
        yield f"{name}.weight", rows
        yield f"{name}.bias", rows


def _vision_block(name: str, config: ModelConfig) -> Iterator[tuple[str, Slot]]:
    D, F = config.vision.width, config.vision.mlp_width
    for part in ("weight", "bias"):
        for index, letter in enumerate("qkv"):
            yield f"{name}.attn.{letter}.{part}", Slot(f"{name}.qkv.{part}", index * D, D)
        yield f"{name}.attn.o.{part}", Slot(f"{name}.o.{part}", 0, D)
        yield f"{name}.mlp.fc1.{part}", Slot(f"{name}.fc1.{part}", 0, F)
        yield f"{name}.mlp.fc2.{part}", Slot(f"{name}.fc2.{part}", 0, D)
        yield f"{name}.norm1.{part}", Slot(f"{name}.norm1.{part}", 0, D)
        yield f"{name}.norm2.{part}", Slot(f"{name}.norm2.{part}", 0, D)


def _gemma_block(name: str, config: GemmaConfig, *, norms: bool, only_kv: bool) -> Iterator[tuple[str, Slot]]:
    D, F = config.width, config.mlp_width
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if norms:
        yield f"{name}.norm1.weight", Slot(f"{name}.norm1.weight", 0, D)
    first = 0 if only_kv else q_rows
    yield f"{name}.attn.k.weight", Slot(f"{name}.qkv.weight", first, kv_rows)
    yield f"{name}.attn.v.weight", Slot(f"{name}.qkv.weight", first + kv_rows, kv_rows)
    if only_kv:
        return
    yield f"{name}.attn.q.weight", Slot(f"{name}.qkv.weight", 0, q_rows)
    yield f"{name}.attn.o.weight", Slot(f"{name}.o.weight", 0, D)
    if norms:
        yield f"{name}.norm2.weight", Slot(f"{name}.norm2.weight", 0, D)
    yield f"{name}.mlp.gate.weight", Slot(f"{name}.gate_up.weight", 0, F)
    yield f"{name}.mlp.up.weight", Slot(f"{name}.gate_up.weight", F, F)
    yield f"{name}.mlp.down.weight", Slot(f"{name}.down.weight", 0, D)


def _audit(places: Mapping[str, Slot], tensors: Mapping[str, TensorSource], config: ModelConfig) -> None:
    with torch.device("meta"):
        expected = dict(Pi(config).named_parameters())
    missing = sorted(set(places) - set(tensors))
    unknown = sorted(set(tensors) - set(places) - dead(config))
    wrong = []
    for name, slot in places.items():
        if name in tensors:
            wanted = (slot.count, *expected[slot.parameter].shape[1:])
            got = tuple(tensors[name].shape)
            if math.prod(got) != math.prod(wanted) or got[0] != wanted[0]:
                wrong.append(f"{name} {got} (wanted {wanted})")
    problems = [
        f"{title}: {_some(names)}"
        for title, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model", got="; ".join(problems))


def _materialise(
    model: nn.Module, places: Mapping[str, Slot], device: torch.device, dtype_of: Callable[[str], torch.dtype]
) -> dict[str, Tensor]:
    dtypes = {slot.parameter: dtype_of(name) for name, slot in places.items()}
    parameters: dict[str, Tensor] = {}
    for path, meta in list(model.named_parameters()):
        owner = model.get_submodule(path.rpartition(".")[0])
        parameter = nn.Parameter(torch.empty(meta.shape, dtype=dtypes[path], device=device), requires_grad=False)
        setattr(owner, path.rpartition(".")[2], parameter)
        parameters[path] = parameter.data
    return parameters


def _some(names: list[str], limit: int = 12) -> str:
    more = f" ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
