"""openpi's JAX folders (Orbax: OCDBT key-value store, zarr arrays), read with tensorstore alone, without JAX.

`jax_rows.py` says what each stored array holds. LoRA factors beside a weight are merged into it in float32. The attention
output projection sums each of its factors over the heads by itself, so its product is NOT per head:
    q, k, v, MLP   dW = a @ b                       (per head where there are heads)
    attention out  dW[n] = a[n] @ sum over m of b[m]
Source: openpi src/openpi/models/lora.py (einsum strings), checked against openpi's own output in the golden folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import names
from .jax_rows import ATTENTION, BLOCK, DEAD, ROWS, Transform
from .norm_stats import openpi_facts
from .orbax import StoredArray, open_store
from .settings import Asked, choose_horizon
from .source import Checkpoint, TensorRef, listing

_BY_PATH = {row.path: row for row in ROWS}


def open_openpi_jax(folder: Path, asked: Asked) -> Checkpoint:
    """Open an openpi JAX checkpoint: `params/` and `assets/`, or a bare params folder. Needs `vivace[jax-checkpoints]`."""
    params = folder / "params" if (folder / "params").is_dir() else folder
    arrays = open_store(params)
    lora = _lora_factors(arrays)
    known = set(_BY_PATH) | set(DEAD) | {path for pair in lora.values() for path in pair}
    if unknown := sorted(set(arrays) - known):
        raise CheckpointError(
            f"{params} holds arrays that vivace does not know",
            got=f"{len(unknown)}:{listing(unknown)}\n",
            wanted="only arrays of pi0 or pi0.5; each is used, or known to be dead",
            do="pi0-FAST and other models cannot be run",
        )
    tensors = _tensors(arrays, lora)
    heads = {} if asked.num_heads or asked.head_dim else _heads(arrays)
    hints = names.Hints(
        vision_heads=asked.vision_heads or heads.get("vision_heads"),
        num_heads=asked.num_heads or heads.get("num_heads"),
        head_dim=asked.head_dim or heads.get("head_dim"),
    )
    model = names.infer_model(tensors, hints=hints, where=str(params))
    horizon, notes, guesses = choose_horizon(asked.horizon, None, "a JAX folder")
    if lora:
        notes.append(
            f"LoRA merged into {len(lora)} arrays in float32, with the scale alpha/rank = 1 of openpi's variants"
        )
    model = replace(
        model,
        horizon=horizon,
        time_grid="accumulated",
        time_embedding="float32",
        declared_dtype="bfloat16",
        flavour="openpi_jax",
    )
    robot = openpi_facts(folder, model.kind)
    dead = tuple(sorted(set(arrays) & set(DEAD)))
    return Checkpoint(folder, "openpi_jax", model, robot, tensors, dead, (*notes, *robot.notes), guesses=guesses)


def _tensors(arrays: Mapping[str, StoredArray], lora: Mapping[str, tuple[str, str]]) -> dict[str, TensorRef]:
    """Canonical tensors, those of one stored array next to each other."""
    out: dict[str, TensorRef] = {}
    for row in ROWS:
        if row.path not in arrays:
            continue
        array = arrays[row.path]
        stacked = "{i}" in row.holds[0][0]
        if len(array.shape) != row.rank + stacked or 0 in array.shape:
            raise CheckpointError(
                f"array {row.path} has another rank than it should",
                got=list(array.shape),
                wanted=f"{row.rank + stacked} axes",
            )
        factors = None
        if row.path in lora:
            factors = arrays[lora[row.path][0]], arrays[lora[row.path][1]]
            _check_lora(array, *factors)
        for i in range(array.shape[0]) if stacked else (None,):
            for template, transform in row.holds:
                name = template if i is None else template.format(i=i)
                out[name] = _ref(array, i, transform, factors)
    return out


def _ref(
    array: StoredArray, layer: int | None, transform: Transform, lora: tuple[StoredArray, StoredArray] | None
) -> TensorRef:
    start = array.shape if layer is None else array.shape[1:]
    shape = tuple(transform(torch.empty(start, device="meta")).shape)
    key = array.path if layer is None else f"{array.path}[{layer}]"

    def read(device: torch.device) -> Tensor:
        weight = array.read(layer)
        if lora:
            weight = merge_lora(
                weight, lora[0].read(layer), lora[1].read(layer), output="attn_vec_einsum" in array.path
            )
        return transform(weight).contiguous().to(device)

    return TensorRef(key, shape, torch.float32 if lora else array.dtype, read)


def merge_lora(weight: Tensor, a: Tensor, b: Tensor, *, output: bool) -> Tensor:
    """One layer's weight plus its low-rank update, float32.

    Args:
        weight: [..., in, out], leading axes are heads or the gate/up pair.
        a, b: [..., in, r] and [..., r, out].
        output: the attention output projection [heads, head_dim, D], whose b is summed over heads first.
    """
    a, b = a.float(), b.float()
    if output:
        b = b.sum(dim=0, keepdim=True)
    return weight.float() + a @ b


def _lora_factors(arrays: Mapping[str, StoredArray]) -> dict[str, tuple[str, str]]:
    """{path of a weight: paths of its two factors}; half a pair, or factors without a weight, is an error."""
    out = {}
    for path in arrays:
        for end, pair in (
            ("/lora_a", ("/w", "/lora_a", "/lora_b")),
            ("/lora_b", ("/w", "/lora_a", "/lora_b")),
            ("_lora_a", ("", "_lora_a", "_lora_b")),
            ("_lora_b", ("", "_lora_a", "_lora_b")),
        ):
            if path.endswith(end):
                base = path[: -len(end)]
                weight, a, b = (base + ending for ending in pair)
                if missing := [name for name in (weight, a, b) if name not in arrays]:
                    raise CheckpointError(f"LoRA of {weight} is incomplete", got=path, wanted=", ".join(missing))
                out[weight] = (a, b)
    return out


def _check_lora(weight: StoredArray, a: StoredArray, b: StoredArray) -> None:
    *lead, rows, columns = weight.shape
    rank = a.shape[-1] if a.shape else 0
    if a.shape != (*lead, rows, rank) or b.shape != (*lead, rank, columns) or rank == 0:
        raise CheckpointError(
            f"LoRA of {weight.path} cannot be merged: its shapes do not fit",
            got=f"a {list(a.shape)}, b {list(b.shape)}",
            wanted=f"a {[*lead, rows, 'r']}, b {[*lead, 'r', columns]}",
            do="merge it with the software that trained it and save plain weights",
        )


def _heads(arrays: Mapping[str, StoredArray]) -> dict[str, Any]:
    """Head counts stand in the stored shapes, unlike in PyTorch files."""
    query = arrays.get("PaliGemma/llm/layers/attn/q_einsum/w")
    vision = arrays.get(f"{BLOCK}/{ATTENTION}/query/kernel")
    out: dict[str, Any] = {}
    if query and len(query.shape) == 4:
        out.update(num_heads=query.shape[1], head_dim=query.shape[3])
    if vision and len(vision.shape) == 4:
        out["vision_heads"] = vision.shape[2]
    return out
