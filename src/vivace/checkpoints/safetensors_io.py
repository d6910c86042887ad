"""The safetensors format, read and written a tensor at a time.

A file is 8 bytes (little-endian length N of the header), N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the
data, contiguous and without gaps. Two reasons not to hand this to the library: its Python reader keeps the whole file
mapped while any tensor of it lives, and its writer wants every tensor in memory at once. Both matter at 7 GB.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .source import TensorRef

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_READ_BLOCK_BYTES = 1 << 28


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `begin` and `nbytes` count bytes from the start of the file."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def ref(self) -> TensorRef:
        """The same as a TensorRef in the file's own layout."""
        return TensorRef(self.key, self.shape, self.dtype, lambda device: read_tensor(self, device))


@dataclass(frozen=True)
class Header:
    """The parsed header: {key: tensor}, and the free text {str: str} that `save_model` uses for tied tensors."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """Parse and check the header of one file. Raises CheckpointError for anything that the format does not allow."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(file, f"a header of {length} bytes in a file of {size} bytes")
            raw = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}", got=str(error)) from error
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"a header that is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise _damaged(file, f"a header that is a {type(table).__name__}")
    metadata = table.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "__metadata__ that is not a table of strings")
    tensors = {key: _entry(file, key, entry, base=8 + length) for key, entry in table.items()}
    _check_layout(file, tensors.values(), base=8 + length, size=size)
    return Header(tensors, metadata)


def read_tensor(stored: StoredTensor, device: torch.device) -> Tensor:
    """Fetch one tensor to `device`.

    To a CPU the bytes are read straight into the result, so that only the result counts. To an accelerator they are copied
    out of a private mapping of just this tensor, so that the host holds nothing but reclaimable page cache.
    """
    try:
        with stored.file.open("rb", buffering=0) as handle:
            if device.type == "cpu":
                return _read_into(handle, stored)
            return map_tensor(handle, stored).to(device)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read tensor {stored.key!r} of {stored.file}", got=str(error)) from error


def write_safetensors(
    file: Path,
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    *,
    blocks: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file without ever holding more than one block.

    Args:
        file: overwritten.
        entries: (key, dtype, shape) in the order of the data.
        blocks: contiguous CPU tensors whose bytes, one after another, are the data; a tensor may come in several.
        metadata: the format's free text.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, dtype, shape in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        table[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        for block in blocks:
            handle.write(_bytes_of(block.contiguous()))
        written = handle.tell() - 8 - len(header)
    assert written == offset, f"{file}: {written} bytes of data written, the header promises {offset}"


def map_tensor(handle: Any, stored: StoredTensor) -> Tensor:
    """The tensor as a private mapping of its part of the file; pages are read when they are touched."""
    aligned = stored.begin - stored.begin % mmap.ALLOCATIONGRANULARITY
    skip = stored.begin - aligned
    mapped = mmap.mmap(handle.fileno(), skip + stored.nbytes, access=mmap.ACCESS_COPY, offset=aligned)
    host = torch.frombuffer(mapped, dtype=stored.dtype, count=math.prod(stored.shape), offset=skip)
    return host.reshape(stored.shape)


def _read_into(handle: Any, stored: StoredTensor) -> Tensor:
    out = torch.empty(stored.shape, dtype=stored.dtype)
    view = _bytes_of(out)
    handle.seek(stored.begin)
    done = 0
    while done < stored.nbytes:  # one read() returns at most 2 GiB on Linux
        got = handle.readinto(view[done : done + _READ_BLOCK_BYTES])
        if not got:
            raise CheckpointError(
                f"{stored.file} ended inside tensor {stored.key!r}",
                got=f"{done} bytes",
                wanted=f"{stored.nbytes} bytes",
                do="the file was truncated after it was opened; copy it again",
            )
        done += got
    return out


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _entry(file: Path, key: str, entry: Any, *, base: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"an entry {key!r} without exactly dtype, shape, data_offsets")
    dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise CheckpointError(
            f"tensor {key!r} of {file} has a dtype that vivace does not read",
            got=str(entry["dtype"])[:40],
            wanted=f"one of {sorted(DTYPES)}",
            do="quantised files are not checkpoints of this family; take the float32, float16 or bfloat16 one",
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(file, f"tensor {key!r} with shape {str(shape)[:60]} and offsets {str(offsets)[:60]}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _damaged(file, f"tensor {key!r} of shape {shape} in {offsets[1] - offsets[0]} bytes instead of {nbytes}")
    return StoredTensor(file, key, dtype, tuple(shape), base + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value)
    )


def _check_layout(file: Path, tensors: Iterable[StoredTensor], *, base: int, size: int) -> None:
    position = base
    for stored in sorted(tensors, key=lambda item: (item.begin, item.nbytes)):
        if stored.begin != position:
            raise _damaged(file, f"tensor {stored.key!r} at byte {stored.begin} where byte {position} is next")
        position += stored.nbytes
    if position != size:
        raise CheckpointError(
            f"{file} is truncated or damaged",
            got=f"{size} bytes",
            wanted=f"{position} bytes, as its header says",
            do="download or copy it again",
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return table


def _damaged(file: Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a valid safetensors file", got=got[:300], do="the file is damaged; download or copy it again"
    )
