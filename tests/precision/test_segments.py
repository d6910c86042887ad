"""Tensors that stay move to segments of their own, and nobody else's tensors move with them."""

from __future__ import annotations

import torch
from torch import nn

from vivace.check.hopper_weights import twin
from vivace.precision import segments
from vivace.precision.segments import Lasting


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(3, 2), nn.Linear(64, 64)
        self.tied = nn.Module()
        self.tied.weight = self.small.weight
        self.register_buffer("scale", torch.arange(3.0))
        self.ops = object()


def moved(model, monkeypatch):
    """`keep_small` as on a GPU, with copies in the place of segments."""
    place = Lasting(torch.device("cpu"))
    monkeypatch.setattr(segments, "SHARED_BYTES", 1000)
    monkeypatch.setattr(place, "_pool", "segments of their own")
    monkeypatch.setattr(place, "keep", lambda value: value.clone())
    place.keep_small(model)


def test_small_tensors_are_copied_large_ones_stay_and_tied_ones_stay_tied(monkeypatch):
    model = Net()
    before = {name: (one.data_ptr(), one.clone()) for name, one in model.state_dict().items()}
    moved(model, monkeypatch)
    for name, one in model.state_dict().items():
        assert torch.equal(one, before[name][1])
        assert (one.data_ptr() == before[name][0]) == (name == "large.weight")
    assert model.tied.weight is model.small.weight
    assert isinstance(model.small.weight, nn.Parameter)


def test_another_network_over_the_same_tensors_keeps_their_addresses(monkeypatch):
    """Its recorded graphs read them there."""
    model = Net()
    addresses = {name: one.data_ptr() for name, one in model.state_dict().items()}
    other = twin(model)
    moved(other, monkeypatch)
    assert {name: one.data_ptr() for name, one in model.state_dict().items()} == addresses
    assert other.small.bias.data_ptr() != model.small.bias.data_ptr()


def test_a_cpu_has_no_segments():
    with segments.lasting(torch.device("cpu")) as place:
        value = torch.ones(2)
        assert place.keep(value) is value
        model = Net()
        weight = model.small.weight
        place.keep_small(model)
        assert model.small.weight is weight


def test_the_pool_is_one_of_the_device_of_the_weights(monkeypatch, devices):
    """A pool belongs to the device that is current when it is made, and that need not be the network's."""
    on, current = devices
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: list(current))
    assert segments.Lasting(torch.device("cuda:1"))._pool == [torch.device("cuda:1")]
