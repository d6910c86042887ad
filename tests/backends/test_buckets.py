"""Which captured bucket a request uses: logic that needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vivace.backends import cuda_graph
from vivace.backends.buffers import Bucket, bucket_of, choose
from vivace.types import ModelInputs


def request(length: int, views: int = 2) -> ModelInputs:
    return ModelInputs(torch.zeros(1, views, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, length, dtype=torch.int64))


def of(length: int, views: int = 2) -> Bucket:
    return bucket_of(request(length, views), step=16)


def test_a_prompt_that_fills_its_bucket_by_chance_captures_nothing_new():
    masked, full = of(45), of(48)
    assert masked != full
    assert choose(full, {masked}, most=16) == masked
    assert choose(full, {masked, full}, most=16) == full
    assert choose(full, set(), most=16) == full
    assert choose(masked, {full}, most=16) == masked, "a masked request never runs without its mask"


def test_a_missing_camera_takes_a_longer_prompts_bucket_rather_than_a_capture():
    usual, longest, longer = of(45, views=3), of(199, views=2), of(60, views=2)
    assert choose(of(20), {usual, longest}, most=16) == longest
    assert choose(of(48), {usual, longest, longer}, most=16) == longer, "the shortest that holds it"
    assert choose(of(20), {longest}, most=16) == of(20), "two cameras are all there are: its own graph"
    assert choose(of(20), {longest}, most=1) == longest, "no more fit: no warm graph is put out"
    assert choose(of(200, views=3), {usual, longest}, most=16) == of(200, views=3), "no longer one is known"
    full = replace(longest, masked=False)
    assert choose(of(20), {usual, full}, most=1) == of(20), "a bucket without masks holds no shorter prompt"
    assert choose(of(20), {usual, replace(longest, batch=2)}, most=1) == of(20)


@pytest.mark.parametrize(("step", "longest"), [(16, 200), (16, 48), (64, 200), (1, 5)])
@pytest.mark.parametrize("views", [[3], [3, 2, 1], [2, 1]])
def test_after_warm_up_no_request_is_new(step, longest, views):
    backend = SimpleNamespace(_step=step)
    shapes = cuda_graph.CudaGraphBackend.warm_shapes(backend, longest, views=views)
    known = {bucket_of(request(length, count), step=step) for count, length in shapes}
    assert len(known) == len(shapes) <= cuda_graph.MAX_BUCKETS
    for count in views:
        for length in range(1, longest + 1):
            wanted = bucket_of(request(length, count), step=step)
            chosen = choose(wanted, known, most=cuda_graph.MAX_BUCKETS)
            assert chosen in known, (count, length)
            assert chosen.views == count
            assert chosen.tokens >= length
            assert chosen.masked or chosen.tokens == length
