"""An Orbax `params/` folder as named arrays that are read a layer at a time, through tensorstore.

Arrays are usually stored as one chunk, so that one layer costs decoding all of them. The decoded array is then kept until
another array is asked for: reading in the order of `Checkpoint.tensors` decodes everything once and holds one array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, Unsupported
from .folder import read_json
from .source import listing

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
MANIFEST = "manifest.ocdbt"


@dataclass
class Kept:
    """The one decoded array that is kept between reads."""

    path: str = ""
    tensor: Tensor | None = None


@dataclass(frozen=True)
class StoredArray:
    """One array of the store, not read yet; `chunk` is how much of it is decoded at least."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk: tuple[int, ...]
    handle: Any = field(repr=False, compare=False)
    kept: Kept = field(repr=False, compare=False)

    def read(self, layer: int | None) -> Tensor:
        """The whole array, or slice `layer` of axis 0."""
        if layer is None:
            return self._decode(self.handle)
        if self.chunk[0] == 1:
            return self._decode(self.handle[layer])
        if self.kept.path != self.path or self.kept.tensor is None:
            self.kept.tensor = None
            self.kept.tensor = self._decode(self.handle)
            self.kept.path = self.path
        return self.kept.tensor[layer]

    def _decode(self, view: Any) -> Tensor:
        try:
            array = view.read().result()
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"cannot read array {self.path}", got=str(error)[:300], do="the folder is damaged or incomplete"
            ) from error
        if self.dtype == torch.bfloat16:
            return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
        return torch.from_numpy(array)


def open_store(params: Path) -> dict[str, StoredArray]:
    """{path with slashes: array} of an Orbax folder; the root `params` and a leaf `value` common to all are stripped."""
    if not (params / MANIFEST).is_file():
        raise CheckpointError(
            f"{params} is not an Orbax folder that vivace can read",
            got=f"no {MANIFEST}",
            wanted="OCDBT, Orbax's default since 2023",
            do="copy the whole folder, or save it again with a current openpi",
        )
    ts = load_tensorstore()
    base = {"driver": "ocdbt", "base": f"file://{params.resolve()}/"}
    try:
        keys = [key.decode("utf-8", "replace") for key in ts.KvStore.open(base).result().list().result()]
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{params} is damaged", got=str(error)[:300], do="copy the whole folder again") from error
    found = {key[: -len("/.zarray")] for key in keys if key.endswith("/.zarray")}
    if not found:
        raise CheckpointError(f"{params} holds no arrays", do="the folder is incomplete; copy it again")
    kept = Kept()
    arrays, names = {}, _paths(found)
    for name, path in names.items():
        arrays[path] = _open_array(ts, base, name=name, path=path, kept=kept)
    _check_chunks(params, {path: name for name, path in names.items()}, arrays, keys)
    return arrays


def _open_array(ts: Any, base: Mapping[str, Any], *, name: str, path: str, kept: Kept) -> StoredArray:
    try:
        handle = ts.open({"driver": "zarr", "kvstore": {**base, "path": f"{name}/"}}, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"cannot open array {path}", got=str(error)[:300], do="the folder is damaged") from error
    dtype = DTYPES.get(handle.dtype.name)
    if dtype is None:
        raise CheckpointError(
            f"array {path} has another dtype", got=handle.dtype.name, wanted=f"one of {sorted(DTYPES)}"
        )
    chunk = handle.chunk_layout.read_chunk.shape or handle.shape
    return StoredArray(path, tuple(handle.shape), dtype, tuple(chunk), handle, kept)


def _paths(stored: set[str]) -> dict[str, str]:
    """{stored name with dots: path with slashes}."""
    split = {name: name.split(".") for name in sorted(stored)}
    if all(parts[-1] == "value" and len(parts) > 1 for parts in split.values()):
        split = {name: parts[:-1] for name, parts in split.items()}
    if all(parts[0] == "params" and len(parts) > 1 for parts in split.values()):
        split = {name: parts[1:] for name, parts in split.items()}
    return {name: "/".join(parts) for name, parts in split.items()}


def _check_chunks(params: Path, stored: Mapping[str, str], arrays: Mapping[str, StoredArray], keys: list[str]) -> None:
    """A missing chunk reads as zeros, silently; so every chunk must be listed, unless the writer says it drops zeros."""
    metadata = params / "_METADATA"
    if metadata.is_file() and read_json(metadata).get("store_array_data_equal_to_fill_value") is False:
        return
    present: dict[str, int] = {}
    for key in keys:
        head, _, leaf = key.rpartition("/")
        present[head] = present.get(head, 0) + (not leaf.startswith("."))
    lacking = []
    for path, array in arrays.items():
        wanted = math.prod(math.ceil(n / c) for n, c in zip(array.shape, array.chunk, strict=True))
        if present.get(stored[path], 0) < wanted:
            lacking.append(f"{path}: {present.get(stored[path], 0)} of {wanted} chunks")
    if lacking:
        raise CheckpointError(
            f"{params} lacks data", got=listing(lacking), do="the folder is incomplete; copy all of it again"
        )


def load_tensorstore() -> Any:
    """The module, or Unsupported that says how to get it."""
    try:
        import tensorstore
    except ImportError as error:
        raise Unsupported(
            "openpi JAX checkpoints need the package tensorstore",
            got=str(error),
            do="pip install 'vivace[jax-checkpoints]', or convert the checkpoint to safetensors",
        ) from error
    return tensorstore
