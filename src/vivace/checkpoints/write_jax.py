"""Writing openpi's JAX layout: the rows of openpi_jax.py, each transform run backwards, one layer per zarr chunk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from . import jax_rows as jax
from .names import expected_shapes
from .orbax import load_tensorstore

Values = Callable[[str], Iterator[Tensor]]

DTYPE_NAMES = {torch.float32: "<f4", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class _Job:
    """What every row needs: the store, the network, where the values come from."""

    ts: Any
    base: dict[str, Any]
    model: ModelConfig
    dtype: torch.dtype
    values: Values
    progress: Callable[[int], None]


def write_params(
    params: Path, model: ModelConfig, *, dtype: torch.dtype, values: Values, progress: Callable[[int], None]
) -> None:
    """Write an Orbax `params/` folder.

    Args:
        params: created.
        model: the network.
        dtype: float32 or bfloat16.
        values: canonical name -> float32 blocks of leading rows.
        progress: called with the number of values written.
    """
    base = {"driver": "ocdbt", "base": f"file://{params.resolve()}/", "config": {"compression": None}}
    job = _Job(load_tensorstore(), base, model, dtype, values, progress)
    shapes = expected_shapes(model)
    written = {}
    for row in jax.ROWS:
        if row.holds[0][0].format(i=0) in shapes:
            name = f"params.{row.path.replace('/', '.')}.value"
            written[name] = _write_stack(job, name, row) if "{i}" in row.holds[0][0] else _write_one(job, name, row)
    name, width = "params.PaliGemma.llm.final_norm.scale.value", [model.prefix.width]  # dead, but openpi has it
    _create(job, name, width, width).write(_numpy(torch.zeros(width), dtype)).result()
    written[name] = width
    _write_metadata(params, written)


def _write_stack(job: _Job, name: str, row: jax.Row) -> list[int]:
    """All layers of one kind of weight, a layer at a time."""
    layers = getattr(job.model, row.holds[0][0].split(".", 1)[0]).layers
    array: Any = None
    for i in range(layers):
        value = _inverse(row, [torch.cat(list(job.values(ours.format(i=i)))) for ours, _ in row.holds], job.model)
        if array is None:
            array = _create(job, name, [layers, *value.shape], [1, *value.shape])
        array[i].write(_numpy(value, job.dtype)).result()
        job.progress(value.numel())
    return list(array.shape)


def _write_one(job: _Job, name: str, row: jax.Row) -> list[int]:
    """An array that is not stacked; what is stored as it is (the vocabulary above all) goes in row blocks."""
    ours, transform = row.holds[0]
    if transform is not jax.same:
        value = _inverse(row, [torch.cat(list(job.values(ours)))], job.model)
        _create(job, name, list(value.shape), list(value.shape)).write(_numpy(value, job.dtype)).result()
        job.progress(value.numel())
        return list(value.shape)
    shape, start, array = list(expected_shapes(job.model)[ours]), 0, None
    for block in job.values(ours):
        if array is None:
            array = _create(job, name, shape, [block.shape[0], *shape[1:]])
        array[start : start + block.shape[0]].write(_numpy(block, job.dtype)).result()
        start += block.shape[0]
        job.progress(block.numel())
    return shape


def _create(job: _Job, name: str, shape: list[int], chunks: list[int]) -> Any:
    stored = DTYPE_NAMES[job.dtype]
    spec = {
        "driver": "zarr",
        "kvstore": {**job.base, "path": f"{name}/"},
        "metadata": {"shape": shape, "chunks": chunks, "dtype": stored, "compressor": None, "fill_value": None},
        "store_data_equal_to_fill_value": True,
    }
    return job.ts.open(spec, create=True, open=False).result()


def _numpy(value: Tensor, dtype: torch.dtype) -> Any:
    value = value.contiguous().to(dtype)
    if dtype is torch.bfloat16:
        import ml_dtypes  # a dependency of tensorstore

        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def _inverse(row: jax.Row, parts: list[Tensor], model: ModelConfig) -> Tensor:
    """Our layout -> one layer of the stored array."""
    transform = row.holds[0][1]
    vision = "/img/" in row.path
    heads = model.vision.num_heads if vision else model.prefix.num_heads
    kv_heads = model.prefix.num_kv_heads
    x = parts[0]
    if transform is jax.key:  # k and v
        return torch.stack([part.reshape(kv_heads, -1, part.shape[1]).transpose(1, 2) for part in parts])
    if transform is jax.gate:  # gate and up
        return torch.stack([part.T for part in parts])
    inverse: dict[jax.Transform, Callable[[], Tensor]] = {
        jax.same: lambda: x,
        jax.linear: lambda: x.T,
        jax.conv: lambda: x.permute(2, 3, 1, 0),
        jax.first: lambda: x[None],
        jax.flat: lambda: x.reshape(heads, -1),
        jax.into_heads: lambda: x.T.reshape(x.shape[1], heads, -1),
        jax.out_of_heads: lambda: x.T.reshape(heads, -1, x.shape[0]),
        jax.query: lambda: x.reshape(heads, -1, x.shape[1]).transpose(1, 2),
    }
    return inverse[transform]()


def _write_metadata(params: Path, written: dict[str, list[int]]) -> None:
    """Orbax's own table of contents; its reader wants it, ours only its last flag."""
    tree = {}
    for name, shape in written.items():
        parts = name.split(".")
        tree[str(tuple(parts))] = {
            "key_metadata": [{"key": part, "key_type": 2} for part in parts],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
        }
    table = {"tree_metadata": tree, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    (params / "_METADATA").write_text(json.dumps({**table, "custom_metadata": None}))
