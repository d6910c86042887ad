"""E4M3 as the reference operations compute it, against numpy with ml_dtypes: another implementation of the format."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from vivace.ops import reference
from vivace.ops.layers import Fp8Linear, Linear
from vivace.precision import quantize

RANGE = 6.0


def oracle(x: np.ndarray, scale: np.float32) -> np.ndarray:
    """Codes uint8: divide in float32, clamp, round to nearest even."""
    return np.clip(x / scale, np.float32(-448), np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def hard_values() -> np.ndarray:
    g = np.random.default_rng(0)
    scale = np.float32(RANGE / 448)
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    ties = (codes[1:] + codes[:-1]) / 2  # exactly between two numbers of the format
    outside = np.array([RANGE, -RANGE, 1.001 * RANGE, -50 * RANGE, 1e30, -1e30, 1e-30, 0.0, -0.0], np.float32)
    return np.concatenate([g.normal(0, 2, 4000).astype(np.float32), codes * scale, ties * scale, outside])


def layer(weight: torch.Tensor, bias: torch.Tensor | None = None, *, granularity="channel", amax=RANGE) -> Fp8Linear:
    plain = Linear(weight.shape[1], weight.shape[0], name="prefix.layers.0.mlp.down", bias=bias is not None)
    plain.weight.data = weight
    if bias is not None:
        plain.bias.data = bias
    return quantize.quantise_layer(plain, amax=amax, granularity=granularity)


def test_inputs_are_rounded_and_clamped_as_the_format_says():
    x, small = hard_values(), layer(torch.randn(4, 8))
    got = reference.hand_over(torch.from_numpy(x), small).view(torch.uint8).numpy()
    wanted = oracle(x, small.input_scale.numpy()[0])
    assert np.array_equal(got, wanted)
    assert not np.isnan(got.view(ml_dtypes.float8_e4m3fn).astype(np.float32)).any(), "overflow became NaN"
    wrong = oracle(x, small.input_scale.numpy()[0] * np.float32(1.1))  # control: another scale is seen
    assert (got != wrong).mean() > 0.5


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_weights_are_the_codes_of_the_oracle(granularity):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 16)[:, None]
    codes, scale = quantize.quantise_weight(weight, granularity)
    largest = np.abs(weight.numpy()).max(
        axis=1 if granularity == "channel" else None, keepdims=granularity == "channel"
    )
    wanted_scale = np.broadcast_to((largest / np.float32(448)).astype(np.float32), (16, 1))
    assert np.array_equal(scale.numpy(), wanted_scale[:, 0])
    wanted = np.clip(weight.numpy() / wanted_scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(codes.view(torch.uint8).numpy(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_dequantised_codes(dtype):
    g = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(24, 96, generator=g).to(dtype), torch.randn(24, generator=g).to(dtype)
    x = (2 * torch.randn(5, 96, generator=g)).to(dtype)
    small = layer(weight, bias)
    got = reference.linear(x, small)
    assert got.dtype == dtype
    s = small.input_scale.numpy()[0]
    x8 = oracle(x.float().numpy(), s).view(ml_dtypes.float8_e4m3fn).astype(np.float64) * s
    scale = np.abs(weight.float().numpy()).max(1, keepdims=True) / np.float32(448)
    w8 = (weight.float().numpy() / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    wanted = x8 @ w8.T + bias.double().numpy()
    error = np.abs(got.double().numpy() - wanted).max() / np.abs(wanted).max()
    assert error <= (1e-6 if dtype == torch.float32 else 2**-8), error
    exact = x.double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    assert np.linalg.norm(got.double().numpy() - exact) / np.linalg.norm(exact) > 1e-2, "nothing was quantised"


def test_a_wrong_scale_is_seen():
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(24, 96, generator=g), torch.randn(5, 96, generator=g)
    exact, small = x @ weight.T, layer(weight)

    def error() -> float:
        return ((reference.linear(x, small) - exact).norm() / exact.norm()).item()

    right = error()
    assert right < 0.05
    small.weight_scale.data *= 1.25
    assert error() > 4 * right
    small = layer(weight, amax=0.5)  # most inputs saturate
    assert error() > 4 * right


def test_multiplying_by_the_inverse_scale_moves_few_codes_by_one():
    """The prefill kernels multiply by 1/scale where the reference divides: how far a CPU result is from theirs."""
    x = np.random.default_rng(4).normal(0, 2, 200_000).astype(np.float32)
    scale = np.float32(RANGE / 448)
    divided = oracle(x, scale).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    inverse = np.float32(1) / scale
    multiplied = np.clip(x * inverse, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    apart = divided != multiplied
    assert apart.mean() < 1e-5
    assert (np.abs(divided - multiplied)[apart] <= 2**-3 * np.abs(divided[apart]) + 2**-9).all()
