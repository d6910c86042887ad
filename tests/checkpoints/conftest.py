"""A tiny generated checkpoint of each format and kind, and a way to rewrite safetensors files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vivace.checkpoints.make import Recipe, make_checkpoint


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable[..., Path]:
    """`made(format="jax", kind="pi0")`: a checkpoint folder, written once per recipe; do not change it."""
    root, done = tmp_path_factory.mktemp("made"), {}

    def get(**fields) -> Path:
        key = repr(sorted(fields.items()))
        if key not in done:
            done[key] = root / f"{len(done)}"
            make_checkpoint(done[key], Recipe(**{"tokenizer": False, **fields}))
        return done[key]

    return get


@pytest.fixture
def rewritten(made, tmp_path) -> Callable[..., Path]:
    """`rewritten(change, format="openpi")`: a copy whose tensors {key: tensor} went through `change`."""

    def get(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **fields) -> Path:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(made(**fields), folder)
        file = folder / "model.safetensors"
        tensors = change(load_file(file))
        file.unlink()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        return folder

    return get
