"""Products of bfloat16 on a CPU without a fast one: the same numbers by way of float32."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vivace
from vivace.ops import reference
from vivace.ops.layers import Linear

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mkldnn_linear", "linear", "matmul"}


class Products(TorchDispatchMode):
    """Notes the dtype of every matrix product."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layer(*, bias):
    made = Linear(96, 40, name="test", bias=bias)
    made.weight.data = drawn(40, 96, seed=1)
    if bias:
        made.bias.data = drawn(40, seed=2)
    return made


def one_rounding(exact):
    """Half a unit in the last place of bfloat16, and what float32 may lose while it sums."""
    return exact.abs() * 2.0**-8 + 1e-4


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_exact_one_rounded_once(monkeypatch, fast, bias):
    monkeypatch.setattr(reference, "CPU_MULTIPLIES_BFLOAT16", fast)
    x, linear = drawn(3, 7, 96, seed=3), layer(bias=bias)
    with torch.no_grad(), Products() as seen:
        got = reference.linear(x, linear)
    assert got.dtype == torch.bfloat16
    assert seen.dtypes == {torch.bfloat16 if fast else torch.float32}
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
    assert bool(((got.double() - exact).abs() <= one_rounding(exact)).all())


def test_attention_rounds_where_it_did(monkeypatch):
    q, k, v = (drawn(1, 20, heads, 16, seed=seed) for seed, heads in ((4, 4), (5, 2), (6, 2)))
    into, found = layer(bias=False), {}
    for fast in (True, False):
        monkeypatch.setattr(reference, "CPU_MULTIPLIES_BFLOAT16", fast)
        with torch.no_grad(), Products() as seen:
            found[fast] = reference.attention(q, k, v, None, None, into)
        assert seen.dtypes == {torch.bfloat16 if fast else torch.float32}
    assert torch.allclose(found[True].float(), found[False].float(), rtol=2.0**-7, atol=2.0**-8)


def test_a_policy_in_bfloat16_is_the_same_either_way(monkeypatch):
    """The bundled policy: as near to float32 as with the other products, relative L2 of the actions."""
    from vivace.check import observations
    from vivace.check.metrics import rel_l2

    def actions(precision):
        policy = vivace.load_policy("conveyor-small", config=vivace.EngineConfig(precision=precision))
        request = observations.synthetic(policy.io, 1, seed=0, prepare=policy.prepare)[0]
        return policy.infer(request).actions_normalized

    wanted = actions("float32")
    monkeypatch.setattr(reference, "CPU_MULTIPLIES_BFLOAT16", True)
    direct = rel_l2(actions("bfloat16"), wanted)
    monkeypatch.setattr(reference, "CPU_MULTIPLIES_BFLOAT16", False)
    wide = rel_l2(actions("bfloat16"), wanted)
    print("relative L2 to float32, direct and by float32:", direct, wide)
    assert wide < 1.2 * direct
