"""openpi's JAX folders (Orbax: OCDBT key-value store, zarr arrays), read with tensorstore alone, without JAX.

Layers are stacked on axis 0 of one array per kind of weight; `ROWS` says for each stored array which of our tensors it
holds and how a slice of it becomes [out, in]. LoRA factors beside a weight are merged into it in float32. With `x` the
input, the attention output projection sums each factor over the heads by itself, so its product is NOT per head:
    q, k, v, MLP   dW = a @ b                       (per head where there are heads)
    attention out  dW[n] = a[n] @ sum over m of b[m]
Source: openpi src/openpi/models/lora.py (einsum strings), checked against openpi's own output in the golden folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import names
from .norm_stats import openpi_facts
from .orbax import StoredArray, open_store
from .settings import Asked, choose_horizon
from .source import Checkpoint, TensorRef, listing

Transform = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _linear(x: Tensor) -> Tensor:  # [in, out]
    return x.T


def _conv(x: Tensor) -> Tensor:  # [p, p, 3, out]
    return x.permute(3, 2, 0, 1)


def _first(x: Tensor) -> Tensor:  # [1, T, W]
    return x[0]


def _flat(x: Tensor) -> Tensor:  # [heads, head_dim]
    return x.reshape(-1)


def _into_heads(x: Tensor) -> Tensor:  # [in, heads, head_dim]
    return x.reshape(x.shape[0], -1).T


def _out_of_heads(x: Tensor) -> Tensor:  # [heads, head_dim, out]
    return x.reshape(-1, x.shape[-1]).T


def _query(x: Tensor) -> Tensor:  # [heads, in, head_dim]
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def _key(x: Tensor) -> Tensor:  # [2, kv heads, in, head_dim]
    return _query(x[0])


def _value(x: Tensor) -> Tensor:
    return _query(x[1])


def _gate(x: Tensor) -> Tensor:  # [2, in, mlp]
    return x[0].T


def _up(x: Tensor) -> Tensor:
    return x[1].T


@dataclass(frozen=True)
class Row:
    """One stored array: its path, the rank of one layer's slice, what it holds."""

    path: str
    rank: int
    holds: tuple[tuple[str, Transform], ...]


def _dense(path: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{path}/kernel", 2, ((f"{ours}.weight", _linear),)),
        Row(f"{path}/bias", 1, ((f"{ours}.bias", _same),)),
    )


def _norm(path: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{path}/scale", 1, ((f"{ours}.weight", _same),)),
        Row(f"{path}/bias", 1, ((f"{ours}.bias", _same),)),
    )


def _gemma(suffix: str, stack: str) -> tuple[Row, ...]:
    """Rows of one Gemma stack; the prefix's arrays have no suffix, the expert's end in `_1`."""
    layer, ours = "PaliGemma/llm/layers", f"{stack}.layers.{{i}}"
    return (
        Row(f"{layer}/pre_attention_norm{suffix}/scale", 1, ((f"{ours}.norm1.weight", _same),)),
        *_dense(f"{layer}/pre_attention_norm{suffix}/Dense_0", f"{ours}.norm1.modulation"),
        Row(f"{layer}/attn/q_einsum{suffix}/w", 3, ((f"{ours}.attn.q.weight", _query),)),
        Row(
            f"{layer}/attn/kv_einsum{suffix}/w",
            4,
            ((f"{ours}.attn.k.weight", _key), (f"{ours}.attn.v.weight", _value)),
        ),
        Row(f"{layer}/attn/attn_vec_einsum{suffix}/w", 3, ((f"{ours}.attn.o.weight", _out_of_heads),)),
        Row(f"{layer}/pre_ffw_norm{suffix}/scale", 1, ((f"{ours}.norm2.weight", _same),)),
        *_dense(f"{layer}/pre_ffw_norm{suffix}/Dense_0", f"{ours}.norm2.modulation"),
        Row(
            f"{layer}/mlp{suffix}/gating_einsum",
            3,
            ((f"{ours}.mlp.gate.weight", _gate), (f"{ours}.mlp.up.weight", _up)),
        ),
        Row(f"{layer}/mlp{suffix}/linear", 2, ((f"{ours}.mlp.down.weight", _linear),)),
    )


_BLOCK, _ATTENTION = "PaliGemma/img/Transformer/encoderblock", "MultiHeadDotProductAttention_0"
ROWS: tuple[Row, ...] = (
    Row("PaliGemma/img/embedding/kernel", 4, (("vision.patch.weight", _conv),)),
    Row("PaliGemma/img/embedding/bias", 1, (("vision.patch.bias", _same),)),
    Row("PaliGemma/img/pos_embedding", 3, (("vision.position.weight", _first),)),
    *_norm(f"{_BLOCK}/LayerNorm_0", "vision.layers.{i}.norm1"),
    *(
        row
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
        for row in (
            Row(
                f"{_BLOCK}/{_ATTENTION}/{theirs}/kernel", 3, ((f"vision.layers.{{i}}.attn.{ours}.weight", _into_heads),)
            ),
            Row(f"{_BLOCK}/{_ATTENTION}/{theirs}/bias", 2, ((f"vision.layers.{{i}}.attn.{ours}.bias", _flat),)),
        )
    ),
    Row(f"{_BLOCK}/{_ATTENTION}/out/kernel", 3, (("vision.layers.{i}.attn.o.weight", _out_of_heads),)),
    Row(f"{_BLOCK}/{_ATTENTION}/out/bias", 1, (("vision.layers.{i}.attn.o.bias", _same),)),
    *_norm(f"{_BLOCK}/LayerNorm_1", "vision.layers.{i}.norm2"),
    *_dense(f"{_BLOCK}/MlpBlock_0/Dense_0", "vision.layers.{i}.mlp.fc1"),
    *_dense(f"{_BLOCK}/MlpBlock_0/Dense_1", "vision.layers.{i}.mlp.fc2"),
    *_norm("PaliGemma/img/Transformer/encoder_norm", "vision.norm"),
    *_dense("PaliGemma/img/head", "projector"),
    Row("PaliGemma/llm/embedder/input_embedding", 2, (("embedding.weight", _same),)),
    *_gemma("", "prefix"),
    *_gemma("_1", "expert"),
    Row("PaliGemma/llm/final_norm_1/scale", 1, (("expert.norm.weight", _same),)),
    *_dense("PaliGemma/llm/final_norm_1/Dense_0", "expert.norm.modulation"),
    *(
        row
        for theirs, ours in (
            ("action_in_proj", "action_in"),
            ("action_out_proj", "action_out"),
            ("time_mlp_in", "time_in"),
            ("time_mlp_out", "time_out"),
            ("state_proj", "state"),
            ("action_time_mlp_in", "action_time_in"),
            ("action_time_mlp_out", "action_time_out"),
        )
        for row in _dense(theirs, ours)
    ),
)
DEAD = {"PaliGemma/llm/final_norm/scale": "nothing reads the prefix's final hidden state"}
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
    vision = arrays.get(f"{_BLOCK}/{_ATTENTION}/query/kernel")
    out: dict[str, Any] = {}
    if query and len(query.shape) == 4:
        out.update(num_heads=query.shape[1], head_dim=query.shape[3])
    if vision and len(vision.shape) == 4:
        out["vision_heads"] = vision.shape[2]
    return out
