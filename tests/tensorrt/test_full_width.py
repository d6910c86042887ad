"""One layer of each stack at the real widths (Gemma-2B, the 300M expert, So400m) against the model in float32."""

from __future__ import annotations

import copy

import pytest
from wanted import Subject

from vivace.backends.tensorrt import skeleton
from vivace.config import GemmaConfig, VisionConfig

SIZES = {
    # the last prefix layer is keys and values alone, so two make one whole layer
    "prefix": GemmaConfig(layers=2),
    "expert": GemmaConfig(width=1024, mlp_width=4096, layers=2),
    "vision": VisionConfig(layers=1, image_size=56),
}


@pytest.fixture(scope="module")
def subject(rtx):
    return Subject(rtx, base="fp16", plan="fp8-mlp", changes=SIZES, quick=True)


@pytest.mark.parametrize("part", ["vision", "prefix", "step"])
def test_fp8_mlp(subject, part):
    assert subject.worst(subject.write(part)) >= 0.999
    wanted = subject.wanted(part, simulated=True)
    assert subject.worst(subject.write(part), wanted=wanted) >= 0.9999


@pytest.mark.parametrize("part", ["vision", "prefix", "step"])
def test_fp16(subject, part):
    plain = copy.copy(subject)
    plain.outlined = skeleton.outline(subject.config, base="fp16")
    plain.numbers = skeleton.values(subject.model, plain.outlined)
    assert plain.worst(plain.write(part)) >= 0.9999
