"""The fingerprint follows the weights: not the format, not the order of reading; and it sees other weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vivace.checkpoints.fingerprint import SAMPLES, Fingerprint, fingerprint, part
from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.checkpoints.open import open_checkpoint
from vivace.checkpoints.source import TensorRef


def refs(**tensors: torch.Tensor) -> dict[str, TensorRef]:
    return {
        name: TensorRef(name, tuple(value.shape), value.dtype, lambda device, value=value: value)
        for name, value in tensors.items()
    }


def made(folder, **changes):
    make_checkpoint(folder, replace(Recipe(size="tiny", horizon=6), **changes))
    return fingerprint(open_checkpoint(folder, vision_heads=2).tensors)


def test_it_follows_the_weights_and_not_the_file_format(tmp_path):
    lerobot = made(tmp_path / "a")
    assert made(tmp_path / "b") == lerobot
    assert made(tmp_path / "c", format="openpi") == lerobot
    assert made(tmp_path / "d", seed=1) != lerobot
    assert made(tmp_path / "e", dtype="bfloat16") != lerobot


def test_hashing_while_loading_equals_hashing_alone_and_returns_the_tensors():
    tensors = refs(a=torch.randn(5, 7), b=torch.randn(3), c=torch.tensor(1.0))
    seen = Fingerprint()
    watched = seen.watch(tensors)
    assert list(watched) == list(tensors)
    for name in ("c", "a", "b", "a"):  # any order, any number of times
        assert watched[name].read(torch.device("cpu")) is tensors[name].read(torch.device("cpu"))
    assert seen.digest() == fingerprint(tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * 1.001,  # a step of training moves every value
        lambda t: t.bfloat16(),
        lambda t: t.reshape(50, 40),
        lambda t: t.t().contiguous(),
        lambda t: torch.zeros_like(t),
    ],
)
def test_other_values_shapes_and_dtypes_are_seen(change):
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    assert part(change(weight)) != part(weight)


def test_a_missing_tensor_is_seen():
    tensors = refs(a=torch.ones(4), b=torch.ones(4))
    assert fingerprint({"a": tensors["a"]}) != fingerprint(tensors)
    assert fingerprint(refs(a=torch.ones(4), c=torch.ones(4))) != fingerprint(tensors), "another name"


def test_a_strided_view_hashes_as_its_values_and_small_tensors_are_sampled_whole():
    weight = torch.randn(30, 20)
    assert part(weight.t()) == part(weight.t().contiguous())
    small = torch.arange(SAMPLES, dtype=torch.float32)
    for index in range(SAMPLES):
        changed = small.clone()
        changed[index] += 1
        assert part(changed) != part(small), index
    assert part(torch.empty(0, 3)) != part(torch.empty(3, 0))


def test_what_it_does_not_see_is_as_documented():
    """One value between the samples: a fingerprint is no signature."""
    weight = torch.randn(SAMPLES * 100)
    changed = weight.clone()
    changed[50] += 1
    assert part(changed) == part(weight)
