"""The format against the safetensors library, and how little memory reading takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vivace.checkpoints.safetensors_io import map_tensor, read_header, read_tensor, write_safetensors
from vivace.errors import CheckpointError

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def examples() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    return {
        **tensors,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "odd": torch.arange(7, dtype=torch.uint8),
    }


def test_the_library_reads_what_we_write(tmp_path):
    tensors = examples()
    entries = [(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
    blocks = (block for value in tensors.values() for block in (value.split(2) if value.dim() else [value]))
    write_safetensors(tmp_path / "a.safetensors", entries, blocks=blocks, metadata={"who": "me"})
    got = load_file(tmp_path / "a.safetensors")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[key], value) and got[key].dtype == value.dtype for key, value in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        assert handle.metadata() == {"who": "me"}


def test_a_wrong_number_of_bytes_is_caught(tmp_path):
    with pytest.raises(AssertionError, match="promises"):
        write_safetensors(tmp_path / "a", [("x", torch.float32, (4,))], blocks=iter([torch.zeros(3)]))


def test_we_read_what_the_library_writes(tmp_path):
    tensors = examples()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"k": "v"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"k": "v"}
    for key, value in tensors.items():
        stored = header.tensors[key]
        assert torch.equal(read_tensor(stored, CPU), value)
        if value.numel():
            with stored.file.open("rb") as handle:
                assert torch.equal(map_tensor(handle, stored), value)


def test_an_unaligned_header_reads_the_same_both_ways(tmp_path):
    data = torch.arange(1000, dtype=torch.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    header += b" " * (3 - len(header) % 4)  # data begins at an odd byte
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
    stored = read_header(file).tensors["x"]
    assert stored.begin % 4
    assert torch.equal(read_tensor(stored, CPU), data)
    with file.open("rb") as handle:
        assert torch.equal(map_tensor(handle, stored), data)


def test_a_read_tensor_does_not_depend_on_the_file(tmp_path):
    save_file({"x": torch.arange(10_000)}, tmp_path / "a.safetensors")
    got = read_tensor(read_header(tmp_path / "a.safetensors").tensors["x"], CPU)
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 90_000)
    assert torch.equal(got, torch.arange(10_000))
    got[0] = 5  # and it is writable


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "quantised"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "byte"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "instead of"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}, "instead of"),
        ({"dtype": "F32", "shape": [1]}, "exactly"),
    ],
)
def test_headers_that_promise_something_else(tmp_path, entry, match):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match=match):
        read_header(tmp_path / "a")


MEASURE = """
import sys, torch
from pathlib import Path
from vivace.checkpoints.safetensors_io import read_header, write_safetensors
def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024
file, keep = Path(sys.argv[1]), sys.argv[2] == "keep"
shape = (10, 1024, 1024)  # 40 MB each
entries = [(f"t{i}", torch.float32, shape) for i in range(10)]
write_safetensors(file, entries, blocks=(torch.full((1024, 1024), float(n)) for n in range(100)))
before, kept = status("VmHWM"), []
for stored in read_header(file).tensors.values():
    tensor = stored.ref().read(torch.device("cpu"))
    assert float(tensor[3, 5, 7]) == 10 * int(stored.key[1:]) + 3
    if keep:
        kept.append(tensor)
    del tensor  # or the next one is read beside it
print(status("VmHWM") - before)
"""


def peak_growth_mb(tmp_path, mode: str) -> float:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big.safetensors"), mode]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_reading_one_after_another_holds_one_tensor(tmp_path):
    """A 400 MB file of 40 MB tensors: the peak grows by one of them; by all of them if the caller keeps them (control)."""
    assert peak_growth_mb(tmp_path, "release") < 60
    assert peak_growth_mb(tmp_path, "keep") > 350
