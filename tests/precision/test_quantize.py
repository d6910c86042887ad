"""Quantising in place lets every layer go as soon as its E4M3 holder is there: the peak is one layer, not the network."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from vivace.ops.layers import Fp8Linear, Linear
from vivace.precision import quantize
from vivace.precision.plan import PrecisionPlan, Rule


def test_layers_are_let_go_one_by_one(monkeypatch):
    network = nn.Module()
    for index in range(4):
        layer = Linear(8, 8, name=f"prefix.layers.{index}.mlp.down", bias=False)
        layer.weight.data = torch.randn(8, 8)
        network.add_module(f"down{index}", layer)
    old = [weakref.ref(layer) for layer in network.children()]
    real, alive = quantize.quantise_layer, []

    def counted(*arguments, **more):
        alive.append(sum(one() is not None for one in old))
        return real(*arguments, **more)

    del layer
    monkeypatch.setattr(quantize, "quantise_layer", counted)
    plan = PrecisionPlan("x", rules=(Rule("prefix.*"),), amax={f"prefix.layers.{i}.mlp.down": 1.0 for i in range(4)})
    names = quantize.apply(network, plan)
    assert names == tuple(f"prefix.layers.{index}.mlp.down" for index in range(4))
    assert alive == [4, 3, 2, 1]
    assert all(isinstance(layer, Fp8Linear) for layer in network.children())
