"""Which captured bucket a request uses: logic that needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vivace.backends import cuda_graph
from vivace.backends.buffers import bucket_of, choose
from vivace.types import ModelInputs


def request(length: int) -> ModelInputs:
    return ModelInputs(torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, length, dtype=torch.int64))


def test_a_prompt_that_fills_its_bucket_by_chance_captures_nothing_new():
    masked, full = bucket_of(request(45), step=16), bucket_of(request(48), step=16)
    assert masked != full
    assert choose(full, {masked}) == masked
    assert choose(full, {masked, full}) == full
    assert choose(full, set()) == full
    assert choose(masked, {full}) == masked, "a masked request never runs without its mask"


def test_after_warm_up_no_prompt_length_is_new():
    backend = SimpleNamespace(_step=16)
    lengths = cuda_graph.CudaGraphBackend.prompt_lengths(backend, 200)
    known = {bucket_of(request(length), step=16) for length in lengths}
    assert len(known) <= cuda_graph.MAX_BUCKETS
    for length in range(1, 201):
        assert choose(bucket_of(request(length), step=16), known) in known, length
