"""Buckets of the compiled backend, and its cache on disk. What it computes is tested by tests/conformance."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vivace.backends import compiled
from vivace.types import ModelInputs


@pytest.mark.parametrize(("length", "wanted"), [(0, 64), (1, 64), (64, 64), (65, 256), (200, 256), (257, 1024)])
def test_buckets(length, wanted):
    assert compiled.bucket(length, smallest=16) == wanted


def test_warm_up_meets_every_program():
    """Every prompt length up to the longest falls into a bucket that one of the warm-up lengths falls into."""
    shapes = compiled.CompiledBackend.warm_shapes(SimpleNamespace(_smallest=16), 200, views=[3, 2])
    assert {views for views, _ in shapes} == {3}
    lengths = [length for _, length in shapes]
    warm = {compiled.bucket(length, smallest=16) for length in lengths}
    assert {compiled.bucket(length, smallest=16) for length in range(201)} == warm
    assert max(lengths) <= 200


def test_padding_is_masked_and_the_prompt_untouched():
    tokens = torch.randint(1, 50, (2, 5))
    padded = compiled.pad_prompt(ModelInputs(torch.zeros(2, 1, 3, 4, 4), tokens), 16)
    assert torch.equal(padded.tokens[:, :5], tokens)
    assert torch.equal(padded.token_mask, torch.arange(16).expand(2, 16) < 5)
    own = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    kept = compiled.pad_prompt(ModelInputs(torch.zeros(2, 1, 3, 4, 4), tokens, token_mask=own), 16)
    assert torch.equal(kept.token_mask[:, :5], own)
    assert not kept.token_mask[:, 5:].any()


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "compiler" in compiled.why_not(device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in compiled.why_not(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (6, 1))
    assert "compute capability 7.0" in compiled.why_not(device="cuda:0")


@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_one_compiler_is_enough(monkeypatch, name):
    monkeypatch.setattr(shutil, "which", lambda asked: f"/bin/{asked}" if asked == name else None)
    assert compiled.why_not(device="cpu") is None


def test_programs_are_kept_in_the_cache_folder(tmp_path):
    """A process that compiles leaves files under VIVACE_CACHE, where the next one finds them."""
    if compiled.why_not(device="cpu"):
        pytest.skip("no C++ compiler")
    code = (
        "import torch; from vivace.config import use_compile_cache; use_compile_cache();"
        "print(float(torch.compile(lambda x: torch.sin(x) * 2)(torch.zeros(3)).sum()))"
    )
    environment = {"VIVACE_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p for p in Path(tmp_path / "inductor").rglob("*") if p.is_file()]
