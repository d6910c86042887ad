"""Arrays on their way to the device: values, order of axes, and page-locked memory that is used again."""

import numpy as np
import pytest
import torch

from vivace.runtime import collate, noise
from vivace.types import PreparedObservation

CPU = torch.device("cpu")


def pictures(seed):
    """uint8 [2, 3, 16, 24], stored channels last."""
    stored = np.random.default_rng(seed).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    return stored.transpose(0, 3, 1, 2)


def prepared(images, state=None):
    return PreparedObservation(
        images=images, tokens=np.arange(5, dtype=np.int32), state=np.zeros(32, np.float32) if state is None else state,
        state_robot=np.zeros(7), state_normalized=np.zeros(7), views=("a", "b"),
    )  # fmt: skip


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 2, 1, 0)])
def test_axes_come_back_from_the_order_of_memory(axes):
    value = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).transpose(axes)
    stored, back = collate.as_stored(value)
    assert stored.flags.c_contiguous
    assert np.array_equal(stored.transpose(back), value)


def test_what_arrives_is_contiguous_and_the_same():
    images = pictures(0)
    assert not images.flags.c_contiguous
    inputs = collate.collate([prepared(images)], kind="pi05", device=CPU)
    assert inputs.images.is_contiguous()
    assert torch.equal(inputs.images[0], torch.from_numpy(np.ascontiguousarray(images)))
    assert inputs.view_mask is None
    assert inputs.token_mask is None


@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 1, 7, 13), (1, 2, 15, 23)])
def test_noise_follows_every_pixel(where):
    images = pictures(1)
    other = images.copy(order="K")
    other[where] ^= 1
    assert noise.fingerprint(prepared(images)) == noise.fingerprint(prepared(images.copy(order="K")))
    assert noise.fingerprint(prepared(images)) != noise.fingerprint(prepared(other))


@pytest.mark.gpu
def test_page_locked_memory_is_not_written_before_it_was_read():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    torch.cuda._sleep(20_000_000)  # copies wait behind this, while the host goes on
    sent = [collate.sent(pictures(seed), device) for seed in range(40)]
    for seed, value in enumerate(sent):
        assert value.is_contiguous()
        assert np.array_equal(value.cpu().numpy(), pictures(seed))


@pytest.mark.gpu
def test_pictures_written_to_page_locked_memory_are_sent_from_there():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    torch.cuda._sleep(20_000_000)
    sent = []
    for seed in range(20):  # each array is let go before its copy has begun: its memory must not be handed out again
        stored = collate.page_locked((2, 16, 24, 3), np.uint8)
        assert torch.from_numpy(stored).is_pinned()
        stored[...] = pictures(seed).transpose(0, 2, 3, 1)
        sent.append(collate.sent(stored.transpose(0, 3, 1, 2), device))
        del stored
    for seed, value in enumerate(sent):
        assert np.array_equal(value.cpu().numpy(), pictures(seed))
